"""SAM2 from its own classes: any of its yaml files, whole or without the image encoder, and its checkpoints.

Nothing of Hydra's global configuration is used: the yaml is read by OmegaConf and instantiated as it stands.
"""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import samlove.model.torchvision_ops  # noqa: F401
from samlove.config import read_sam2_config
from samlove.model.weights import load_into, load_state_dict, resolve_file

CHECKPOINTS = "https://dl.fbaipublicfiles.com/segment_anything_2/072824/"  # SAM 2; SAM 2.1 is in 092824/
# What a checkpoint may hold and a model may lack.
LEFT_OUT = ("image_encoder.", "sam_mask_decoder.conv_s0.", "sam_mask_decoder.conv_s1.")


class NoImageEncoder(nn.Module):
    """Stands where SAM2Base keeps its image encoder, with all that the rest of SAM2 asks of it: the neck's width
    and its position encoding, which is computed and needs no weights."""

    def __init__(self, d_model: int, position_encoding: nn.Module):
        super().__init__()
        self.neck = SimpleNamespace(d_model=d_model, position_encoding=position_encoding)

    def forward(self, images: torch.Tensor) -> None:
        raise RuntimeError("this SAM2 was built without its image encoder: give it cached embeddings")


def instantiate_sam2(config: str, image_encoder: bool = True, **overrides: Any) -> nn.Module:
    """A SAM2 with fresh weights, in evaluation mode, of the class that the yaml names (SAM2Base).

    The yaml's `model` is built as it stands, which is what the official builder calls `apply_postprocessing=False`:
    no dynamic multi-mask, no hole filling.

    image_encoder: False leaves the image encoder out (most of the weights); the model then works on cached
        embeddings only, which is all that training and full-video inference need.
    overrides: arguments of the model to add or replace, `_target_` (another class) among them.
    """
    from hydra.utils import instantiate

    model = read_sam2_config(config).model
    model.merge_with(overrides)
    if image_encoder:
        return instantiate(model).eval()
    neck = model.pop("image_encoder").neck
    encoder = NoImageEncoder(neck.d_model, instantiate(neck.position_encoding))
    model.compile_image_encoder = False
    return instantiate(model, _partial_=True)(image_encoder=encoder).eval()


def checkpoint_path(checkpoint: str) -> Path:
    """The checkpoint's file; raises RequestError that says how to get it."""
    return resolve_file(
        checkpoint, "a SAM2 checkpoint (.pt or .safetensors)", f"the official ones: {CHECKPOINTS}NAME.pt"
    )


def load_sam2_weights(model: nn.Module, checkpoint: str) -> None:
    """Give `model`, from instantiate_sam2, the weights of an official .pt or a .safetensors, as float32.

    A light SAM2, without image encoder or without the decoder's two convolutions, takes the rest. Raises RequestError
    where there is no such file, SamloveError where the weights are not those of this configuration.
    """
    path = checkpoint_path(checkpoint)
    own = model.state_dict()
    tensors = {n: value for n, value in load_state_dict(path).items() if n in own or not n.startswith(LEFT_OUT)}
    load_into(model, tensors, path, "this SAM2")


def decoder_convs_sha256(checkpoint: str) -> str:
    """Of the mask decoder's conv_s0 and conv_s1 as float32: what embeddings cached after them depend on."""
    tensors = load_state_dict(checkpoint_path(checkpoint))
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if name.startswith(("sam_mask_decoder.conv_s0.", "sam_mask_decoder.conv_s1.")):
            digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
