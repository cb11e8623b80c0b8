"""Stage `ablation_tables`: the runs as tables and one page -> data/<profile>/ablations/tables and metrics."""

import shutil

from pipelines import stage
from samlove.config import AblationsConfig, DatasetConfig, active_profile, load
from samlove.data.layout import layout
from samlove.scoring.report.ablations import write_ablations
from stores.manifest import replace_folder, write_json


@stage
def main() -> None:
    paths, out = layout(), layout().ablation_tables
    metrics = write_ablations(load(AblationsConfig), load(DatasetConfig), active_profile(), paths.ablation_runs, out)
    new = paths.ablation_metrics.with_name(f"{paths.ablation_metrics.name}.partial")
    shutil.rmtree(new, ignore_errors=True)  # left by a killed run
    new.mkdir()
    for run, scores in metrics.items():  # a file each: DVC shows a row per file
        write_json(new / f"{run}.json", scores)
    replace_folder(new, paths.ablation_metrics)
    print(f"{(out / 'tables.md').read_text(encoding='utf-8')}\n{out / 'index.html'}")


if __name__ == "__main__":
    main()
