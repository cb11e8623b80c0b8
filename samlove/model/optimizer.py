"""The optimiser and its learning-rate schedule (section 4.1)."""

from collections.abc import Mapping

import torch

from samlove.config import TrainConfig


def build_optimizer(parameters: Mapping[str, torch.nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with two parameter groups: the fusion module, and SAM 2, which learns at `sam2_lr_scale` of the rate.

    parameters: those to train, by their names in SamLove. The rate is 0 until `set_learning_rate` is called.
    """
    groups = [
        {
            "params": [p for name, p in parameters.items() if name.startswith("sam2.") == of_sam2],
            "scale": config.sam2_lr_scale if of_sam2 else 1.0,
        }
        for of_sam2 in (False, True)
    ]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of each group to `rate` times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = group["scale"] * rate


def warmup_decay(step: int, total: int, warmup: int) -> float:
    """The fraction of the peak learning rate at a step, counted from 0: DeepSpeed's WarmupDecayLR, section 4.1.

    Rises linearly to 1 over `warmup` steps, then falls linearly to 0 at `total`. Two differences from DeepSpeed: its
    default warm-up is logarithmic, and its first step has rate 0, which wastes that step.
    """
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))
