"""What the last run of the active profile achieved: `samlove results` and `samlove picture`."""

import json
from pathlib import Path

import pandas as pd

from samlove.config import AblationsConfig, DatasetConfig, load
from samlove.data.dataset import RefAvsFolder
from samlove.data.layout import layout
from samlove.errors import RequestError


def render_results() -> str:
    """The result table and the report's path, then those of the ablations if their tables exist.

    Raises RequestError if the profile has no finished run.
    """
    from samlove.scoring.evaluate import render_table
    from samlove.scoring.report.ablations import render_short

    paths = layout()
    for path in (paths.metrics, paths.details, paths.report):
        _check_exists(path)
    metrics, details = (json.loads(path.read_text(encoding="utf-8")) for path in (paths.metrics, paths.details))
    table = render_table(metrics, details)
    text = f"{table}\n\nreport: {paths.report.resolve()}"
    if not paths.ablation_tables.is_dir():
        return text
    ablations = render_short(load(AblationsConfig), paths.ablation_tables)
    return f"{text}\n\n{ablations}\n\nablations: {(paths.ablation_tables / 'index.html').resolve()}"


def write_picture(out: Path, row_id: str | None) -> str:
    """Draws one expression of the last run to `out`; returns which. row_id: None for the default of choose_row.

    Raises RequestError if there is no finished run, no such row, or `out` is not a PNG or JPEG file in a folder
    that exists.
    """
    from samlove.scoring.report.picture import SUFFIXES, choose_row, draw_picture, save
    from stores import PredictionReader

    if out.suffix.lower() not in SUFFIXES:
        raise RequestError(f"{out}: expected a file name that ends in {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise RequestError(f"{out.parent}: no such folder; create it or choose another path")
    paths = layout()
    scores = paths.evaluation / "rows.parquet"
    _check_exists(scores)
    rows = pd.read_parquet(scores)
    dataset = load(DatasetConfig)
    folder = RefAvsFolder(dataset.root)
    if row_id is None:
        row = choose_row(rows, folder, dataset.frames)
    else:
        found = rows[rows["row_id"] == row_id]
        if found.empty:
            raise RequestError(f"--row {row_id}: no such row_id in {scores}; the first is {rows['row_id'][0]}")
        row = {str(key): value for key, value in found.iloc[0].to_dict().items()}
    predictions = paths.predictions / row["split"] / "predictions.h5"
    _check_exists(predictions)
    save(draw_picture(row, folder, PredictionReader(predictions)), out)
    return f'{out}: "{row["exp"]}" (row {row["row_id"]} of {row["split"]})'


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise RequestError(f"{path}: no such file; run: dvc repro")
