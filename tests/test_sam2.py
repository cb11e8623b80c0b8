"""The light SAM 2: building, loading, the training path and its memory."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from samlove.errors import RequestError, SamloveError
from samlove.model.sam2 import LEVELS, LightSam2, Points, Track
from samlove.model.sam2_build import instantiate_sam2
from tests.official_sam2 import TINY, random_checkpoint

FRAMES, BATCH = 12, 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("sam2") / "sam2.pt", seed=0)


@pytest.fixture(scope="module")
def light(checkpoint) -> LightSam2:
    return LightSam2.load(TINY, str(checkpoint))


@pytest.fixture
def embeds() -> dict[str, torch.Tensor]:
    """Embeddings of one video, after the convolutions."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"sam2_high_res_0": (8, 16, 16), "sam2_high_res_1": (16, 8, 8), "sam2_image_embed": (64, 4, 4)}
    return {name: torch.randn(FRAMES, *shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def token(light) -> torch.Tensor:
    return torch.randn(BATCH, 1, light.prompt_dim, generator=torch.Generator().manual_seed(1))


def first_frame_of(embeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value[:1].expand(BATCH, -1, -1, -1) for name, value in embeds.items()}


def test_holds_only_the_weights_that_it_needs(light, checkpoint):
    whole = instantiate_sam2(TINY).state_dict()
    left_out = ("image_encoder.", "sam_mask_decoder.conv_s0.", "sam_mask_decoder.conv_s1.")
    assert set(light.state_dict()) == {name for name in whole if not name.startswith(left_out)}
    official = torch.load(checkpoint, weights_only=True)["model"]
    assert all((value == official[name]).all() for name, value in light.state_dict().items())
    assert light.prompt_dim == 64 and light.image_size == 64


def test_loads_half_precision_safetensors_as_float32(light, checkpoint, tmp_path):
    official = torch.load(checkpoint, weights_only=True)["model"]
    save_file({name: value.half() for name, value in official.items()}, tmp_path / "sam2.safetensors")
    other = LightSam2.load(TINY, str(tmp_path / "sam2.safetensors"))
    for name, value in other.state_dict().items():
        assert value.dtype == light.state_dict()[name].dtype
        torch.testing.assert_close(value, light.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_refuses_a_missing_or_wrong_checkpoint(checkpoint, tmp_path):
    with pytest.raises(RequestError, match="absent.pt"):
        LightSam2.load(TINY, str(tmp_path / "absent.pt"))
    weights = torch.load(checkpoint, weights_only=True)["model"]
    weights["no_mem_embed"] = weights["no_mem_embed"][..., :32]
    torch.save({"model": weights}, tmp_path / "narrow.pt")
    with pytest.raises(SamloveError, match=r"no_mem_embed is \(1, 1, 32\), expected \(1, 1, 64\)"):
        LightSam2.load(TINY, str(tmp_path / "narrow.pt"))
    del weights["no_mem_embed"]
    torch.save({"model": weights}, tmp_path / "less.pt")
    with pytest.raises(SamloveError, match="missing no_mem_embed"):
        LightSam2.load(TINY, str(tmp_path / "less.pt"))


def test_packaged_configuration_is_built_without_the_image_encoder():
    light = LightSam2.build("configs/sam2/sam2_hiera_l.yaml")
    assert light.prompt_dim == 256 and light.image_size == 1024
    parameters = sum(p.numel() for p in light.parameters())
    assert parameters < 15e6, f"{parameters} of the large model's 224 million"


def test_imports_none_of_the_other_encoders():
    others = "[m for m in ('transformers', 'timm') if m in sys.modules]"
    code = f"import json, sys, samlove.model.sam2; print(json.dumps({others}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(found) == []


@pytest.mark.parametrize("best_of_three", [True, False])
def test_training_path_equals_sam2s_own_modules(light, embeds, token, best_of_three):
    """Values, and gradients of all that is trained."""
    light.best_of_three = best_of_three
    try:
        light.set_trainable(True, True)
        parameters = [p for p in light.parameters() if p.requires_grad]
        first = first_frame_of(embeds)
        answer = light.first_frame(first, token)
        features = light._features(first)
        nowhere, padding = torch.zeros(BATCH, 1, 2), -torch.ones(BATCH, 1, dtype=torch.int32)
        sparse, dense = light.sam_prompt_encoder(points=(nowhere, padding), boxes=None, masks=None)
        masks, iou, _, score = light.sam_mask_decoder(
            image_embeddings=light._without_memory(features),
            image_pe=light.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=torch.cat([sparse, token], dim=1),
            dense_prompt_embeddings=dense,
            multimask_output=best_of_three,
            repeat_image=False,
            high_res_features=light._high_res(features),
        )
        torch.testing.assert_close(answer.masks, masks, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(answer.object_score, score[:, 0], rtol=1e-4, atol=1e-4)
        if best_of_three:
            torch.testing.assert_close(answer.iou, iou, rtol=1e-4, atol=1e-4)
        found, expected = (
            torch.autograd.grad(m.square().mean() + o.mean() + i.mean(), parameters, allow_unused=True)
            for m, o, i in ((answer.masks, answer.object_score, answer.iou), (masks, score, iou * best_of_three))
        )
        assert all(gradient is not None for gradient in found)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    finally:
        light.best_of_three = False
        light.requires_grad_(True)


def test_the_best_of_three_has_the_highest_expected_iou_in_training_and_tracking(light, embeds, token):
    light.best_of_three = True
    try:
        answer = light.first_frame(first_frame_of(embeds), token)
        tracked = light.track(embeds, token=token)
    finally:
        light.best_of_three = False
    assert answer.masks.shape == (BATCH, 3, 16, 16)
    best = torch.stack([masks[i] for masks, i in zip(answer.masks, answer.iou.argmax(1), strict=True)])
    assert torch.equal(answer.best, best)
    torch.testing.assert_close(tracked[:, 0], torch.where(answer.object_score[:, None, None] > 0, best, -1024.0))


def test_training_path_is_frame_0_of_tracking(light, embeds, token):
    answer = light.first_frame(first_frame_of(embeds), token)
    logits, score = answer.best, answer.object_score
    assert answer.masks.shape == (BATCH, 1, 16, 16) and score.shape == (BATCH,)
    tracked = light.track(embeds, token=token)
    assert tracked.shape == (BATCH, FRAMES, 16, 16)
    gated = torch.where(score[:, None, None] > 0, logits, -1024.0)
    torch.testing.assert_close(tracked[:, 0], gated)


def test_object_scores_are_those_of_the_training_path_on_every_frame(light, embeds, token):
    scores = light.object_scores(embeds, token)
    assert scores.shape == (BATCH, FRAMES) and not scores.requires_grad
    for t in range(FRAMES):
        of_frame = {name: value[t : t + 1].expand(BATCH, -1, -1, -1) for name, value in embeds.items()}
        torch.testing.assert_close(scores[:, t], light.first_frame(of_frame, token).object_score)
    assert scores.argmax(1).max() > 0


@pytest.mark.parametrize("frame", [3, FRAMES - 1])
def test_training_path_is_the_prompted_frame_of_tracking(light, embeds, token, frame):
    of_frame = {name: value[frame : frame + 1].expand(BATCH, -1, -1, -1) for name, value in embeds.items()}
    answer = light.first_frame(of_frame, token)
    gated = torch.where(answer.object_score[:, None, None] > 0, answer.best, -1024.0)
    torch.testing.assert_close(light.track(embeds, token=token, frame=frame)[:, frame], gated)


def test_training_path_passes_gradients_for_absent_objects(light, embeds, token):
    bias = light.sam_mask_decoder.pred_obj_score_head.layers[-1].bias
    before = bias.item()
    try:
        bias.data.fill_(-100)
        token.requires_grad_()
        logits, score, _ = light.first_frame(first_frame_of(embeds), token)
        assert (score < 0).all() and (logits > -1000).all()
        logits.square().mean().backward()
        assert (token.grad.abs().amax(dim=(1, 2)) > 0).all()
        assert light.track(embeds, token=token.detach()).max() == -1024
    finally:
        bias.data.fill_(before)


@pytest.mark.parametrize("cache_point", ["post_conv", "pre_conv"])
@pytest.mark.parametrize("prompt_encoder", [True, False])
@pytest.mark.parametrize("mask_decoder", [True, False])
@pytest.mark.parametrize("best_of_three", [True, False])
def test_only_trainable_parameters_get_a_gradient(
    checkpoint, embeds, token, cache_point, prompt_encoder, mask_decoder, best_of_three
):
    light = LightSam2.load(TINY, str(checkpoint), cache_point)
    light.best_of_three = best_of_three
    if cache_point == "pre_conv":
        embeds = {name: value[:, :1].expand(-1, 64, -1, -1) for name, value in embeds.items()}
    light.set_trainable(prompt_encoder, mask_decoder)
    answer = light.first_frame(first_frame_of(embeds), token.requires_grad_())
    (answer.masks.square().mean() + answer.object_score.mean() + answer.iou.mean()).backward()
    trained = {name for name, parameter in light.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in light.named_parameters() if parameter.grad is not None}
    parts = {name.split(".")[0] for name in trained}
    expected = {"sam_prompt_encoder": prompt_encoder, "sam_mask_decoder": mask_decoder}
    assert parts == {name for name, on in expected.items() if on}
    convolved = {name for name in trained if "conv_s" in name}
    assert len(convolved) == (4 if cache_point == "pre_conv" and mask_decoder else 0)  # weights and biases


def test_both_cache_points_give_the_same_masks(checkpoint, light, embeds, token):
    """The same levels, taken before and after the decoder's two convolutions."""
    early = LightSam2.load(TINY, str(checkpoint), "pre_conv")
    generator = torch.Generator().manual_seed(2)
    raw = embeds | {n: torch.randn(FRAMES, 64, *embeds[n].shape[2:], generator=generator) for n in LEVELS[:2]}
    with torch.no_grad():
        convolved = raw | {
            LEVELS[0]: early.sam_mask_decoder.conv_s0(raw[LEVELS[0]]),
            LEVELS[1]: early.sam_mask_decoder.conv_s1(raw[LEVELS[1]]),
        }
    torch.testing.assert_close(early.track(raw, token=token), light.track(convolved, token=token), atol=1e-4, rtol=0)


def test_batch_equals_single(light, embeds, token):
    together = light.track(embeds, token=token)
    alone = torch.cat([light.track(embeds, token=token[i : i + 1]) for i in range(BATCH)])
    assert (together - alone).abs().max() < 1e-3  # bfloat16 memory: the last bit may round differently


def test_stays_in_evaluation_mode(light, embeds, token):
    before = light.track(embeds, token=token)
    light.train()
    assert not any(module.training for module in light.modules())
    torch.testing.assert_close(light.track(embeds, token=token), before, rtol=0, atol=0)


def test_leaves_no_hook_behind(light, embeds, token):
    """The token applies to frame 0 only: its hook is removed, even if tracking fails."""
    points = Points(torch.full((BATCH, 1, 2), 0.5), torch.ones(BATCH, 1))
    before = light.track(embeds, points=points)
    with pytest.raises(RuntimeError):
        light.track(embeds, token=token[..., :5])
    torch.testing.assert_close(light.track(embeds, points=points), before, rtol=0, atol=0)


class Keeper(LightSam2):
    """Forgets nothing, and counts the memories that it holds."""

    def _forget(self, memories, upcoming):
        pointers = getattr(self, "pointers", 0)
        spatial = getattr(self, "spatial", 0)
        self.pointers = max(pointers, len(memories))
        self.spatial = max(spatial, sum(memory["maskmem_features"] is not None for memory in memories.values()))


class Counter(Keeper):
    """Forgets, and counts the memories that remain."""

    def _forget(self, memories, upcoming):
        LightSam2._forget(self, memories, upcoming)
        super()._forget(memories, upcoming)


def test_forgets_memories_that_cannot_be_attended_to(light, embeds, token):
    """A long video is tracked as if nothing were forgotten, and the memory bank stays bounded."""
    long = {name: value.repeat(2, 1, 1, 1) for name, value in embeds.items()}  # 24 frames
    keeper, counter = Keeper.build(TINY), Counter.build(TINY)
    for model in (keeper, counter):
        model.load_state_dict(light.state_dict())
    torch.testing.assert_close(counter.track(long, token=token), keeper.track(long, token=token), rtol=0, atol=0)
    assert (keeper.pointers, keeper.spatial) == (22, 22)  # all except frame 0, stored separately, and the last
    assert (counter.pointers, counter.spatial) == (15, 6)  # max_obj_ptrs_in_encoder - 1, num_maskmem - 1
    longer = {name: value.repeat(4, 1, 1, 1) for name, value in embeds.items()}  # 48 frames
    whole, cut = (model.track(longer, token=token[:1], frame=22) for model in (keeper, counter))
    torch.testing.assert_close(cut, whole, rtol=0, atol=0)
    assert counter.pointers < 2 * 15 and counter.spatial < 2 * 6 + 1  # in reach of both directions
    assert keeper.pointers == 46


def test_mask_prompt_of_any_size(light, embeds):
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, 16:48, 8:40] = True
    larger = mask.repeat_interleave(3, 1).repeat_interleave(3, 2)
    torch.testing.assert_close(light.track(embeds, masks=larger), light.track(embeds, masks=mask.float() * 255))


def test_takes_one_kind_of_prompt(light, embeds, token):
    with pytest.raises(ValueError, match="exactly one"):
        light.track(embeds)
    with pytest.raises(ValueError, match="exactly one"):
        light.track(embeds, token=token, masks=torch.ones(BATCH, 8, 8))


def test_a_track_of_any_length_keeps_only_what_a_coming_frame_can_attend_to(light, embeds, token):
    track = Track(light, 50)
    track.prompt({name: value[:1] for name, value in embeds.items()}, 0, BATCH, token=token)
    kept = []
    for t in range(1, 50):
        track.step({name: value[t % FRAMES : t % FRAMES + 1] for name, value in embeds.items()}, t, [t + 1])
        kept.append(sum(memory["maskmem_features"] is not None for memory in track._memories.values()))
        assert len(track._memories) < light.max_obj_ptrs_in_encoder
    assert max(kept) < light.num_maskmem


def test_some_objects_of_a_track_are_tracked_as_with_the_others(light, embeds, token):
    track = Track(light, FRAMES)
    track.prompt({name: value[:1] for name, value in embeds.items()}, 0, BATCH, token=token)
    for t in range(1, 5):
        track.step({name: value[t : t + 1] for name, value in embeds.items()}, t, [t + 1])
    part, last = track.select([2, 0]), {name: value[5:6] for name, value in embeds.items()}
    seen, seen_in_part = track.step(last, 5, []), part.step(last, 5, [])
    torch.testing.assert_close(seen_in_part.masks, seen.masks[[2, 0]], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(seen_in_part.object_score, seen.object_score[[2, 0]], rtol=1e-3, atol=1e-3)
