"""How much faster the histogram is than a plain loop over the 255 thresholds of F, measured in one run.

The loop is the benchmark's way of computing (float32, one pass a threshold), written out plainly; the tests hold
the metrics against it.
"""

import json
import time
from collections.abc import Callable
from statistics import median

import torch

from samlove.scoring.metrics import BETA_SQUARED, f_score

FRAMES, SIZE = 10, 256  # one expression of Ref-AVS
ROUNDS = 5


def loop_f_score(logits: torch.Tensor, target: torch.Tensor) -> float:
    """F of logits (T, H, W) against targets (T, H, W) bool by 255 passes; NaN where no frame has a target."""
    seen = target.flatten(1).any(1)
    probabilities, truth = logits[seen].float().sigmoid(), target[seen].float()
    if not len(truth):
        return float("nan")
    curve = torch.zeros(255)
    for i, threshold in enumerate(torch.linspace(0, 1 - 1e-10, 255)):
        foreground = (probabilities >= threshold).float()
        hits = (foreground * truth).sum((1, 2))  # (T,)
        precision = hits / (foreground.sum((1, 2)) + 1e-20)
        recall = hits / (truth.sum((1, 2)) + 1e-20)
        f = (1 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall)
        curve[i] = f.nan_to_num(0).mean()
    return curve.max().item()


def loop_jaccard(logits: torch.Tensor, target: torch.Tensor) -> float:
    """J of logits (T, H, W) against targets (T, H, W) bool, frame by frame."""
    scores = []
    for foreground, truth in zip(logits.float().sigmoid() > 0.4, target, strict=True):
        if truth.any():
            scores.append(((foreground & truth).sum() / ((foreground | truth).sum() + 1e-7)).item())
        else:
            scores.append((~foreground).float().mean().item())
    return sum(scores) / len(scores)


def loop_null_score(logits: torch.Tensor) -> float:
    """S of logits (T, H, W)."""
    foreground = logits.float().sigmoid() > 0.5
    return (foreground.sum() / foreground.numel()).sqrt().item()


def _seconds(score: Callable[[torch.Tensor, torch.Tensor], float], *masks: torch.Tensor) -> float:
    start = time.perf_counter()
    score(*masks)
    return time.perf_counter() - start


def run() -> dict:
    """Times F of one expression at Ref-AVS's size both ways, in turns; prints the result, last line one JSON object.

    Returns it: milliseconds of each (median of the rounds), their ratio, and the difference of the two scores.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(FRAMES, SIZE, SIZE, generator=generator) * 4
    target = logits + torch.randn(FRAMES, SIZE, SIZE, generator=generator) * 4 > 3
    difference = abs(f_score(logits, target) - loop_f_score(logits, target))  # also the warm-up
    histogram, loop = [], []
    for _ in range(ROUNDS):
        histogram.append(_seconds(f_score, logits, target))
        loop.append(_seconds(loop_f_score, logits, target))
    result = {
        "bench": "metrics",
        "frames": FRAMES,
        "size": SIZE,
        "rounds": ROUNDS,
        "threads": torch.get_num_threads(),
        "histogram_ms": round(median(histogram) * 1e3, 2),
        "loop_ms": round(median(loop) * 1e3, 2),
        "ratio": round(median(loop) / median(histogram), 1),
        "difference": difference,
    }
    print(f"F of one expression, {FRAMES} frames of {SIZE}x{SIZE}, {result['threads']} thread(s), median of {ROUNDS}:")
    print(f"  histogram {result['histogram_ms']:.2f} ms, plain loop {result['loop_ms']:.1f} ms: ", end="")
    print(f"{result['ratio']:.0f} times faster; the scores differ by {difference:.1e}")
    print(json.dumps(result))
    return result
