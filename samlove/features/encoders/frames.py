"""Shared by the frame encoders: selecting frames, reading them as squares, normalising, encoding a batch of videos."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from samlove.config import VisualConfig
from samlove.data.dataset import RefAvsFolder, load_frame
from samlove.features.encoders.base import Arrays, OnDevice, Sources, to_store

CENTRE = (0.5, 0.5, 0.5)  # timm's default mean and standard deviation


def frame_sources(folder: RefAvsFolder, media_ids: Iterable[str], frames: int) -> Sources:
    """The paths of each video's `frames` frames: longer videos are cut, shorter ones repeat their last frame.

    A video without frames gets the path of its first frame, so that the reading error names that path.
    """

    def paths(media_id: str) -> list[Path]:
        last = max(folder.frame_count(media_id), 1) - 1
        return [folder.frame_path(media_id, min(t, last)) for t in range(frames)]

    return Sources(media_ids, paths)


def load_square(paths: Sequence[Path], size: int) -> Tensor:
    """Frames -> uint8 (N,3,size,size), each resized whole by Pillow's bicubic filter, which antialiases.

    Raises SamloveError, naming the path, if a frame cannot be read.
    """
    squares = {path: to_squares([load_frame(path)], size) for path in dict.fromkeys(paths)}  # the last may be repeated
    return torch.cat([squares[path] for path in paths])


def to_squares(frames: Iterable[np.ndarray], size: int) -> Tensor:
    """Frames, uint8 (H,W,3) each -> uint8 (N,3,size,size), as `load_square` makes them."""
    images = (Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC) for frame in frames)
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def normalise(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (n,3,S,S) -> float32: scaled to 0..1, minus the mean, divided by the standard deviation, per channel."""
    scaled = frames.float() / 255
    mean_, std_ = (torch.tensor(v, dtype=torch.float32, device=frames.device)[:, None, None] for v in (mean, std))
    return (scaled - mean_) / std_


class FrameEncoder(OnDevice):
    """What the encoders of frames share; `_tokens` differs. Whole frames are resized to a square of image_size."""

    config: VisualConfig
    image_size: int

    def load(self, source: Sequence[Path]) -> Tensor:
        """N frames -> uint8 (N,3,S,S). Raises SamloveError, naming the path, if a frame cannot be read."""
        return load_square(source, self.image_size)

    @torch.inference_mode()
    def encode(self, items: list[Tensor]) -> list[Arrays]:
        """One {visual (N,1+P,d) of the configured dtype} per item; all items are one batch."""
        visual = to_store("visual", self._tokens(torch.cat(items).to(self.device)), self.config.dtype)
        ends = np.cumsum([len(item) for item in items])
        return [{"visual": part} for part in np.split(visual, ends[:-1])]

    def _tokens(self, frames: Tensor) -> Tensor:
        """Frames, uint8 (n,3,S,S) -> (n,1+P,d)."""
        raise NotImplementedError
