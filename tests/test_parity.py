"""The light SAM 2 on precomputed embeddings against the official SAM2VideoPredictor: same weights, frames, prompts.

Run with `-s` to see the measured maxima.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from samlove.config import Sam2Config
from samlove.features.encoders.sam2_image import Sam2ImageEncoder
from samlove.model.sam2 import LightSam2, Points
from tests.official_sam2 import (
    TINY,
    live_embeds,
    official_logits,
    official_predictor,
    random_checkpoint,
    write_clip,
)

TOLERANCE = 1e-3  # mask logits, fp32
FRAMES = 10
SEEDS = range(4)
LABELS = torch.tensor([[1, 0], [1, 1]])  # two clicks per object


class Case:
    """One video with two objects, for both implementations."""

    def __init__(self, folder: Path, seed: int, config: str = TINY, frames: int = FRAMES):
        self.checkpoint = random_checkpoint(folder / "sam2.pt", seed, config)
        self.masks = torch.from_numpy(write_clip(folder / "clip", seed, frames))  # (2, H, W)
        self.frames = sorted((folder / "clip").iterdir())
        self.official = official_predictor(self.checkpoint, config)
        self.state = self.official.init_state(str(folder / "clip"))
        self.light = LightSam2.load(config, str(self.checkpoint))
        self.embeds = live_embeds(self.official, self.state)
        generator = torch.Generator().manual_seed(seed)
        self.clicks = torch.rand(2, 2, 2, generator=generator)  # (B, P, 2), x and y in 0..1
        self.token = torch.randn(2, 1, self.light.prompt_dim, generator=generator)  # (B, 1, D)

    def click(self, object_: int, points: int) -> None:
        size = torch.tensor([self.state["video_width"], self.state["video_height"]])
        clicks, labels = self.clicks[object_, :points] * size, LABELS[object_, :points]
        self.official.add_new_points_or_box(self.state, 0, object_, points=clicks, labels=labels)

    def mask(self, object_: int) -> None:
        self.official.add_new_mask(self.state, 0, object_, self.masks[object_])

    def put_token(self, object_: int) -> None:
        """Append the token to the sparse embeddings of the official "no point"; use the single mask."""
        predictor, token = self.official, self.token[object_ : object_ + 1]
        hook = predictor.sam_prompt_encoder.register_forward_hook(
            lambda module, inputs, out: (torch.cat([out[0], token], dim=1), out[1])
        )
        multimask, predictor.multimask_output_in_sam = predictor.multimask_output_in_sam, False
        predictor.add_new_points_or_box(self.state, 0, object_, points=torch.zeros(1, 2), labels=torch.tensor([-1]))
        predictor.multimask_output_in_sam = multimask
        hook.remove()

    def compare(self, prompt, **ours) -> tuple[Tensor, Tensor]:
        """The official logits (B, T, H, W), and the largest difference in each frame over all objects and pixels."""
        expected = official_logits(self.official, self.state, prompt, objects=2)
        logits = self.light.track(self.embeds, **ours)
        found = F.interpolate(logits, size=expected.shape[-2:], mode="bilinear", align_corners=False)
        return expected, (found - expected).abs().amax(dim=(0, 2, 3))  # (T,)


@pytest.fixture(scope="module", params=SEEDS, ids="seed{}".format)
def case(request, tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("parity"), request.param)


def _prompts(case: Case) -> dict[str, tuple]:
    click = Points(case.clicks[:, :1], LABELS[:, :1])
    return {
        "point": (lambda o: case.click(o, 1), {"points": click}),
        "points": (lambda o: case.click(o, 2), {"points": Points(case.clicks, LABELS)}),
        "mask": (case.mask, {"masks": case.masks}),
        "token": (case.put_token, {"token": case.token}),
    }


@pytest.mark.parametrize("kind", ["point", "points", "mask", "token"])
def test_agrees_with_the_official_predictor(case, kind):
    prompt, ours = _prompts(case)[kind]
    expected, differences = case.compare(prompt, **ours)
    print(f"\n{kind}, two objects in a batch: at most {differences.max():.2g} over frames 0 to {FRAMES - 1}")
    assert (differences <= TOLERANCE).all(), differences
    present = expected[expected > -1000]
    assert present.numel() > expected.numel() / 2 and present.std() > 0.1, "the case is trivial"


@pytest.mark.parametrize("kind", ["point", "mask", "token"])
def test_one_object_by_itself_is_the_same_computation(case, kind):
    """Without batching, the computation is the same, so the tolerance is much tighter."""
    prompt, ours = _prompts(case)[kind]
    expected = official_logits(case.official, case.state, prompt, objects=2)
    for o in range(2):
        one = {name: _one_object(value, o) for name, value in ours.items()}
        logits = case.light.track(case.embeds, **one)
        found = F.interpolate(logits, size=expected.shape[-2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(found, expected[o : o + 1], rtol=0, atol=1e-5)


def _one_object(prompt, index: int):
    if isinstance(prompt, Points):
        return Points(*(part[index : index + 1] for part in prompt))
    return prompt[index : index + 1]


def test_memory_takes_part(case):
    """Omitting the frames in between changes a frame by far more than the tolerance: the tests cover memory."""
    whole = case.light.track(case.embeds, masks=case.masks)
    for t in range(2, FRAMES):
        skipped = {name: torch.cat([value[:1], value[t : t + 1]]) for name, value in case.embeds.items()}
        assert (case.light.track(skipped, masks=case.masks)[:, 1] - whole[:, t]).abs().max() > 10 * TOLERANCE


def test_absent_objects_agree(case):
    """Occlusion: masks of -1024, the no-object pointer and memory. The score makes one object absent on frame 0."""
    heads = [model.sam_mask_decoder.pred_obj_score_head for model in (case.light, case.official)]
    prompt, ours = _prompts(case)["point"]
    scores: list[Tensor] = []
    hook = heads[0].register_forward_hook(lambda module, inputs, score: scores.append(score))
    case.light.track(case.embeds, **ours)
    hook.remove()
    before = heads[0].layers[-1].bias.item()
    try:
        for head in heads:
            head.layers[-1].bias.data -= scores[0].mean()
        expected, differences = case.compare(prompt, **ours)
    finally:
        for head in heads:
            head.layers[-1].bias.data.fill_(before)
    assert (differences <= TOLERANCE).all(), differences
    present = expected.amax(dim=(2, 3)) > -1000  # (B, T)
    assert present.any() and not present.all(), "the object is always present, or never"


@pytest.mark.parametrize("cache_point", ["post_conv", "pre_conv"])
def test_stored_embeddings_agree(case, cache_point):
    """The path of the pipeline: frames through the encoder of the sam2 stage, its arrays into the light SAM 2."""
    settings = Sam2Config(config=TINY, checkpoint=str(case.checkpoint), cache_point=cache_point, dtype="float32")
    encoder = Sam2ImageEncoder(settings, torch.device("cpu"))
    (arrays,) = encoder.encode([encoder.load(case.frames)])
    light = LightSam2.load(TINY, str(case.checkpoint), cache_point)
    expected = official_logits(case.official, case.state, case.mask, objects=2)
    logits = light.track({name: torch.from_numpy(array) for name, array in arrays.items()}, masks=case.masks)
    found = F.interpolate(logits, size=expected.shape[-2:], mode="bilinear", align_corners=False)
    print(f"\nmask prompt on stored {cache_point} embeddings: at most {(found - expected).abs().max():.2g}")
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["point", "mask", "token"])
def test_agrees_at_full_size(tmp_path, kind):
    """SAM 2.1 tiny in its released configuration, 1024 pixels, random weights."""
    case = Case(tmp_path, 0, config="configs/sam2.1/sam2.1_hiera_t.yaml", frames=3)
    prompt, ours = _prompts(case)[kind]
    _, differences = case.compare(prompt, **ours)
    print(f"\n{kind} at 1024 pixels: at most {differences.max():.2g}")
    assert (differences <= TOLERANCE).all(), differences
