"""SAM 2's image encoder through the sam2 package: the embeddings that its mask decoder and memory work on.

Frames are prepared as in SAM2VideoPredictor's own loader. The embeddings are taken at one of two points: `post_conv`,
after the mask decoder's conv_s0 and conv_s1, which `SAM2Base.forward_image` applies, or `pre_conv`, before them.
Position encodings are not stored, because they follow from the size. The reader must add `no_mem_embed`.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

import samlove.model.torchvision_ops  # noqa: F401
from samlove.config import Sam2Config, read_sam2_config
from samlove.errors import RequestError
from samlove.features.encoders.base import Arrays, OnDevice, library_versions, to_store
from samlove.features.encoders.frames import load_square, normalise
from samlove.model.sam2_build import (
    checkpoint_path,
    decoder_convs_sha256,
    instantiate_sam2,
    load_sam2_weights,
)
from stores.codec import encode
from stores.fingerprint import sha256_file

LEVELS = ("sam2_high_res_0", "sam2_high_res_1", "sam2_image_embed")  # strides 4, 8, 16, in SAM 2's order
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in sam2.utils.misc.load_video_frames


class Sam2ImageEncoder(OnDevice):
    """Frames -> sam2_image_embed (F,C,h,w), sam2_high_res_0 (F,C0,4h,4w), sam2_high_res_1 (F,C1,2h,2w).

    post_conv: C0 = C/8, C1 = C/4; pre_conv: C0 = C1 = C. In the train split, F is `train_frames`.
    """

    def __init__(self, config: Sam2Config, device: torch.device):
        """Raises RequestError if the configuration or checkpoint is missing, or the decoder takes only one level."""
        self.config, self.device = config, device
        self.model = read_sam2_config(config.config).model
        if not self.model.get("use_high_res_features_in_sam", False):
            raise RequestError(f"{config.config}: expected use_high_res_features_in_sam: true, found false or none")
        self.image_size = int(self.model.image_size)
        self.checkpoint = checkpoint_path(config.checkpoint)

    def fingerprint(self) -> dict:
        post_conv = self.config.cache_point == "post_conv"
        return {
            "encoder": "sam2",
            "weights_sha256": sha256_file(self.checkpoint),
            "image_encoder": OmegaConf.to_yaml(self.model.image_encoder, sort_keys=True),
            "cache_point": self.config.cache_point,
            "decoder_convs_sha256": decoder_convs_sha256(str(self.checkpoint)) if post_conv else None,
            "image_size": self.image_size,
            "resize": "whole frame to a square, bicubic",
            "mean": list(MEAN),
            "std": list(STD),
            "dtype": self.config.dtype,
            "compression": self.config.compression,
            "libraries": library_versions("torch", "sam2", "pillow"),
        }

    @cached_property
    def network(self) -> Any:
        network = instantiate_sam2(self.config.config)
        load_sam2_weights(network, str(self.checkpoint))
        return network.to(self.device)

    def load(self, source: Sequence[Path]) -> Tensor:
        """F frames -> uint8 (F,3,S,S). Raises SamloveError, naming the path, if a frame cannot be read."""
        return load_square(source, self.image_size)

    @torch.inference_mode()
    def encode(self, items: list[Tensor]) -> list[Arrays]:
        """The three levels of each item's frames, in the configured dtype (see stores.codec)."""
        frames = normalise(torch.cat(items).to(self.device), MEAN, STD)  # (all frames, 3, S, S)
        forward = self.network.forward_image if self.config.cache_point == "post_conv" else self.network.image_encoder
        levels = forward(frames)["backbone_fpn"]
        stored: Arrays = {}
        for name, level in zip(LEVELS, levels, strict=True):
            stored |= self._narrow(name, level)  # (all frames, C, h, w)
        ends = np.cumsum([len(item) for item in items])
        parts = {name: np.split(level, ends[:-1]) for name, level in stored.items()}
        return [{name: part[i] for name, part in parts.items()} for i in range(len(items))]

    def _narrow(self, name: str, level: Tensor) -> Arrays:
        dtype = self.config.dtype
        if dtype == "bfloat16" or dtype == "int8":
            return encode(name, to_store(name, level, "float32"), dtype)
        return {name: to_store(name, level, dtype)}
