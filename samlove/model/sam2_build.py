"""Builds SAM 2 from any of its yaml files, with or without the image encoder, and loads its checkpoints.

The classes are SAM 2's own. Hydra's global configuration is not used: OmegaConf reads the yaml, which is instantiated
unchanged.
"""

import hashlib
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from torch import nn

import samlove.model.torchvision_ops  # noqa: F401
from samlove.config import read_sam2_config
from samlove.errors import RequestError
from samlove.model.weights import HUB, load_into, load_state_dict, resolve_file

CHECKPOINTS = "https://dl.fbaipublicfiles.com/segment_anything_2/072824/"  # SAM 2; SAM 2.1 is in 092824/
SAM2_CLASSES = "sam2.modeling."
# Weights that a checkpoint may hold although the model does not use them.
LEFT_OUT = ("image_encoder.", "sam_mask_decoder.conv_s0.", "sam_mask_decoder.conv_s1.")


class NoImageEncoder(nn.Module):
    """A stand-in for SAM2Base's image encoder. It has the two attributes that the rest of SAM 2 reads: the neck's width
    and its position encoding, which is computed and needs no weights."""

    def __init__(self, d_model: int, position_encoding: nn.Module):
        super().__init__()
        self.neck = SimpleNamespace(d_model=d_model, position_encoding=position_encoding)

    def forward(self, images: torch.Tensor) -> None:
        raise RuntimeError("this SAM 2 was built without its image encoder; pass precomputed embeddings")


def instantiate_sam2(config: str, image_encoder: bool = True, **overrides: Any) -> nn.Module:
    """A SAM 2 with random weights, in evaluation mode, of the class that the yaml names (SAM2Base).

    The yaml's `model` is built unchanged, as the official builder does with `apply_postprocessing=False`: no dynamic
    multi-mask, no hole filling.

    image_encoder: False leaves out the image encoder, which has most of the weights. The model then takes precomputed
        embeddings only; training and full-video inference need no more.
    overrides: arguments of the model to add or replace, including `_target_` (a different class).

    Raises RequestError if the yaml names any other class than SAM 2's own.
    """
    from hydra.utils import instantiate

    model = read_sam2_config(config).model
    _check_classes(model, config)
    model.merge_with(overrides)
    if image_encoder:
        return instantiate(model).eval()
    neck = model.pop("image_encoder").neck
    encoder = NoImageEncoder(neck.d_model, instantiate(neck.position_encoding))
    model.compile_image_encoder = False
    return instantiate(model, _partial_=True)(image_encoder=encoder).eval()


def _check_classes(part: Any, config: str) -> None:
    """Raise RequestError unless every `_target_` is a module of SAM 2: a yaml could name any function to be called."""
    for name, value in part.items() if isinstance(part, DictConfig) else enumerate(part):
        if isinstance(value, DictConfig | ListConfig):
            _check_classes(value, config)
        elif name == "_target_":
            module, _, target = str(value).rpartition(".")
            try:
                found = getattr(importlib.import_module(module), target) if module.startswith(SAM2_CLASSES) else None
            except (ImportError, AttributeError):
                found = None
            if not isinstance(found, type) or not issubclass(found, nn.Module):
                raise RequestError(f"{config}: expected classes of {SAM2_CLASSES}*, found _target_: {value}")


def checkpoint_path(checkpoint: str) -> Path:
    """The checkpoint's local file; "hub:NAME" downloads it from the Hugging Face Hub.

    Raises RequestError, saying how to get it, if there is no such file or NAME is not one of sam2's own models.
    """
    hub_file = None
    if checkpoint.startswith(HUB):
        from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES

        _, hub_file = HF_MODEL_ID_TO_FILENAMES.get(checkpoint.removeprefix(HUB), (None, None))
        if hub_file is None:
            known = ", ".join(HUB + name for name in HF_MODEL_ID_TO_FILENAMES)
            raise RequestError(f"{checkpoint}: not an official SAM 2 model; expected one of: {known}")
    remedy = f"set checkpoint: hub:facebook/sam2-hiera-large, or download {CHECKPOINTS}NAME.pt"
    return resolve_file(checkpoint, "a SAM 2 checkpoint (.pt or .safetensors)", remedy, hub_file)


def load_sam2_weights(model: nn.Module, checkpoint: str) -> None:
    """Load an official .pt, a .safetensors or "hub:NAME" as float32 into `model`, from instantiate_sam2.

    A light SAM 2, without the image encoder or the decoder's two convolutions, ignores their weights. Raises
    RequestError if there is no such file, SamloveError if the weights do not fit this configuration.
    """
    path = checkpoint_path(checkpoint)
    own = model.state_dict()
    tensors = {n: value for n, value in load_state_dict(path).items() if n in own or not n.startswith(LEFT_OUT)}
    load_into(model, tensors, path, "this SAM 2")


def decoder_convs_sha256(checkpoint: str) -> str:
    """Hash of the mask decoder's conv_s0 and conv_s1 as float32, on which post_conv embeddings depend."""
    tensors = load_state_dict(checkpoint_path(checkpoint))
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if name.startswith(("sam_mask_decoder.conv_s0.", "sam_mask_decoder.conv_s1.")):
            digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
