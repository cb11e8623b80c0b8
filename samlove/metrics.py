"""The metrics of Ref-AVS Bench under their public name; the code is in samlove.scoring.metrics."""

from samlove.scoring.metrics import f_score, jaccard, null_score

__all__ = ["f_score", "jaccard", "null_score"]
