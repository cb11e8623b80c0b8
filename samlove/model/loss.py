"""The mask loss of section 3.3 (Eq. 5), one value per sample so that errors can name the sample."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from samlove.config import LossConfig

DICE_SMOOTHING = 1.0  # prevents 0/0 on empty masks; as in SAM's training


class Losses(NamedTuple):
    """Each (B,) float32. Only `total` is weighted."""

    total: Tensor
    bce: Tensor
    dice: Tensor
    object_score: Tensor


def upsample(mask_logits: Tensor, size: int) -> Tensor:
    """Low-resolution logits (B,h,w) to (B,size,size) float32, bilinearly, as SAM 2 resizes masks to frame size."""
    return F.interpolate(mask_logits.float()[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]


def mask_loss(mask_logits: Tensor, object_score: Tensor, mask: Tensor, config: LossConfig) -> Losses:
    """Eq. 5 on the first frame.

    mask_logits (B,h,w) and object_score (B,) are raw logits; mask (B,S,S) is float, 0 or 1. BCE is the mean over the
    pixels of the upsampled logits. Dice is 1 - (2|pm| + 1) / (|p| + |m| + 1). The target of the object score's BCE is
    whether the mask has any pixel; its weight is 0 in the paper's configuration.
    """
    logits = upsample(mask_logits, mask.shape[-1]).flatten(1)  # (B,S*S)
    target = mask.float().flatten(1)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
    p = logits.sigmoid()
    dice = 1 - (2 * (p * target).sum(1) + DICE_SMOOTHING) / (p.sum(1) + target.sum(1) + DICE_SMOOTHING)
    present = target.amax(1)
    score = F.binary_cross_entropy_with_logits(object_score.float(), present, reduction="none")
    total = config.bce * bce + config.dice * dice + config.object_score * score
    return Losses(total, bce, dice, score)
