import math

import pytest
import torch

from samlove.config import LossConfig
from samlove.model.loss import mask_loss, upsample
from samlove.model.sam2 import FirstFrame


def single(logits: torch.Tensor, score: torch.Tensor) -> FirstFrame:
    return FirstFrame(logits[:, None], score, torch.ones(len(score), 1))


def test_the_loss_is_bce_plus_dice_computed_by_hand():
    logits = torch.tensor([[[0.0, math.log(3)], [-math.log(3), 0.0]]])  # probabilities 1/2, 3/4, 1/4, 1/2
    mask = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    losses = mask_loss(single(logits, torch.zeros(1)), mask, LossConfig(bce=2.0, dice=3.0, object_score=4.0))
    bce = -(math.log(1 / 2) + math.log(3 / 4) + math.log(3 / 4) + math.log(1 / 2)) / 4
    dice = 1 - (2 * 1.25 + 1) / (2 + 2 + 1)
    torch.testing.assert_close(losses.bce, torch.tensor([bce]))
    torch.testing.assert_close(losses.dice, torch.tensor([dice]))
    torch.testing.assert_close(losses.object_score, torch.tensor([math.log(2)]))
    torch.testing.assert_close(losses.total, torch.tensor([2 * bce + 3 * dice + 4 * math.log(2)]))


def test_a_samples_loss_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    logits, score = torch.randn(3, 8, 8), torch.randn(3)
    mask = (torch.rand(3, 32, 32) > 0.5).float()
    together = mask_loss(single(logits, score), mask, LossConfig()).total
    alone = torch.cat(
        [mask_loss(single(logits[b : b + 1], score[b : b + 1]), mask[b : b + 1], LossConfig()).total for b in range(3)]
    )
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_an_empty_mask_is_left_to_the_object_score_if_that_is_trained(weight):
    logits = torch.randn(2, 1, 8, 8, requires_grad=True)
    score = torch.zeros(2, requires_grad=True)
    mask = torch.stack([torch.zeros(16, 16), torch.ones(16, 16)])
    mask_loss(single(logits, score), mask, LossConfig(object_score=weight)).total.sum().backward()
    assert logits.grad is not None and score.grad is not None
    moved = [bool(logits.grad[b].any()) for b in range(2)]
    assert moved == [weight == 0, True] and bool(score.grad.all()) == (weight > 0)


@pytest.mark.parametrize("full", [0.0, 1.0])
def test_a_correct_answer_has_no_loss_on_empty_and_full_masks(full):
    mask = torch.full((1, 16, 16), full)
    sure = torch.full((1, 4, 4), 40.0 if full else -40.0)
    config = LossConfig(object_score=1.0)
    right = mask_loss(single(sure, sure[:, 0, 0]), mask, config).total
    wrong = mask_loss(single(-sure, -sure[:, 0, 0]), mask, config).total
    assert right.item() < 1e-6 and wrong.item() > 1


def test_the_object_score_gets_a_gradient_only_if_it_has_a_weight():
    logits, mask = torch.randn(2, 8, 8), torch.zeros(2, 16, 16)
    for weight in (0.0, 0.5):
        score = torch.zeros(2, requires_grad=True)
        mask_loss(single(logits, score), mask, LossConfig(object_score=weight)).total.sum().backward()
        torch.testing.assert_close(score.grad, torch.full((2,), 0.5 * weight))  # an empty mask lowers it


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(2, 8, 8)
    losses = mask_loss(single(logits.bfloat16(), torch.zeros(2).bfloat16()), torch.ones(2, 16, 16), LossConfig())
    assert all(loss.dtype == torch.float32 for loss in losses)


def test_upsampling_equals_sam2s():
    logits = torch.randn(2, 8, 8)
    expected = torch.nn.functional.interpolate(logits[:, None], (32, 32), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(upsample(logits[:, None], 32)[:, 0], expected, rtol=0, atol=1e-6)


def test_of_three_masks_only_the_best_is_trained_and_every_expected_iou_is():
    mask = torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    right = torch.where(mask > 0, 5.0, -5.0)[0]
    masks = torch.stack([-right, right, torch.full_like(right, 5.0)])[None].requires_grad_()
    iou = torch.tensor([[0.25, 0.25, 0.25]], requires_grad=True)
    losses = mask_loss(FirstFrame(masks, torch.zeros(1), iou), mask, LossConfig())
    alone = mask_loss(single(right[None], torch.zeros(1)), mask, LossConfig()).total
    torch.testing.assert_close(losses.total, alone + (0.25 + 0.75 + 0.25) / 3)  # true IoU: 0, 1, 1/2
    losses.total.sum().backward()
    assert masks.grad is not None and [bool(part.any()) for part in masks.grad[0]] == [False, True, False]
    torch.testing.assert_close(iou.grad, torch.tensor([[1.0, -1.0, -1.0]]) / 3)
