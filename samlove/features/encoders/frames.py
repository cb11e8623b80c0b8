"""Shared by the frame encoders: selecting frames, reading them as squares, normalising, encoding a batch of videos."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from samlove.config import Dtype
from samlove.data.dataset import RefAvsFolder, load_frame
from samlove.features.encoders.base import Arrays, Sources, to_store

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
    squares: dict[Path, np.ndarray] = {}
    for path in paths:
        if path not in squares:  # a short video repeats its last frame
            image = Image.fromarray(load_frame(path)).resize((size, size), Image.Resampling.BICUBIC)
            squares[path] = np.asarray(image)
    return torch.from_numpy(np.stack([squares[path] for path in paths])).permute(0, 3, 1, 2)  # (N, 3, size, size)


def normalise(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (n,3,S,S) -> float32: scaled to 0..1, minus the mean, divided by the standard deviation, per channel."""
    scaled = frames.float() / 255
    mean_, std_ = (torch.tensor(v, dtype=torch.float32, device=frames.device)[:, None, None] for v in (mean, std))
    return (scaled - mean_) / std_


def encode_frames(
    items: list[Tensor], tokens: Callable[[Tensor], Tensor], device: torch.device, dtype: Dtype
) -> list[Arrays]:
    """Videos, uint8 (N,3,S,S) each -> one {visual (N,1+P,d)} per video, encoded in one batch.

    tokens: the encoder, frames (n,3,S,S) -> (n,1+P,d).
    """
    visual = to_store("visual", tokens(torch.cat(items).to(device)), dtype)  # (videos * N, 1 + P, d)
    ends = np.cumsum([len(item) for item in items])
    return [{"visual": part} for part in np.split(visual, ends[:-1])]
