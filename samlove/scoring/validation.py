"""Scores of the validation samples: single frames, each with the mask that its token prompts there."""

import numpy as np

from samlove.scoring.metrics import scores_from_bins
from samlove.scoring.presence import choose_threshold

SELECTED_BY = "J&F"  # the score that selects the best epoch
FIELDS = ("J", "F", "S", "J_empty", "object_score")


def score_frame(bins: np.ndarray, target: np.ndarray, object_score: float) -> tuple[float, ...]:
    """FIELDS of one sample: fractions, F is NaN without a target, J_empty is the J of an empty mask.

    bins (H,W) uint8, as from samlove.scoring.metrics.quantise; target (H,W) bool.
    """
    J, F, S = scores_from_bins(bins[None], target[None])
    return J, F, S, float(not target.any()), object_score


def average(samples: np.ndarray, frames: int, presence: bool) -> dict[str, float]:
    """J, F and J&F in percent, as means over the samples; F over those with a target.

    samples: (n, 5), FIELDS of each; those of one expression, `frames` of them, follow each other. If there is no target
    at all, F and J&F are undefined and left out.
    presence: choose the threshold of the object score, returned as `threshold`, and score with it: masks of
    expressions whose highest object score is below it count as empty. S is then the mean over the expressions without a
    target, a fraction; it is left out if there are none.
    """
    if not len(samples):
        return {"J": float("nan")}
    J, F, S, J_empty, object_score = samples.T.reshape(len(FIELDS), -1, frames)  # (expressions, frames) each
    scores = {}
    if presence:
        null = np.isnan(F).all(1)
        score, S = object_score.max(1), np.sqrt((S**2).mean(1))
        kept, gated = (np.where(null, np.nan, values.mean(1)) for values in (J, J_empty))
        scores["threshold"] = choose_threshold(score, kept, gated, np.where(null, S, np.nan))
        shown = score >= scores["threshold"]
        J, F = np.where(shown[:, None], J, J_empty), np.where(shown[:, None] | np.isnan(F), F, 0.0)
        if null.any():
            scores["S"] = float(np.where(shown, S, 0.0)[null].mean())
    scores["J"] = 100 * float(J.mean())
    if not np.isnan(F).all():
        scores["F"] = 100 * float(np.nanmean(F))
        scores[SELECTED_BY] = (scores["J"] + scores["F"]) / 2
    return scores
