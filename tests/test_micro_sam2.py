"""The micro profile's SAM 2: its configuration, its bundled weights, and the script that trains them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

import samlove.model.torchvision_ops  # noqa: F401
from samlove.micro import code, pretrain_sam2
from samlove.micro.clips import absent, augment, describe, draw_clip, name_map
from samlove.model.sam2_build import instantiate_sam2, load_sam2_weights

WEIGHTS = Path(__file__).parents[1] / "weights" / "micro" / "sam2" / "sam2.safetensors"


@pytest.fixture(scope="module")
def micro_sam2() -> torch.nn.Module:
    model = instantiate_sam2(str(pretrain_sam2.CONFIG))
    load_sam2_weights(model, str(WEIGHTS))
    return model


def test_weights_fit_the_configuration_and_are_small():
    model = instantiate_sam2(str(pretrain_sam2.CONFIG))
    assert set(load_file(WEIGHTS)) == set(model.state_dict())
    assert WEIGHTS.stat().st_size < 16e6


def test_the_official_builder_accepts_the_configuration():
    from sam2.build_sam import build_sam2_video_predictor

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(pretrain_sam2.CONFIG.parent), version_base=None):
        predictor = build_sam2_video_predictor("sam2_micro.yaml", device="cpu", apply_postprocessing=False)
    load_sam2_weights(predictor, str(WEIGHTS))
    assert predictor.image_size == pretrain_sam2.SIDE


def test_bundled_weights_segment_and_track(micro_sam2):
    scores = pretrain_sam2.evaluate(micro_sam2, 6, seed=77)
    assert scores["mask_J"] > scores["copy_J"] + 0.25
    assert scores["point_J"] > scores["copy_J"] + 0.2
    assert scores["box_J0"] > 0.7


def test_an_empty_prompt_finds_no_object(micro_sam2):
    rng = np.random.default_rng(78)
    clips = [draw_clip(rng) for _ in range(6)]
    images = pretrain_sam2.images_tensor(np.stack([clip.frames[:3] for clip in clips]))
    nothing = torch.zeros(6, 1, pretrain_sam2.SIDE, pretrain_sam2.SIDE)
    with torch.no_grad():
        steps = pretrain_sam2.track(micro_sam2, images, list(range(6)), pretrain_sam2.Prompt(masks=nothing))
    assert all(float((step["masks"] > 0).float().mean()) < 0.01 for step in steps)


def test_a_clip_drawn_twice_as_large_has_the_same_format():
    rng = np.random.default_rng(0)
    for _ in range(4):
        clip = draw_clip(rng)
        assert clip.frames.shape == (10, 128, 128, 3) and clip.frames.dtype == np.uint8
        assert clip.masks.shape[1:] == (10, 128, 128) and clip.masks.dtype == bool
        assert len(clip.masks) == len(clip.names) == len(clip.pulsing)


def test_a_description_fits_one_object_and_an_absent_one_fits_none():
    rng = np.random.default_rng(1)
    for _ in range(20):
        clip = augment(rng, draw_clip(rng), 1)
        shown = [k for k in range(len(clip.masks)) if clip.masks[k, 0].any()]
        cells = name_map(clip, 8).reshape(64, -1)  # the code of each cell
        for k in shown:
            meant = describe(rng, clip, k)
            if meant[code.WHERE].any():
                continue  # words alone cannot describe it
            asked = meant[code.SEEN_OF]
            owners = {tuple(cell) for cell in cells if (cell >= asked).all()}
            assert len(owners) <= 1  # none if the object owns no cell
        asked = absent(rng, clip)[code.SEEN_OF]
        assert not any((cell >= asked).all() for cell in cells)


def test_a_code_prompts_the_object_that_it_describes(micro_sam2):
    scores = pretrain_sam2.evaluate(micro_sam2, 12, seed=79)
    assert scores["code_J0"] > scores["copy_J"] + 0.25


def test_loss_falls_for_correct_masks_and_jaccard_counts_empty_as_correct():
    truth = torch.zeros(2, 1, 128, 128)
    truth[0, 0, 32:64, 32:64] = 1  # target 1 is absent
    right = torch.nn.functional.avg_pool2d(truth[:, 0, None], 4) * 20 - 10
    sure, wrong = torch.tensor([[9.0], [-9.0]]), torch.tensor([[-9.0], [9.0]])

    def loss(masks: torch.Tensor, score: torch.Tensor) -> float:
        step = {"raw": masks, "score": score, "iou": torch.ones(2, 1), "masks": masks}
        return float(pretrain_sam2.loss_of([step], truth))

    assert loss(right, sure) < 0.1 < loss(right, wrong) < loss(-right, wrong)
    assert pretrain_sam2.jaccard(right, truth[:, 0] > 0).tolist() == pytest.approx([1.0, 1.0], abs=0.05)


@pytest.mark.slow
def test_a_run_resumes_from_its_checkpoint(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pretrain_sam2, "CHECKPOINT_EVERY", 0)
    monkeypatch.setattr(pretrain_sam2, "SCORE_EVERY", 1e9)
    pretrain_sam2.pretrain(tmp_path, minutes=0.03, seed=3, scored_clips=2)
    first = json.loads((tmp_path / "scores.json").read_text())
    pretrain_sam2.pretrain(tmp_path, minutes=0.06, seed=3, scored_clips=2)
    second = json.loads((tmp_path / "scores.json").read_text())
    assert second["steps"] > first["steps"] > 0
    assert second["copy_J"] == first["copy_J"]  # the same two clips
    assert set(load_file(tmp_path / "sam2.safetensors")) == set(load_file(WEIGHTS))
