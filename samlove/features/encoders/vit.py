"""ViT (Dosovitskiy et al., 2021) through timm: all tokens of every frame, [cls] first."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import samlove.model.torchvision_ops  # noqa: F401
from samlove.config import VisualConfig
from samlove.errors import RequestError
from samlove.features.encoders.base import Arrays, OnDevice, library_versions
from samlove.features.encoders.frames import CENTRE, encode_frames, load_square, normalise
from samlove.model.weights import load_into, load_state_dict, resolve_file
from stores.fingerprint import sha256_file


def build_vit(model: str, model_args: Mapping[str, Any], image_size: int) -> nn.Module:
    """timm's ViT with random weights and no classifier: `forward_features` (n,3,S,S) -> (n,1+P,d), S = image_size.

    model: timm's name. model_args: overrides of its architecture.
    Raises RequestError if timm has no such model, or it is not a ViT with a class token that normalises its tokens.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    where = "model and model_args in configs/*/visual.yaml"
    try:
        network = timm.create_model(model, pretrained=False, num_classes=0, img_size=image_size, **model_args)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(f"{model}: timm cannot build it for {image_size} pixels: {reason}; see {where}") from error
    if not isinstance(network, VisionTransformer) or network.cls_token is None:
        raise RequestError(f"{model}: expected a ViT with a class token, found {type(network).__name__}; see {where}")
    if isinstance(network.norm, nn.Identity):
        raise RequestError(
            f"{model}: expected a ViT that normalises its tokens, found one that normalises after pooling; see {where}"
        )
    return network


class VitEncoder(OnDevice):
    """A video's frames -> visual (N,1+P,d): tokens after the final norm, with the class token in row 0 of axis 1.

    Whole frames are resized to image_size x image_size, without the centre crop of ImageNet's evaluation, because the
    object may be anywhere. If the checkpoint was trained at a different size, position embeddings are resampled.
    """

    def __init__(self, config: VisualConfig, device: torch.device):
        """Raises RequestError, saying how to get them, if the weights are missing."""
        import timm

        self.config, self.device = config, device
        pretrained = timm.get_pretrained_cfg(config.model)
        self.mean = tuple(pretrained.mean) if pretrained else CENTRE
        self.std = tuple(pretrained.std) if pretrained else CENTRE
        source = pretrained.hf_hub_id if pretrained and pretrained.hf_hub_id else "timm/NAME"
        remedy = f"set weights: hub:{source}, or download model.safetensors from https://huggingface.co/{source}"
        what = f"timm's weights of {config.model}"
        self.weights = resolve_file(config.weights, what, remedy, hub_file="model.safetensors")

    def fingerprint(self) -> dict:
        return {
            "encoder": "vit",
            "weights_sha256": sha256_file(self.weights),
            "model": self.config.model,
            "model_args": [f"{key}={value}" for key, value in sorted(self.config.model_args.items())],
            "image_size": self.config.image_size,
            "resize": "whole frame to a square, bicubic",
            "mean": list(self.mean),
            "std": list(self.std),
            "dtype": self.config.dtype,
            "libraries": library_versions("torch", "timm", "pillow"),
        }

    @cached_property
    def network(self) -> Any:
        from timm.layers import resample_abs_pos_embed

        network: Any = build_vit(self.config.model, self.config.model_args, self.config.image_size)
        tensors = load_state_dict(self.weights)
        tensors = {name: value for name, value in tensors.items() if not name.startswith("head.")}  # the classifier
        own, trained = network.pos_embed, tensors.get("pos_embed")
        if own is not None and trained is not None and trained.ndim == 3 and trained.shape[1] != own.shape[1]:
            prefix = 0 if network.no_embed_class else network.num_prefix_tokens
            if _is_square(trained.shape[1] - prefix):  # trained at a different size
                grid = network.patch_embed.grid_size
                tensors["pos_embed"] = resample_abs_pos_embed(trained, grid, num_prefix_tokens=prefix)
        load_into(network, tensors, self.weights, f"timm's {self.config.model}")
        return network.to(self.device).eval()

    def load(self, source: Sequence[Path]) -> Tensor:
        """N frames -> uint8 (N,3,S,S). Raises SamloveError, naming the path, if a frame cannot be read."""
        return load_square(source, self.config.image_size)

    @torch.inference_mode()
    def encode(self, items: list[Tensor]) -> list[Arrays]:
        """One {visual (N,1+P,d) of the configured dtype} per item."""
        return encode_frames(items, self._tokens, self.device, self.config.dtype)

    def _tokens(self, frames: Tensor) -> Tensor:
        tokens = self.network.forward_features(normalise(frames, self.mean, self.std))  # (n, prefix + P, d)
        if self.network.num_prefix_tokens > 1:  # register and distillation tokens have no position
            tokens = torch.cat([tokens[:, :1], tokens[:, self.network.num_prefix_tokens :]], dim=1)
        return tokens  # (n, 1 + P, d)


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count
