"""Stage `evaluate`: score predictions -> data/<profile>/metrics.json and data/<profile>/evaluation."""

import pandas as pd

from pipelines import stage
from samlove.config import DatasetConfig, EvaluateConfig, load
from samlove.data.dataset import RefAvsFolder
from samlove.data.layout import layout
from samlove.errors import RequestError
from samlove.scoring.evaluate import evaluate, render_table, write


@stage
def main() -> None:
    paths = layout()
    if not paths.expressions.exists():
        raise RequestError(f"{paths.expressions}: no such file; run: dvc repro index")
    folder = RefAvsFolder(load(DatasetConfig).root)
    evaluation = evaluate(pd.read_parquet(paths.expressions), folder, paths.predictions, load(EvaluateConfig).protocol)
    write(evaluation, paths.metrics, paths.evaluation)
    print(render_table(evaluation.metrics, evaluation.details))


if __name__ == "__main__":
    main()
