"""The mask loss of section 3.3 (Eq. 5), one value per sample so that errors can name the sample."""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from samlove.config import LossConfig
from samlove.model.sam2 import FirstFrame

DICE_SMOOTHING = 1.0  # prevents 0/0 on empty masks; as in SAM's training


class Losses(NamedTuple):
    """Each (B,) float32. Only `total` is weighted."""

    total: Tensor
    bce: Tensor
    dice: Tensor
    object_score: Tensor


def upsample(mask_logits: Tensor, size: int) -> Tensor:
    """Low-resolution logits (B,M,h,w) to (B,M,size,size) float32, bilinearly, as SAM 2 resizes masks to frame size.

    Two products with a matrix: on a CPU, torch's own bilinear interpolation takes four times as long with its gradient.
    """
    height, width = (_bilinear(side, size, mask_logits.device) for side in mask_logits.shape[-2:])
    with torch.autocast(mask_logits.device.type, enabled=False):
        return height @ mask_logits.float() @ width.T


@cache
def _bilinear(side: int, size: int, device: torch.device) -> Tensor:
    """The matrix (size,side) that resizes `side` values to `size`. Cached on its device, because copying it waits."""
    matrix = F.interpolate(torch.eye(side)[None, None], (size, side), mode="bilinear", align_corners=False)[0, 0]
    return matrix.to(device)


def mask_loss(answer: FirstFrame, mask: Tensor, config: LossConfig) -> Losses:
    """Eq. 5 on the first frame.

    mask (B,S,S) is float, 0 or 1. BCE is the mean over the pixels of the upsampled logits. Dice is
    1 - (2|pm| + 1) / (|p| + |m| + 1). The target of the object score's BCE is whether the mask has any pixel; its
    weight is 0 in the paper's configuration. If it has a weight, an empty mask counts for the object score only, as in
    SAM 2's training (sam2, training/loss_fns.py): the object score says whether the target is there, the mask where.

    Of several masks, only the one with the lowest loss counts, and the expected IoU of all of them is compared with
    their true IoU (L1), as in SAM 2's training.
    """
    logits = upsample(answer.masks, mask.shape[-1]).flatten(2)  # (B,M,S*S)
    target = mask.float().flatten(1)[:, None].expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(2)  # (B,M)
    p = logits.sigmoid()
    dice = 1 - (2 * (p * target).sum(2) + DICE_SMOOTHING) / (p.sum(2) + target.sum(2) + DICE_SMOOTHING)
    present = target[:, 0].amax(1)
    score = F.binary_cross_entropy_with_logits(answer.object_score.float(), present, reduction="none")
    of_masks = config.bce * bce + config.dice * dice
    if of_masks.shape[1] == 1:
        bce, dice, total = bce[:, 0], dice[:, 0], of_masks[:, 0]
    else:
        best = of_masks.argmin(1, keepdim=True)
        bce, dice, total = (values.gather(1, best)[:, 0] for values in (bce, dice, of_masks))
        total = total + (answer.iou - _iou(logits > 0, target > 0)).abs().mean(1)
    if config.object_score:
        total = total * present
    return Losses(total + config.object_score * score, bce, dice, score)


def _iou(found: Tensor, target: Tensor) -> Tensor:
    """IoU of masks, bool (B,M,pixels) each -> (B,M); 1 if both are empty."""
    union = (found | target).sum(2)
    return torch.where(union > 0, (found & target).sum(2) / union.clamp(min=1), 1.0)
