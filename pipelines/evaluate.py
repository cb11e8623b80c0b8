"""Stage `evaluate`: stored predictions against the true masks -> data/metrics.json and data/evaluation/."""

from pathlib import Path

import pandas as pd

from samlove.config import DatasetConfig, EvaluateConfig, load
from samlove.data.dataset import RefAvsFolder
from samlove.errors import RequestError, one_line_errors
from samlove.scoring.evaluate import evaluate, render_table, write

INDEX = Path("data/index/expressions.parquet")
PREDICTIONS = Path("data/predictions")


@one_line_errors
def main() -> None:
    if not INDEX.exists():
        raise RequestError(f"{INDEX}: no such file; make it with: dvc repro index")
    folder = RefAvsFolder(load(DatasetConfig).root)
    evaluation = evaluate(pd.read_parquet(INDEX), folder, PREDICTIONS, load(EvaluateConfig).protocol)
    write(evaluation, Path("data/metrics.json"), Path("data/evaluation"))
    print(render_table(evaluation.metrics, evaluation.details))


if __name__ == "__main__":
    main()
