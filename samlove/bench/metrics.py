"""How much faster the histogram is than a plain loop over the 255 thresholds of F.

The loop computes as the code of Ref-AVS Bench does (float32, one pass per threshold), written out plainly; the tests
compare the metrics with it.
"""

import json
from functools import partial
from statistics import median

import torch

from samlove.bench.timing import in_turns, timed
from samlove.scoring.metrics import BETA_SQUARED, f_score

FRAMES, SIZE = 10, 256  # one expression of Ref-AVS
ROUNDS = 5


def loop_f_score(logits: torch.Tensor, target: torch.Tensor) -> float:
    """F of logits (T, H, W) against targets (T, H, W) bool in 255 passes; NaN if no frame has a target."""
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


def run() -> dict:
    """Time F of one expression at Ref-AVS's size both ways. Prints the result, the last line as one JSON object.

    Returns the result: milliseconds of both (median of the rounds), their ratio, and the difference of the two scores.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(FRAMES, SIZE, SIZE, generator=generator) * 4
    target = logits + torch.randn(FRAMES, SIZE, SIZE, generator=generator) * 4 > 3
    difference = abs(f_score(logits, target) - loop_f_score(logits, target))  # also the warm-up
    scores = {"histogram": f_score, "loop": loop_f_score}
    times = in_turns({name: partial(timed, partial(score, logits, target)) for name, score in scores.items()}, ROUNDS)
    histogram, loop = (median(spent.wall for spent in times[name]) for name in scores)
    result = {
        "bench": "metrics",
        "frames": FRAMES,
        "size": SIZE,
        "rounds": ROUNDS,
        "threads": torch.get_num_threads(),
        "histogram_ms": round(histogram * 1e3, 2),
        "loop_ms": round(loop * 1e3, 2),
        "ratio": round(loop / histogram, 1),
        "difference": difference,
    }
    print(f"F of one expression, {FRAMES} frames of {SIZE}x{SIZE}, {result['threads']} thread(s), median of {ROUNDS}:")
    print(f"  histogram {result['histogram_ms']:.2f} ms, plain loop {result['loop_ms']:.1f} ms: ", end="")
    print(f"{result['ratio']:.0f} times faster; the scores differ by {difference:.1e}")
    print(json.dumps(result))
    return result
