"""J, F and S as the code of Ref-AVS Bench computes them, from one histogram per frame.

Source: the Ref-AVS Bench evaluation (GeWu-Lab/Ref-AVS). Differences: one pass over a histogram
evaluates all 255 thresholds of F, instead of 255 passes; each expression is scored by itself, unless the caller joins
the frames of a batch.

A logit falls into one of 256 bins, which have an edge at every value at which a metric decides: the 254 positive
thresholds of F, and the 0.4 of J. J and F from bins are therefore exactly those from logits. S uses the threshold 0.5
of F, so it differs only for pixels whose sigmoid is exactly 0.5.

Letters: T frames, H and W height and width of a mask.
"""

from typing import NamedTuple

import numpy as np
import torch

from samlove.errors import SamloveError

BINS = 256
JACCARD_THRESHOLD = 0.4
NULL_THRESHOLD = 0.5
BETA_SQUARED = 0.3

THRESHOLDS = np.linspace(0, 1 - 1e-10, 255).astype(np.float32)  # of F; a pixel is foreground at or above each
# J counts pixels above 0.4, F pixels at or above a threshold. One "at or above" rule serves both if the edge of J is
# the next float after 0.4.
_JACCARD_EDGE = np.nextafter(np.float32(JACCARD_THRESHOLD), np.float32(1))
EDGES = np.sort(np.append(THRESHOLDS[1:], _JACCARD_EDGE)).astype(np.float32)  # (255,); bin = count of edges at or below

# First foreground bin: for each threshold of F (255,), for J, and for S.
THRESHOLD_BINS = np.searchsorted(EDGES, THRESHOLDS, side="right")
JACCARD_BIN = int(np.searchsorted(EDGES, _JACCARD_EDGE, side="right"))
NULL_BIN = int(np.searchsorted(EDGES, np.float32(NULL_THRESHOLD), side="right"))

# Looking up a bin by cell is 8 times faster than searching the edges. 0..1 has 1024 cells, each narrower than the
# smallest distance between two edges: a cell determines the bin, except for the one edge that may lie in it.
_CELLS = 1024
_CELL_BINS = torch.from_numpy(np.searchsorted(EDGES, np.arange(_CELLS + 1) / _CELLS, side="right").astype(np.uint8))
_NEXT_EDGE = torch.from_numpy(np.append(EDGES, np.float32(np.inf)))  # (256,) by bin

Array = np.ndarray | torch.Tensor


class Scores(NamedTuple):
    """J, F and S as fractions; F is NaN if no frame has a target."""

    J: float
    F: float
    S: float


def quantise(logits: Array) -> np.ndarray:
    """Bins of mask logits: uint8 of the same shape, 0..255: the number of EDGES that the sigmoid reaches.

    Any float dtype, any device; computed in float32. Raises SamloveError if a logit is NaN.
    """
    probabilities = torch.as_tensor(logits).detach().float().sigmoid()
    if torch.isnan(probabilities).any():
        raise SamloveError(f"mask logits of shape {tuple(probabilities.shape)}: expected numbers, found NaN")
    device = probabilities.device
    below = _CELL_BINS.to(device).take((probabilities * _CELLS).long())
    bins = below + (probabilities >= _NEXT_EDGE.to(device).take(below.long()))
    return bins.cpu().numpy()


def histogram(bins: np.ndarray, target: Array) -> np.ndarray:
    """Pixel counts by frame, target and bin: (T, 2, 256) int64. J, F and S need nothing else.

    bins: (T, H, W) uint8 from `quantise`. target: (T, H, W) bool, True on the object.
    Histograms of several expressions, joined along T, score as the benchmark scores a batch of them.
    Raises SamloveError if the shapes differ.
    """
    target = np.asarray(target, dtype=bool)
    if bins.ndim != 3 or bins.shape != target.shape:
        raise SamloveError(f"expected masks and targets of one shape (T, H, W), found {bins.shape} and {target.shape}")
    places = target.astype(np.uint16) * np.uint16(BINS) + bins  # (T, H, W)
    # bincount converts to int64, which is faster for one frame at a time.
    counts = [np.bincount(frame.ravel(), minlength=2 * BINS) for frame in places]
    return np.array(counts, dtype=np.int64).reshape(len(bins), 2, BINS)


