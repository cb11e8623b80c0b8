from typing import Any

import pytest
import torch
from torch import nn

from samlove.config import FusionConfig
from samlove.model.block import Block, FirstTokens
from samlove.model.fusion import Fusion
from samlove.model.one_block import OneBlockLoop, fold

B, N, P, L, D = 3, 4, 6, 5, 32
DIMS = {"audio": 7, "visual": 9, "text": 11, "frames": N}


def make(seed: int = 0, **settings: Any) -> Fusion:
    torch.manual_seed(seed)
    fusion = Fusion(FusionConfig(**{"dim": D, "blocks": 2, "heads": 4, **settings}), DIMS, prompt_dim=16)
    for parameter in fusion.parameters():  # no bias is 0 and no norm is 1, so that omitting one shows
        nn.init.normal_(parameter, std=0.3)
    return fusion


def inputs(seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "audio": torch.randn(B, N, 7),
        "visual": torch.randn(B, N, 1 + P, 9),
        "text": torch.randn(B, L, 11),
        "text_mask": torch.arange(L) < torch.tensor([[2], [5], [3]]),
        "audio_valid": torch.arange(N) < torch.tensor([[4], [4], [2]]),
    }


def by_the_equations(fusion, audio, visual, text, text_mask, audio_valid):
    """One sample at a time, without padding, computing every token of every block."""
    out = []
    for b in range(len(audio)):
        A = (fusion.project_audio(audio[b]) + fusion.time)[audio_valid[b]]
        T = fusion.project_text(text[b])[text_mask[b]]
        V = fusion.project_visual(visual[b]) + fusion.time[:, None]
        seg, his = fusion.seg, fusion.seg.new_empty(0, D)
        for i in range(N):
            if fusion.config.accumulate_cls:
                his = torch.cat([his, V[i, :1]])
            z = torch.cat([seg, A, fusion.aud, T, fusion.vis, V[i, 1:], his])[None]
            for block in fusion.blocks:
                z = block(z, z.new_zeros(1, 1, 1, z.shape[1]))
            seg = z[0, : len(fusion.seg)]
        out.append(fusion.head(seg[:1]))
    return torch.stack(out)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("seg_tokens", [1, 4])
