"""Encodes a clip into four feature stores like those of the pipeline, one encoder after another, and reads them.

The stores are temporary, or kept for other sentences later. Memory does not depend on the length of the clip.
"""

import gc
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from samlove.data.arrays import check_arrays
from samlove.data.digest import folder_digest, source_ids
from samlove.errors import RequestError, SamloveError, absence
from samlove.features.encoders.base import Arrays, Encoder
from samlove.features.encoders.frames import to_squares
from samlove.infer import STORES, Sources, fusion_inputs
from samlove.media import Media
from samlove.predict.clip import Clip, Window
from samlove.predict.setup import Setup
from stores import FeatureStore, FeatureStoreWriter
from stores.fingerprint import sha256_file

FOLDERS = {"audio": "audio", "visual": "visual", "text": "text", "sam2": "sam2_eval"}  # as in data/PROFILE/features
SHARDS = {"audio": 64, "visual": 8, "text": 64, "sam2": 4}  # items in memory at a time; 0.3 GB of SAM 2's, at most
CODE = "samlove.predict"  # in the manifest of stores that this module wrote
Bar = Callable[..., tqdm]
Make = Callable[[], Any]


@dataclass(frozen=True)
class Plan:
    """What is encoded: a clip of a video and the sentences, with the keys of their items."""

    media: Media
    clip: Clip
    sentences: Sequence[str]
    name: str  # of the video, in the keys
    digest: str  # of its files

    def times(self, kind: str) -> dict[str, np.ndarray]:
        """For each item of the feature `kind`, the times (N,) of its frames, or of its seconds of sound."""
        clip = self.clip
        if kind == "sam2":
            found = [clip.item_times(item) for item in range(clip.items)]
        else:
            found = [clip.second_times(window) for window in clip.windows]
        return {clip.key(self.name, float(times[0])): times for times in found}

    def keys(self, kind: str) -> list[str]:
        return list(dict.fromkeys(self.sentences)) if kind == "text" else list(self.times(kind))

    def ids(self, kind: str) -> dict[str, str]:
        """For each item a hash of what it is computed from."""
        if kind == "text":
            return dict(source_ids({key: key for key in self.keys(kind)}))
        end = self.clip.end if kind == "audio" else 0  # a window's sound ends there, in the middle of a second
        return dict(source_ids({key: [self.digest, repr((t.tolist(), end))] for key, t in self.times(kind).items()}))


def video_digest(path: Path, sound: Path | None) -> str:
    """A hash of all files of a video."""
    files = [folder_digest(path) if path.is_dir() else sha256_file(path)]
    return source_ids({"": [*files, *([sha256_file(sound)] if sound else [])]})[""]


def encode(plan: Plan, setup: Setup, folder: Path, device: torch.device, bar: Bar) -> None:
    """Compute all features and publish them as stores in `folder`. Each encoder is loaded once, and then released.

    Raises RequestError if weights are missing, SamloveError if they are not those that the checkpoint was trained with,
    or if a file cannot be decoded; OSError if the disk is full.
    """
    for kind, make in setup.encoders(device).items():
        encoder = make()
        setup.check(kind, encoder.fingerprint(), kind, "use the weights and settings that it was trained with")
        _write(kind, encoder, plan, folder, bar)
        network = weakref.ref(encoder.network)
        del encoder
        if network() is not None:  # timm's are in reference cycles; collecting takes a while, so not always
            gc.collect()
        release(device)


