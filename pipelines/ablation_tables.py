"""Stage `ablation_tables`: the runs as tables and one page -> data/<profile>/ablations/tables and metrics.json."""

from pipelines import stage
from samlove.config import AblationsConfig, DatasetConfig, active_profile, load
from samlove.data.layout import layout
from samlove.scoring.report.ablations import write_ablations
from stores.manifest import write_json


@stage
def main() -> None:
    paths, out = layout(), layout().ablation_tables
    metrics = write_ablations(load(AblationsConfig), load(DatasetConfig), active_profile(), paths.ablation_runs, out)
    write_json(paths.ablation_metrics, metrics)
    print(f"{(out / 'tables.md').read_text(encoding='utf-8')}\n{out / 'index.html'}")


if __name__ == "__main__":
    main()
