"""Inference that prompts the frame with the highest object score."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import NO_OBJ_SCORE

from samlove.config import InferConfig, Sam2Config
from samlove.features.encoders.sam2_image import Sam2ImageEncoder
from samlove.infer import Sources, _read, _track, infer, plan, prompt_frames
from samlove.micro import code
from samlove.micro.pretrain_sam2 import CONFIG
from samlove.model.checkpoint import load_model
from samlove.model.sam2 import LightSam2
from samlove.synth.scene import SECONDS, SEEN, Scene, render, sample_scene
from tests.test_infer import SIZE, Run
from tests.test_micro_sam2 import WEIGHTS

SIDE = 128


def predicted(run: Run, **settings) -> dict[str, np.ndarray]:
    config, sources = InferConfig(**settings), Sources.open(run.features)
    given = (run.checkpoint, sources, run.folder, config, SIZE, run.out, run.scratch, run.device)
    infer("test_s", run.rows, *given)
    return run.bins()


def scores_of(run: Run) -> dict[str, torch.Tensor]:
    """The object scores (T,) of each row, in the same batches as in `infer`."""
    model, sources = load_model(run.checkpoint), Sources.open(run.features)
    found = {}
    for media_id, jobs in plan(run.rows, []).items():
        _, embeds, inputs = _read(media_id, jobs, sources, run.folder)
        (given,) = inputs.values()
        with torch.no_grad():
            scores = model.sam2.object_scores(embeds, model.token(given.fusion))
        found |= dict(zip(given.row_ids, scores, strict=True))
    return found


def test_rows_whose_first_frame_is_best_are_as_if_it_were_prompted_by_choice(tmp_path):
    run = Run(tmp_path)
    first, best, scores = predicted(run), predicted(run, prompt_frame="best"), scores_of(run)
    assert {int(score.argmax()) == 0 for score in scores.values()} == {True, False}, "the case is trivial"
    for row, score in scores.items():
        differing = (first[row] != best[row]).mean()
        assert differing < 1e-3 if score.argmax() == 0 else differing > 0.01  # in another batch, last bits differ


def test_the_object_score_of_the_prompted_frame_decides_what_stays_empty(tmp_path):
    run = Run(tmp_path)
    highest = sorted(float(score.max()) for score in scores_of(run).values())
    threshold = (highest[3] + highest[4]) / 2
    run.save_checkpoint(threshold=threshold)
    scores = {row: score.max() for row, score in scores_of(run).items()}
    found = predicted(run, prompt_frame="best")
    assert sum(bool(bins.any()) for bins in found.values()) == len(found) - 4
    assert all(bool(bins.any()) == bool(scores[row] > threshold) for row, bins in found.items())


def test_the_first_frame_stays_the_prompt_of_the_true_mask(tmp_path):
    run = Run(tmp_path)
    masks = []
    for frame in ("first", "best"):
        predicted(run, prompt_frame=frame, controls=["true_mask"])
        masks.append(run.bins("true_mask"))
    assert all(np.array_equal(masks[0][row], masks[1][row]) for row in masks[0])


# --- with trained weights --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def micro() -> tuple[Sam2ImageEncoder, LightSam2]:
    config = Sam2Config(config=str(CONFIG), checkpoint=str(WEIGHTS), dtype="float32")
    return Sam2ImageEncoder(config, torch.device("cpu")), LightSam2.load(config.config, config.checkpoint)


def late_scenes(count: int) -> list[Scene]:
    """Scenes whose first thing appears late, and is the only one of its category and colour."""
    rng, found = np.random.default_rng(0), list[Scene]()
    while len(found) < count:
        scene = sample_scene(rng, SEEN, late=1.0)
        names = [(thing.category, thing.colour) for thing in scene.things]
        if scene.things[0].late and names.count(names[0]) == 1:
            found.append(scene)
    return found


def test_an_object_that_appears_late_is_found_from_its_best_frame(micro):
    """By a token that SAM 2's bundled weights understand: the object's category and colour."""
    encoder, light = micro
    click = light.sam_prompt_encoder.point_embeddings[1].weight.detach()
    overlaps: dict[str, list[float]] = {"first": [], "best": []}
    for scene in late_scenes(8):
        drawn = [render(scene, t, (SIDE, SIDE)) for t in range(SECONDS)]
        truth = np.stack([masks[0] for _, masks in drawn])
        frames = torch.from_numpy(np.stack([picture for picture, _ in drawn])).permute(0, 3, 1, 2)
        (arrays,) = encoder.encode([frames])
        embeds = {name: torch.from_numpy(array) for name, array in arrays.items()}
        meant = code.meaning([scene.things[0].category, scene.things[0].colour])
        for prompt, found in overlaps.items():
            token = torch.from_numpy(meant)[None, None] + click
            score, prompted = prompt_frames(light, embeds, token, InferConfig(prompt_frame=prompt))
            logits = _track(light, embeds, token, prompted)
            logits[score < 0] = NO_OBJ_SCORE
            masks = F.interpolate(logits, (SIDE, SIDE), mode="bilinear", align_corners=False)[0].numpy() > 0
            assert prompt == "first" or (masks & truth).any()
            found.append((masks & truth).sum() / (masks | truth).sum())
    assert np.mean(overlaps["best"]) > np.mean(overlaps["first"]) + 0.3