def release(device: torch.device) -> None:
    """Give the GPU's memory that is no longer used back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _write(kind: str, encoder: Encoder, plan: Plan, folder: Path, bar: Bar) -> None:
    keys = plan.keys(kind)
    writer = FeatureStoreWriter(
        folder / FOLDERS[kind],
        folder / f".{FOLDERS[kind]}",
        encoder.fingerprint(),
        keys,
        SHARDS[kind],
        chunk_rows=1 if kind == "sam2" else None,
        compression=encoder.config.compression if kind == "sam2" else "none",  # type: ignore[attr-defined]
        ids=plan.ids(kind),
        code=CODE,
    )
    items = _items(kind, encoder, plan)
    # Written in a thread, so that an interrupt waits for the end of the shard. Otherwise zarr's own threads would still
    # be writing it while the folder is deleted.
    with bar(total=len(keys), desc=kind, unit="item") as progress, ThreadPoolExecutor(1) as thread:
        for number, shard in writer.plan():
            done = {}
            for key in shard:
                done[key] = encoder.encode([next(items)])[0]
                progress.update()
            thread.submit(writer.write_shard, number, done).result()
    writer.publish()
    shutil.rmtree(folder / f".{FOLDERS[kind]}", ignore_errors=True)


def _items(kind: str, encoder: Any, plan: Plan) -> Iterator[Any]:
    """What the encoder takes for each item, in order, prepared as its `load` does."""
    media, clip = plan.media, plan.clip
    if kind == "text":
        yield from map(encoder.load, plan.keys(kind))
    elif kind == "audio":
        for window in clip.windows:
            yield encoder.prepare(heard(media, window, encoder.rate))
    else:
        for times in plan.times(kind).values():
            yield _squares(media, times, encoder.image_size)


def heard(media: Media, window: Window, rate: int) -> np.ndarray:
    """The sound of a window, float32 (S,) at `rate`; a video without sound is silent."""
    seconds = window.end - window.start
    samples = media.sound(window.start, seconds, rate)
    return np.zeros(round(seconds * rate), np.float32) if samples is None else samples


def _squares(media: Media, times: np.ndarray, size: int) -> Tensor:
    """Frames -> uint8 (N,3,size,size); one that is shown at several times is resized once."""
    distinct, places = np.unique(times, return_inverse=True)
    return to_squares(media.frames_at(distinct.tolist()), size)[torch.from_numpy(places)]


class Features:
    """The features of a clip, in stores that `encode` or the pipeline wrote."""

    def __init__(self, sources: Sources, plan: Plan, words: dict[str, Arrays]) -> None:
        """words: the text features of sentences that the store does not have."""
        self._sources, self._plan, self._words = sources, plan, words
        self._items = plan.keys("sam2")

    @classmethod
    def open(cls, folder: Path, plan: Plan, setup: Setup, device: torch.device) -> "Features":
        """The stores in `folder`; sentences that they do not have are encoded.

        Raises RequestError if a store is missing, SamloveError if the stores are of other weights or settings than the
        checkpoint's, of another video, or have no features of these seconds or frames. Of stores that the pipeline
        wrote, only the video's name is compared.
        """
        lacking = [name for name in FOLDERS.values() if not (folder / name).is_dir()]
        if lacking:
            found = f"no {lacking[0]}" if folder.is_dir() else absence(folder)
            raise RequestError(
                f"{folder}: {found}; expected the stores {', '.join(FOLDERS.values())}: a folder that --keep-features "
                "wrote, or data/PROFILE/features"
            )
        sources = Sources.open(folder)
        for kind in STORES:
            store: FeatureStore = getattr(sources, kind)
            setup.check(kind, store.manifest["fingerprint"], store.path, "compute them again, without --features")
            check_arrays(kind, store)
            if kind != "text":
                _check_items(kind, store, plan)
        missing = [text for text in plan.keys("text") if text not in sources.text]
        words = {}
        if missing:
            encoder = setup.encoders(device)["text"]()
            setup.check("text", encoder.fingerprint(), "text", "use the weights that it was trained with")
            words = dict(zip(missing, encoder.encode([encoder.load(text) for text in missing]), strict=True))
        return cls(sources, plan, words)

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        return self._sources.fingerprints

    def fusion(self, window: Window, rows: list[int]) -> dict[str, Tensor]:
        """The fusion module's inputs for some of the sentences and a window: (rows, ...) each."""
        key = self._plan.clip.key(self._plan.name, window.start)
        texts = [self._plan.sentences[row] for row in rows]
        words = [self._words[text] if text in self._words else self._sources.text.read(text) for text in texts]
        return fusion_inputs(self._sources.audio.read(key), self._sources.visual.read(key), words)

    def sam2(self, frame: int) -> dict[str, Tensor]:
        """SAM 2's embeddings of a tracked frame, (1, ...) each."""
        item, row = divmod(frame, self._plan.clip.N)
        arrays = self._sources.sam2.read(self._items[item], slice(row, row + 1))
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _check_items(kind: str, store: FeatureStore, plan: Plan) -> None:
    again = "compute them again, without --features"
    rows = store.shapes["audio_valid" if kind == "audio" else "visual" if kind == "visual" else "sam2_image_embed"][0]
    if rows != plan.clip.N:
        raise RequestError(f"{store.path}: expected items of {plan.clip.N} frames or seconds, found {rows}; {again}")
    for key, id in plan.ids(kind).items():
        if key not in store:
            raise RequestError(f"{store.path}: expected features {key!r}, found none of this name and time; {again}")
        if store.manifest["code"] == CODE and store.id_of(key) != id:
            raise SamloveError(f"{store.path}: {key!r}: features of another video, or of other frames; {again}")
