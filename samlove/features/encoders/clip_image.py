"""CLIP's image encoder (Radford et al., 2021) through transformers: the alternative in Table 2."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from samlove.config import VisualConfig
from samlove.features.encoders.base import library_versions
from samlove.features.encoders.frames import FrameEncoder, normalise
from samlove.features.encoders.transformers_folder import CLIP, load_network, read_config, resolve_folder, sha256_model

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # from OpenAI's training


class ClipImageEncoder(FrameEncoder):
    """A video's frames -> visual (N,1+P,d): tokens of the last block, with the class token in row 0 of axis 1.

    The tokens are transformers' `last_hidden_state`, before the norm that precedes CLIP's projection. Whole frames are
    resized to a square, as in TimmEncoder. If image_size is given and differs from the encoder's own, position
    embeddings are resampled. The weights may be a whole CLIP or only its image encoder.
    """

    def __init__(self, config: VisualConfig, device: torch.device):
        """Raises RequestError, saying how to get them, if the weights are missing."""
        self.config, self.device = config, device
        self.folder = resolve_folder(config.weights, "CLIP", CLIP, ("clip", "clip_vision_model"))
        own: int = getattr(read_config(str(self.folder), "vision"), "image_size", 224)
        self.image_size = own if config.image_size is None else config.image_size

    def fingerprint(self) -> dict:
        return {
            "encoder": "clip",
            "weights_sha256": sha256_model(self.folder),
            "image_size": self.image_size,
            "resize": "whole frame to a square, bicubic",
            "mean": list(MEAN),
            "std": list(STD),
            "layer": "last_hidden_state",
            "dtype": self.config.dtype,
            "libraries": library_versions("torch", "transformers", "pillow"),
        }

    @cached_property
    def network(self) -> Any:
        return load_network("CLIPVisionModel", self.folder).to(self.device)

    def _tokens(self, frames: Tensor) -> Tensor:
        pixels = normalise(frames, MEAN, STD)
        other_size = self.image_size != self.network.config.image_size
        return self.network(pixel_values=pixels, interpolate_pos_encoding=other_size).last_hidden_state  # (n, 1+P, d)
