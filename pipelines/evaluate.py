"""Stage `evaluate`: score predictions -> data/<profile>/metrics.json and data/<profile>/evaluation."""

import pandas as pd

from pipelines import stage
from samlove.config import DatasetConfig, EvaluateConfig, load
from samlove.data.dataset import RefAvsFolder
from samlove.data.layout import layout
from samlove.data.targets import Targets
from samlove.errors import RequestError
from samlove.scoring.evaluate import SPLITS, evaluate, render_table, write
from samlove.scoring.splits import score_run


@stage
def main() -> None:
    paths = layout()
    for path in (paths.expressions, paths.mask_digest):
        if not path.exists():
            raise RequestError(f"{path}: no such file; run: dvc repro index")
    expressions = pd.read_parquet(paths.expressions)
    folder = RefAvsFolder(load(DatasetConfig).root)
    targets = Targets(
        folder,
        expressions[expressions["split"].isin(SPLITS)],
        paths.mask_digest.read_text(encoding="utf-8").strip(),
        paths.scratch / "targets",
    )
    evaluation = evaluate(expressions, targets, paths.predictions, load(EvaluateConfig).protocol)
    evaluation.details["published"] = score_run(expressions, folder, paths.predictions)
    write(evaluation, paths.metrics, paths.evaluation)
    print(render_table(evaluation.metrics, evaluation.details))


if __name__ == "__main__":
    main()
