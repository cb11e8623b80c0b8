"""Standard errors of the results: how far a score would move with other test videos of the same kind."""

import numpy as np
import pandas as pd


def standard_error(values: pd.Series, videos: pd.Series) -> float | None:
    """The standard error of the mean of `values`, clustered by video; None with fewer than two videos.

    The expressions of a video share its frames and audio, so their scores are not independent. This is the
    cluster-robust ("sandwich") estimate with the correction G / (G - 1) for G videos (Cameron and Miller, "A
    Practitioner's Guide to Cluster-Robust Inference", 2015, section II). NaN in `values` is left out. The error does
    not cover the randomness of training.
    """
    known = values.notna()
    totals = (values[known] - values[known].mean()).groupby(videos[known]).sum().to_numpy(dtype=float)
    G, n = len(totals), int(known.sum())
    return None if G < 2 else float(np.sqrt(G / (G - 1) * (totals**2).sum()) / n)


def standard_errors(rows: pd.DataFrame) -> dict[str, dict[str, float | None]]:
    """{test split: {score: its standard error}}: J, F, J&F in percent, S a fraction; also of the mix.

    rows: as in samlove.scoring.evaluate.Evaluation.
    """
    found: dict[str, dict[str, float | None]] = {}
    for split in ("test_s", "test_u"):
        part = rows[(rows["split"] == split) & ~rows["null"].astype(bool)]
        errors = {name: standard_error(part[column], part["media_id"]) for name, column in _COLUMNS.items()}
        found[split] = {name: None if error is None else round(100 * error, 4) for name, error in errors.items()}
    pairs = {name: (found["test_s"][name], found["test_u"][name]) for name in _COLUMNS}
    found["mix"] = {name: _of_mean(*pair) for name, pair in pairs.items()}
    null = rows[(rows["split"] == "test_n") & rows["null"].astype(bool)]
    error = standard_error(null["S"], null["media_id"])
    return found | {"test_n": {"S": None if error is None else round(error, 6)}}


_COLUMNS = {"J": "J", "F": "F", "J&F": "JF"}  # score -> column of the rows


def _of_mean(seen: float | None, unseen: float | None) -> float | None:
    """The error of the mean of two splits, which have no video in common."""
    return None if seen is None or unseen is None else round(float(np.hypot(seen, unseen)) / 2, 4)