def jaccard_of(counts: np.ndarray) -> float:
    """J of a histogram (T, 2, 256): mean over frames; without a target, the fraction of correctly empty pixels."""
    return float(overlaps(counts[:, :, JACCARD_BIN:].sum(-1), counts.sum(-1)).mean())


def overlaps(foreground: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """J of each frame, (T,), from its foreground and all its pixels, (T, 2) each: outside and inside of the target."""
    target = pixels[:, 1]
    overlap = foreground[:, 1] / (foreground[:, 0] + target + 1e-7)
    rightly_empty = (pixels[:, 0] - foreground[:, 0]) / pixels.sum(-1)
    return np.where(target > 0, overlap, rightly_empty)


def f_curve_of(counts: np.ndarray) -> np.ndarray:
    """F of a histogram at every threshold, (255,), averaged over the frames with a target; NaN if none has one."""
    counts = counts[counts[:, 1].sum(-1) > 0]
    if not len(counts):
        return np.full(len(THRESHOLDS), np.nan)
    at_or_above = counts[:, :, ::-1].cumsum(-1)[:, :, ::-1][:, :, THRESHOLD_BINS]  # (T, 2, 255)
    return f_curves(at_or_above, counts[:, 1].sum(-1)).mean(0)


def f_curves(at_or_above: np.ndarray, target: np.ndarray) -> np.ndarray:
    """F of each frame at every threshold, (T, 255).

    at_or_above: pixels at or above each threshold, (T, 2, 255), outside and inside of the target. target: (T,) its
    pixels, more than 0.
    """
    hits = at_or_above[:, 1]
    precision = hits / (at_or_above.sum(1) + 1e-20)  # (T, 255)
    recall = hits / (target[:, None] + 1e-20)  # (T, 255)
    weighted = BETA_SQUARED * precision + recall
    # 0/0 (no pixel hit) is NaN in Ref-AVS Bench's code, which replaces it by 0.
    return np.divide((1 + BETA_SQUARED) * precision * recall, weighted, out=np.zeros_like(recall), where=weighted > 0)


def f_score_of(counts: np.ndarray) -> float:
    """F of a histogram (T, 2, 256): the maximum of its curve; NaN if no frame has a target."""
    return float(f_curve_of(counts).max())


def null_score_of(counts: np.ndarray) -> float:
    """S of a histogram (T, 2, 256): square root of the fraction of foreground pixels over all frames."""
    return float(np.sqrt(counts[:, :, NULL_BIN:].sum() / counts.sum()))


def scores_of(counts: np.ndarray) -> Scores:
    """J, F and S of a histogram (T, 2, 256)."""
    return Scores(jaccard_of(counts), f_score_of(counts), null_score_of(counts))


def scores_from_bins(bins: np.ndarray, target: Array) -> Scores:
    """J, F and S of stored bins (T, H, W) uint8 against targets (T, H, W) bool."""
    return scores_of(histogram(bins, target))


def jaccard(logits: Array, target: Array) -> float:
    """J in 0..1 of mask logits (T, H, W) against targets (T, H, W) bool; foreground: the sigmoid exceeds 0.4."""
    return jaccard_of(histogram(quantise(logits), target))


def f_score(logits: Array, target: Array) -> float:
    """F in 0..1 of mask logits (T, H, W) against targets (T, H, W) bool; NaN (no score) if no frame has a target."""
    return f_score_of(histogram(quantise(logits), target))


def null_score(logits: Array) -> float:
    """S in 0..1 of mask logits (T, H, W): square root of the fraction of pixels with a sigmoid above 0.5. 0 is best."""
    return float((torch.as_tensor(logits).detach().float().sigmoid() > NULL_THRESHOLD).double().mean().sqrt())
