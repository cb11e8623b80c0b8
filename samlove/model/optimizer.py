"""The optimiser and its learning-rate schedule (section 4.1)."""

from collections.abc import Mapping

import torch

from samlove.config import TrainConfig


class Optimizers:
    """Optimisers of different parameters, used as one: their groups together, and one state for all parameters."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        self.state = parts[0].state
        for part in parts[1:]:
            part.state = self.state

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


def build_optimizer(parameters: Mapping[str, torch.nn.Parameter], config: TrainConfig) -> Optimizers:
    """AdamW (the paper's) for all parameters or, with `optimizer: muon`, for all but the fusion module's matrices.

    parameters: those to train, by their names in SamLove. SAM 2 learns at `sam2_lr_scale` of the rate. The rate is 0
    until `set_learning_rate` is called.

    Muon (https://kellerjordan.github.io/posts/muon) makes the update of a matrix orthogonal, so that rare directions
    learn as fast as common ones. Its updates are scaled to the size of AdamW's (arXiv:2502.16982), so that both learn
    at one rate.
    """
    groups: dict[str, list[torch.nn.Parameter]] = {"sam2": [], "fusion": [], "matrices": []}
    for name, parameter in parameters.items():
        matrix = config.optimizer == "muon" and name.endswith(".weight") and parameter.ndim == 2
        group = "sam2" if name.startswith("sam2.") else "matrices" if matrix else "fusion"
        groups[group].append(parameter)
    decay = config.weight_decay
    adamw = torch.optim.AdamW(
        [
            {"params": groups["fusion"], "scale": 1.0},
            {"params": groups["sam2"], "scale": config.sam2_lr_scale},
        ],
        lr=0.0,
        weight_decay=decay,
        fused=True,
    )
    if not groups["matrices"]:
        return Optimizers(adamw)
    matrices = {"params": groups["matrices"], "scale": 1.0}
    muon = torch.optim.Muon([matrices], lr=0.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return Optimizers(adamw, muon)


def set_learning_rate(optimizer: Optimizers, rate: float) -> None:
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
