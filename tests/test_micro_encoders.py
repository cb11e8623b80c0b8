"""The script that makes the micro encoders: its examples say what they show, and the bundled weights learned them."""

from itertools import islice

import numpy as np
import torch
from safetensors.torch import load_file

import samlove.torchvision_ops  # noqa: F401
from samlove.encoders.vggish import build_vggish
from samlove.encoders.vit import build_vit
from samlove.micro.pretrain_encoders import PatchReadout, VoiceReadout, patches, voices

FRESH = [7, 77]  # scenes that no training drew


def batch_of(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([e[name] for e in examples])) for name in examples[0]}


def weights(path: str) -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in load_file(f"weights/micro/{path}.safetensors").items()}


@torch.no_grad()
def test_bundled_vit_tells_what_it_sees() -> None:
    batch = batch_of(list(islice(patches(np.random.default_rng(FRESH)), 48)))
    vit = build_vit("vit_tiny_patch16_224", {"embed_dim": 128, "depth": 4, "num_heads": 4}, 128).eval()
    vit.load_state_dict(weights("visual/vit"))
    pictures = batch["picture"].permute(0, 3, 1, 2).float() / 127.5 - 1  # (48, 3, 128, 128)
    _, right = PatchReadout()(vit.forward_features(pictures), batch)
    assert right["pulse"] > 0.9 and right["colour"] > 0.85 and right["category"] > 0.5 and right["offset"] < 0.05


@torch.no_grad()
def test_bundled_vggish_tells_what_it_hears() -> None:
    batch = batch_of(list(islice(voices(np.random.default_rng(FRESH)), 200)))
    vggish = build_vggish(16, 256).eval()
    vggish.load_state_dict(weights("audio/vggish"))
    _, right = VoiceReadout()(vggish(batch["mel"]), batch)
    assert right["share"] > 0.9 and right["register"] < 0.3