@pytest.mark.parametrize("accumulate_cls", [True, False])
def test_the_fast_path_equals_the_equations(blocks, seg_tokens, accumulate_cls):
    fusion = make(blocks=blocks, seg_tokens=seg_tokens, accumulate_cls=accumulate_cls)
    batch = inputs()
    token = fusion(**batch)
    assert token.shape == (B, 1, 16)
    torch.testing.assert_close(token, by_the_equations(fusion, **batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seg_tokens", [1, 4])
def test_the_loop_of_one_block_has_the_gradients_of_the_equations(seg_tokens):
    fusion = make(blocks=1, seg_tokens=seg_tokens).double()
    batch = {k: v if v.dtype == torch.bool else v.double() for k, v in inputs().items()}
    found, expected = (
        torch.autograd.grad(token.square().sum(), tuple(fusion.parameters()))
        for token in (fusion(**batch), by_the_equations(fusion, **batch))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seg_tokens", [1, 4])
def test_the_loop_of_one_block_passes_gradcheck(seg_tokens):
    torch.manual_seed(0)
    block = Block(4, 2, 2).double()
    seg, clip, patches = (torch.randn(*shape, 4).double() for shape in ((2, seg_tokens), (2, 3), (2, 2, 2)))
    bias = torch.zeros(2, 2, 1, seg_tokens + 5).double()
    bias[:, 0, :, seg_tokens + 1] = float("-inf")
    arguments = [seg, clip, patches, *(layer.detach() for layer in fold(block))]
    for argument in arguments:
        argument.requires_grad_()
    seg, clip, patches, *layers = arguments
    assert torch.autograd.gradcheck(OneBlockLoop.apply, (seg, clip, patches, bias, *layers))


@pytest.mark.parametrize("blocks", [1, 2])
def test_bfloat16_is_near_float32(blocks):
    fusion, batch = make(blocks=blocks), inputs()
    for parameter in fusion.parameters():
        parameter.data *= 0.5
    exact = fusion(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        token = fusion(**batch)
    pairs = [(token.float(), exact)]
    pairs += zip(
        *(torch.autograd.grad(t.float().sum(), tuple(fusion.parameters())) for t in (token, exact)), strict=True
    )
    for found, expected in pairs:
        assert found.dtype == expected.dtype
        assert (found - expected).norm() < 0.05 * expected.norm() + 1e-4


def test_the_first_tokens_of_a_block_have_the_values_and_gradients_of_the_whole_block():
    torch.manual_seed(0)
    block = Block(D, 4, 4).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    z = torch.randn(2, 9, D, dtype=torch.float64)
    bias = torch.zeros(2, 1, 1, 9, dtype=torch.float64)
    bias[0, ..., 5:] = float("-inf")
    whole, part = block(z, bias)[:, :2], FirstTokens(block)(z[:, :2], block.norm1(z), bias[:, 0])
    torch.testing.assert_close(part, whole)
    expected, found = (torch.autograd.grad(out.square().sum(), tuple(block.parameters())) for out in (whole, part))
    torch.testing.assert_close(found, expected)


def test_attention_equals_torchs_layer():
    torch.manual_seed(0)
    block = Block(D, 4, 4)
    twin = nn.MultiheadAttention(D, 4, batch_first=True)
    twin.load_state_dict(
        {
            "in_proj_weight": block.qkv.weight,
            "in_proj_bias": block.qkv.bias,
            "out_proj.weight": block.out.weight,
            "out_proj.bias": block.out.bias,
        }
    )
    z = torch.randn(2, 9, D)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    x = block.norm1(z)
    z1 = z + twin(x, x, x, key_padding_mask=~mask)[0]
    expected = z1 + block.mlp(block.norm2(z1))
    bias = torch.zeros(2, 1, 1, 9).masked_fill(~mask[:, None, None], float("-inf"))
    torch.testing.assert_close(block(z, bias), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", ["seg", "mean"])
def test_padding_has_no_effect(prompt):
    fusion = make(prompt=prompt)
    batch = inputs()
    noisy = {**batch, "audio": batch["audio"].clone(), "text": batch["text"].clone()}
    noisy["audio"][~batch["audio_valid"]] = 100.0
    noisy["text"][~batch["text_mask"]] = -100.0
    torch.testing.assert_close(fusion(**noisy), fusion(**batch), rtol=1e-5, atol=1e-5)
    longer = {
        **batch,
        "text": nn.functional.pad(batch["text"], (0, 0, 0, 3)),
        "text_mask": nn.functional.pad(batch["text_mask"], (0, 3)),
    }
    torch.testing.assert_close(fusion(**longer), fusion(**batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", ["seg", "mean"])
def test_a_batch_equals_its_samples(prompt):
    fusion = make(prompt=prompt)
    batch = inputs()
    one_by_one = [fusion(**{name: array[b : b + 1] for name, array in batch.items()}) for b in range(B)]
    torch.testing.assert_close(fusion(**batch), torch.cat(one_by_one), rtol=1e-4, atol=1e-4)


def test_audio_valid_may_be_left_out():
    fusion = make()
    batch = inputs()
    batch["audio_valid"] = torch.ones(B, N, dtype=torch.bool)
    expected = fusion(**batch)
    del batch["audio_valid"]
    assert torch.equal(fusion(**batch), expected)


def test_the_mean_is_over_one_sequence_with_all_frames():
    fusion = make(prompt="mean", blocks=1)
    batch = {name: array[:1] for name, array in inputs().items()}
    A = fusion.project_audio(batch["audio"][0]) + fusion.time
    T = fusion.project_text(batch["text"][0])[:2]
    V = fusion.project_visual(batch["visual"][0]) + fusion.time[:, None]
    z = torch.cat([A, fusion.aud, T, fusion.vis, *V[:, 1:], V[:, 0]])[None]
    z = fusion.blocks[0](z, torch.ones(1, 1, 1, z.shape[1], dtype=torch.bool))
    torch.testing.assert_close(fusion(**batch), fusion.head(z.mean(1, keepdim=True)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blocks", [1, 2])
def test_linear_projections_follow_the_equations_without_their_hidden_layers(blocks):
    fusion, batch = make(projections="linear", blocks=blocks), inputs()
    torch.testing.assert_close(fusion(**batch), by_the_equations(fusion, **batch), rtol=1e-4, atol=1e-4)
    for layer, x in ((fusion.project_audio, batch["audio"]), (fusion.project_text, batch["text"])):
        torch.testing.assert_close(layer(2 * x) - layer(x), layer(x) - layer(0 * x), rtol=1e-4, atol=1e-4)
    normed = torch.randn(2, D)
    head = fusion.head[1]
    torch.testing.assert_close(head(2 * normed) - head(normed), head(normed) - fusion.prompt_bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", ["seg", "mean"])
@pytest.mark.parametrize("accumulate_cls", [True, False])
def test_cls_matters_only_if_it_is_accumulated(prompt, accumulate_cls):
    fusion = make(prompt=prompt, accumulate_cls=accumulate_cls)
    batch = inputs()
    before = fusion(**batch)
    batch["visual"][:, 0, 0] += 1.0  # [cls] of the first frame
    assert torch.equal(fusion(**batch), before) != accumulate_cls


@pytest.mark.parametrize("changed", ["audio", "visual", "text"])
def test_every_modality_and_its_order_matter(changed):
    fusion = make()
    batch = inputs()
    before = fusion(**batch)
    batch[changed] = batch[changed].roll(1, dims=1)
    assert (fusion(**batch) - before).abs().amax(dim=(1, 2)).min() > (0 if changed == "text" else 1e-4)


def test_the_order_of_the_seconds_matters():
    fusion = make(prompt="mean")
    batch = inputs()
    batch["audio_valid"][:] = True
    swapped = {**batch, "audio": batch["audio"].flip(1)}
    assert (fusion(**swapped) - fusion(**batch)).abs().max() > 1e-4


@pytest.mark.parametrize("prompt", ["seg", "mean"])
def test_every_parameter_learns(prompt):
    fusion = make(prompt=prompt, seg_tokens=2)
    fusion(**inputs()).square().sum().backward()
    still = [name for name, parameter in fusion.named_parameters() if parameter.grad is None]
    assert still == (["seg"] if prompt == "mean" else [])


def test_narrow_and_wide_models_start_with_tokens_of_similar_size():
    sizes = []
    for dim in (64, 512):
        torch.manual_seed(0)
        fusion = Fusion(FusionConfig(dim=dim, blocks=2, heads=4), DIMS, prompt_dim=64)
        sizes.append(fusion(**inputs()).std().item())
    assert 0.2 < sizes[0] < 2 and 0.2 < sizes[1] < 2


def test_several_blocks_and_frames_together_add_about_the_same_to_seg_however_many_they_are():
    def added(blocks: int, frames: int) -> float:
        torch.manual_seed(0)
        fusion = Fusion(FusionConfig(dim=64, blocks=blocks, heads=4), {**DIMS, "frames": frames}, prompt_dim=64)
        seen: list[torch.Tensor] = []
        fusion.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        batch = {name: torch.cat([array] * (frames // N), 1) for name, array in inputs().items() if name != "text"}
        batch["text_mask"] = inputs()["text_mask"]
        fusion(**batch, text=inputs()["text"])
        return (seen[0] - fusion.seg).std().item()

    few, many = added(2, N), added(6, 4 * N)
    assert few / 3 < many < 3 * few


@pytest.mark.parametrize("prompt", ["seg", "mean"])
def test_without_a_time_embedding_the_order_of_the_seconds_of_audio_has_no_effect(prompt):
    batch = inputs()
    batch["audio_valid"] = torch.ones(B, N, dtype=torch.bool)
    turned = {**batch, "audio": batch["audio"].flip(1)}
    for time_embedding in (True, False):
        fusion = make(prompt=prompt, time_embedding=time_embedding)
        same = torch.allclose(fusion(**turned), fusion(**batch), rtol=1e-4, atol=1e-4)
        assert same != time_embedding
