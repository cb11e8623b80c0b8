"""The training step without cached features: the media of its samples are decoded and encoded for every step.

It uses the encoders and readers of the feature stages, in the step's precision, and the trainer's own loop, whose
threads decode ahead. Features stay on the device, rounded as the stores round them. Text features are read from the
shards in any case, which favours the online step.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from copy import copy, deepcopy
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from samlove.bench.media import FRAMES
from samlove.bench.steps import operations
from samlove.data.dataset import RefAvsFolder
from samlove.data.loader import ExpressionDataset, collate
from samlove.features.encoders.frames import frame_sources, normalise
from samlove.features.encoders.sam2_image import LEVELS, MEAN, STD, Sam2ImageEncoder
from samlove.features.encoders.timm_image import TimmEncoder
from samlove.features.encoders.vggish import VggishEncoder
from samlove.train import Batch, Samples, Trainer

EXPRESSIONS = 5  # per video, as in Ref-AVS
KEPT = 64  # decoded videos that are kept until their other expressions ask for them
CACHED = ("audio", "audio_valid", "visual", *LEVELS)  # what an online step computes itself
PARTS = {"audio": "patches", "visual": "frames", "sam2": "first_frame"}  # encoder -> what it encodes
DECODED = (*PARTS.values(), "audio_valid")


class Encoders(NamedTuple):
    audio: VggishEncoder
    visual: TimmEncoder
    sam2: Sam2ImageEncoder

    def decode(self, folder: RefAvsFolder, media_id: str) -> dict[str, Any]:
        """A video's patches (N,1,96,64), audio_valid (N,), frames (N,3,S,S) uint8 and first_frame (1,3,S',S') uint8."""
        paths = frame_sources(folder, [media_id], FRAMES)[media_id]
        patches, valid = self.audio.load(folder.audio_path(media_id))
        return {
            "patches": patches,
            "audio_valid": torch.from_numpy(valid),
            "frames": self.visual.load(paths),
            "first_frame": self.sam2.load(paths[:1]),
        }

    def encode(self, decoded: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
        """V decoded videos -> the arrays CACHED of each, (V, ...), float16 on the encoders' device."""
        found = {"audio_valid": decoded["audio_valid"].to(self.visual.device, non_blocking=True)}
        for name in PARTS:
            found |= self.part(name, decoded, precision)
        return found

    def part(self, name: str, decoded: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
        """What one of PARTS gives."""
        device, given = self.visual.device, decoded[PARTS[name]]  # (V, N, ...)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            found = self._run(name, given.to(device, non_blocking=True).flatten(0, 1))
        if name != "sam2":  # which has one frame per video
            found = {array: values.unflatten(0, given.shape[:2]) for array, values in found.items()}
        return {array: values.half() for array, values in found.items()}

    @torch.no_grad()
    def _run(self, name: str, rows: Tensor) -> dict[str, Tensor]:
        if name == "audio":
            return {"audio": self.audio.network(rows)}
        if name == "visual":
            return {"visual": self.visual._tokens(rows)}
        network = self.sam2.network
        forward = network.forward_image if self.sam2.config.cache_point == "post_conv" else network.image_encoder
        return dict(zip(LEVELS, forward(normalise(rows, MEAN, STD))["backbone_fpn"], strict=True))

    def operations(self, decoded: dict[str, Tensor]) -> dict[str, int]:
        """Floating-point operations of each of PARTS on decoded videos, counted without computing anything."""
        meta = Encoders(copy(self.audio), copy(self.visual), copy(self.sam2))
        for encoder, other in ((self.audio, meta.audio), (self.visual, meta.visual), (self.sam2, meta.sam2)):
            other.__dict__["network"] = deepcopy(encoder.network).to("meta")
        rows = {name: decoded[array].to("meta").flatten(0, 1) for name, array in PARTS.items()}
        return {name: operations(partial(meta._run, name, rows[name])) for name in PARTS}


class OnlineItems:
    """Expressions with decoded media: item i is expression i % 5 of video i // 5. Media repeat after the last.

    shared: a video is decoded once for its expressions, if they follow each other, and bears one number for all.
    """

    def __init__(
        self, dataset: ExpressionDataset, folder: RefAvsFolder, names: Sequence[str], encoders: Encoders, shared: bool
    ) -> None:
        """dataset: gives text and mask of every expression; its first videos are those of `names`."""
        self.dataset, self.folder, self.names, self.encoders, self.shared = dataset, folder, names, encoders, shared
        self._lock, self._decoded = Lock(), dict[int, Future[dict[str, Any]]]()

    def __len__(self) -> int:
        return len(self.names) * EXPRESSIONS

    def order(self, epoch: int) -> np.ndarray:
        """Expressions of a video next to each other if they share it, else in random order. int64 (len(self),)."""
        if self.shared:
            return epoch * len(self) + np.arange(len(self))
        return np.random.default_rng(epoch).permutation(len(self))

    def __getitem__(self, i: int) -> dict[str, Any]:
        video, expression = divmod(i, EXPRESSIONS)
        place = video % len(self.names)
        item = self.dataset[place * EXPRESSIONS + expression]
        own = {name: value for name, value in item.items() if name not in CACHED}
        decoded = self._once(video, place) if self.shared else self._decode(place)
        return own | {"decoded": decoded, "video": video if self.shared else object()}

    def _decode(self, place: int) -> dict[str, Any]:
        return self.encoders.decode(self.folder, self.names[place])

    def _once(self, video: int, place: int) -> dict[str, Any]:
        """The decoded video; the first thread that asks for it decodes it, and the others wait."""
        with self._lock:
            known = video in self._decoded
            future = self._decoded.setdefault(video, Future())
            if len(self._decoded) > KEPT:
                del self._decoded[next(iter(self._decoded))]
        if not known:
            try:
                future.set_result(self._decode(place))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def collate_online(items: Sequence[dict[str, Any]]) -> Batch:
    """As samlove.data.loader.collate, with DECODED stacked once per video, and `videos`, the video of each item."""
    videos = {item["video"]: item["decoded"] for item in items}
    own = [{name: value for name, value in item.items() if name not in ("decoded", "video")} for item in items]
    decoded = {name: torch.stack([video[name] for video in videos.values()]) for name in DECODED}
    return collate(own) | decoded | {"videos": [item["video"] for item in items]}


class OnlineTrainer(Trainer):
    """A trainer whose batches come from OnlineItems. It keeps the features of the last batch's videos."""

    encoders: Encoders
    _features: dict[Any, dict[str, Tensor]] | None = None  # video -> its arrays

    def _on_device(self, batch: Batch) -> Batch:
        return super()._on_device(self.encoded(batch))

    def encoded(self, batch: Batch) -> Batch:
        """The batch with the arrays CACHED in place of DECODED."""
        videos = list(dict.fromkeys(batch["videos"]))
        known = self._features or {}
        new = [place for place, video in enumerate(videos) if video not in known]
        features = {video: known[video] for video in videos if video in known}
        if new:
            decoded = {name: batch[name] if len(new) == len(videos) else batch[name][new] for name in DECODED}
            arrays = self.encoders.encode(decoded, self.config.precision)
            features |= {
                videos[place]: {name: array[row] for name, array in arrays.items()} for row, place in enumerate(new)
            }
        self._features = features
        own = {name: value for name, value in batch.items() if name not in (*DECODED, "videos")}
        of_item = [features[video] for video in batch["videos"]]
        joined = {name: torch.stack([one[name] for one in of_item]) for name in CACHED}
        return own | joined


def online_samples(items: OnlineItems) -> Samples:
    """For an OnlineTrainer, which trains only."""
    return Samples(items, items, collate_online, items.order)
