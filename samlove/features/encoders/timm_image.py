"""Any image model of timm that gives patch tokens or a feature map: ViT, DINOv2, DINOv3, SigLIP, CLIP, ConvNeXt, ...

All that is particular to a model is found from timm: prefix tokens, patch size, input size, mean and standard
deviation.
"""

import math
from collections.abc import Mapping
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

import samlove.model.torchvision_ops  # noqa: F401
from samlove.config import VisualConfig
from samlove.errors import RequestError
from samlove.features.encoders.base import library_versions
from samlove.features.encoders.frames import CENTRE, FrameEncoder, normalise
from samlove.model.weights import load_into, load_state_dict, resolve_file
from stores.fingerprint import sha256_file

WHERE = "model and model_args in configs/*/visual.yaml"


def build_timm(model: str, model_args: Mapping[str, Any], image_size: int | None) -> nn.Module:
    """timm's model with random weights and no classifier, for frames (n,3,S,S), S = image_size.

    model: timm's name. model_args: overrides of its architecture. image_size: None for the model's own. Raises
    RequestError if timm cannot build it.
    """
    import timm

    pretrained = timm.get_pretrained_cfg(model)
    fixed = pretrained is None or pretrained.fixed_input_size  # others, such as ConvNeXt, take frames of any size
    options: dict[str, Any] = {"img_size": image_size} if fixed and image_size else {}
    try:
        return timm.create_model(model, pretrained=False, num_classes=0, **options, **model_args)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        what = f"it for {image_size} pixels" if image_size else "it"
        raise RequestError(f"{model}: timm cannot build {what}: {reason}; see {WHERE}") from error


def frame_tokens(network: Any, frames: Tensor) -> Tensor:
    """Normalised frames (n,3,S,S) -> (n,1+P,d): a vector of the whole frame, then one for each patch, row by row.

    The patches are what `forward_features` gives, without register and distillation tokens, which have no position; a
    feature map becomes one token per place. The vector of the frame is the class token. A model without one gives its
    own pooled output (`forward_head` before the classifier; SigLIP's attention pooling, ConvNeXt's mean), or the mean
    of the patches if that output has a different width.

    Raises RequestError if the model gives anything but tokens or a feature map.
    """
    features = network.forward_features(frames)
    shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        raise RequestError(
            f"{type(network).__name__}: expected a timm model with patch tokens (n,P,d) or a feature map (n,d,h,w), "
            f"found {shape}; see {WHERE}"
        )
    has_class = features.ndim == 3 and getattr(network, "cls_token", None) is not None
    if features.ndim == 3:
        patches = features[:, getattr(network, "num_prefix_tokens", int(has_class)) :]
    else:
        channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        patches = (features if channels_last else features.permute(0, 2, 3, 1)).flatten(1, 2)
    if patches.shape[1] == 0:
        raise RequestError(f"{type(network).__name__}: expected patch tokens, found a class token alone; see {WHERE}")
    whole = features[:, 0] if has_class else network.forward_head(features, pre_logits=True)
    if whole.shape != (len(patches), patches.shape[-1]):
        whole = patches.mean(dim=1)
    return torch.cat([whole[:, None], patches], dim=1)


def input_size(config: VisualConfig) -> int:
    """Pixels per side of the encoder's input: image_size or, without it, what timm's model was trained at."""
    import timm

    if config.image_size is not None:
        return config.image_size
    pretrained = timm.get_pretrained_cfg(config.model)
    if pretrained is None:
        raise RequestError(f"{config.model}: timm has no model of this name, or no size for it; see {WHERE}")
    return int(pretrained.input_size[-1])


def token_shape(config: VisualConfig) -> tuple[int, int]:
    """(1+P, d) of the model's tokens, found without computing anything. Raises RequestError as `build_timm` does."""
    return _token_shape(config.model, tuple(sorted(config.model_args.items())), input_size(config))


@cache
def _token_shape(model: str, model_args: tuple[tuple[str, int], ...], size: int) -> tuple[int, int]:
    with torch.device("meta"), torch.inference_mode():
        network = build_timm(model, dict(model_args), size).eval()
        tokens = frame_tokens(network, torch.zeros(1, 3, size, size))
    return tokens.shape[1], tokens.shape[2]


class TimmEncoder(FrameEncoder):
    """A video's frames -> visual (N,1+P,d): the frame's vector in row 0 of axis 1, then its patches; see frame_tokens.

    Whole frames are resized to a square, without the centre crop of ImageNet's evaluation, because the object may be
    anywhere. If the checkpoint was trained at a different size, position embeddings are resampled.
    """

    def __init__(self, config: VisualConfig, device: torch.device):
        """Raises RequestError, saying how to get them, if the weights are missing."""
        import timm

        self.config, self.device = config, device
        self.image_size = input_size(config)
        pretrained = timm.get_pretrained_cfg(config.model)
        self.mean = tuple(pretrained.mean) if pretrained else CENTRE
        self.std = tuple(pretrained.std) if pretrained else CENTRE
        source = pretrained.hf_hub_id if pretrained and pretrained.hf_hub_id else "timm/NAME"
        remedy = f"set weights: hub:{source}, or download model.safetensors from https://huggingface.co/{source}"
        what = f"timm's weights of {config.model}"
        self.weights = resolve_file(config.weights, what, remedy, hub_file="model.safetensors")

    def fingerprint(self) -> dict:
        return {
            "encoder": self.config.encoder,
            "weights_sha256": sha256_file(self.weights),
            "model": self.config.model,
            "model_args": [f"{key}={value}" for key, value in sorted(self.config.model_args.items())],
            "image_size": self.image_size,
            "resize": "whole frame to a square, bicubic",
            "mean": list(self.mean),
            "std": list(self.std),
            "dtype": self.config.dtype,
            "libraries": library_versions("torch", "timm", "pillow"),
        }

    @cached_property
    def network(self) -> Any:
        network: Any = build_timm(self.config.model, self.config.model_args, self.image_size)
        own = network.state_dict()
        classifier = network.pretrained_cfg["classifier"] or ()  # a name, or several
        heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
        tensors = load_state_dict(self.weights)
        tensors = {name: value for name, value in tensors.items() if name in own or not name.startswith(heads)}
        _resample_positions(network, tensors)
        load_into(network, tensors, self.weights, f"timm's {self.config.model}")
        return network.to(self.device).eval()

    def _tokens(self, frames: Tensor) -> Tensor:
        return frame_tokens(self.network, normalise(frames, self.mean, self.std))


def _resample_positions(network: Any, tensors: dict[str, Tensor]) -> None:
    """Resample `pos_embed`, (1, prefix + grid, d), in the weights of a model that was trained at a different size."""
    from timm.layers import resample_abs_pos_embed

    own, trained = getattr(network, "pos_embed", None), tensors.get("pos_embed")
    if own is None or trained is None or own.ndim != 3 or trained.ndim != 3 or trained.shape[1] == own.shape[1]:
        return
    prefix = 0 if network.no_embed_class else network.num_prefix_tokens
    places = trained.shape[1] - prefix
    if places > 0 and math.isqrt(places) ** 2 == places:
        grid = network.patch_embed.grid_size
        tensors["pos_embed"] = resample_abs_pos_embed(trained, grid, num_prefix_tokens=prefix)
