"""Null references: the object score below which an expression counts as one that refers to nothing.

`null_references: presence` (train.yaml) supervises SAM 2's object score. At inference, all masks of an expression whose
score is below a threshold are left empty. The threshold is chosen on the validation split: it gates as many null
expressions as it can while expressions with a target lose at most `COST`. The curve over all thresholds shows what
another one would have given on the test splits.
"""

from typing import Any

import numpy as np
import pandas as pd

from samlove.scoring.metrics import histogram, scores_of

COST = 0.005  # of mean J (0..1) on the validation split that gating may take from expressions with a target
UNGATED = "ungated"  # the file of the masks that were left empty because of their object score
SCORES = "object_scores"  # in what this file says about itself: {row_id: object score} of all rows
POINTS = 40  # of the curve, at most


def choose_threshold(scores: np.ndarray, kept: np.ndarray, gated: np.ndarray, S: np.ndarray) -> float:
    """The object score (a logit, at least 0) below which masks are left empty.

    scores (n,): the object score of each validation row. kept, gated (n,): its J with its masks and with empty ones,
    0..1; NaN for null rows. S (n,): S of its masks, 0..1; NaN for rows with a target.
    Below 0, SAM 2 itself leaves masks empty. Of the thresholds whose mean J is at most COST below that of 0, this is
    the one with the lowest mean S; of several, the lowest one. 0 if there are no null rows.
    """
    if np.isnan(S).all():
        return 0.0
    present = np.unique(scores[scores > 0])
    candidates = np.concatenate([[0.0], (present[1:] + present[:-1]) / 2])
    shown = scores >= candidates[:, None]  # (candidates, n)
    quality = np.nanmean(np.where(shown, kept, gated), axis=1) if not np.isnan(kept).all() else np.zeros(len(shown))
    nulls = np.nanmean(np.where(shown | np.isnan(S), S, 0.0), axis=1)
    allowed = quality >= quality[0] - COST
    return float(candidates[allowed][nulls[allowed].argmin()])


def empty_scores(target: np.ndarray) -> dict[str, float]:
    """J and F, 0..1, of empty masks against targets (T,H,W) bool; F is NaN if no frame has a target."""
    scores = scores_of(histogram(np.zeros(target.shape, np.uint8), target))
    return {"J_empty": scores.J, "F_empty": scores.F}


def curve(rows: pd.DataFrame, threshold: float) -> dict[str, Any]:
    """What each threshold gives: {"threshold": the chosen one, "points": [{threshold, S, seen, unseen}, ...]}.

    rows: of test_s, test_u and test_n, with object_score; J_ungated, F_ungated and S_ungated of the masks without a
    threshold; J_empty and F_empty; all but the first 0..1. seen and unseen are J&F in percent, None without rows. The
    chosen threshold is one of the points.
    """
    scores = rows["object_score"].to_numpy()
    levels = np.quantile(scores, np.linspace(0, 1, POINTS)) if len(scores) else np.empty(0)
    chosen = [threshold, *levels[levels > 0]]
    return {"threshold": threshold, "points": [_point(rows, level) for level in sorted(set(map(float, chosen)))]}


def _point(rows: pd.DataFrame, threshold: float) -> dict[str, float | None]:
    shown = rows["object_score"] >= threshold
    J, F = (rows[f"{name}_ungated"].where(shown, rows[f"{name}_empty"]) for name in "JF")
    S = rows["S_ungated"].where(shown, 0.0)[rows["null"].astype(bool)]
    point: dict[str, float | None] = {"threshold": round(threshold, 4), "S": _mean(S, 6)}
    for name, split in (("seen", "test_s"), ("unseen", "test_u")):
        part = (rows["split"] == split) & ~rows["null"].astype(bool)
        means = [_mean(100 * values[part], 4) for values in (J, F)]
        point[name] = None if None in means else round(sum(m for m in means if m is not None) / 2, 4)
    return point


def _mean(values: pd.Series, digits: int) -> float | None:
    mean = values.mean()
    return None if pd.isna(mean) else round(float(mean), digits)
