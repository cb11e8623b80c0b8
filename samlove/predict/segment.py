"""Segments the objects that sentences refer to in a video of any length: `load`, `Segmenter` and `Segmentation`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from samlove.data.audit import normalise
from samlove.device import default_device
from samlove.errors import RequestError, path_text
from samlove.media import Media, open_media
from samlove.model.checkpoint import load_model
from samlove.predict.clip import Clip
from samlove.predict.features import Bar, Features, Plan, encode, release, video_digest
from samlove.predict.setup import Setup, find_setup
from samlove.predict.tracking import Prompt, TrackedWindow, Tracker
from stores.manifest import existing_parent, refuse_existing

LONGEST_SENTENCE = 10_000  # characters


@dataclass(frozen=True)
class WindowPrompts:
    """A window of a clip, and how each sentence was asked there. start, end: seconds of the video."""

    start: float
    end: float
    prompts: tuple[Prompt | None, ...]  # by sentence; None: SAM 2's memory alone tracked the object


@dataclass(frozen=True)
class Segmentation:
    """The masks of K sentences on T frames of a video."""

    sentences: tuple[str, ...]
    times: np.ndarray  # (T,) float64: the second of the video that each frame shows
    scores: np.ndarray  # (K, T) float32: SAM 2's object score, a logit; above 0: the object is in sight
    logits: np.ndarray  # (K, T, S, S) float32: mask logits on SAM 2's grid, a square whatever the shape of the video
    size: tuple[int, int]  # (H, W) of the video
    windows: tuple[WindowPrompts, ...]

    @property
    def masks(self) -> np.ndarray:
        """(K, T, H, W) bool at the video's size, computed anew each time: K * T * H * W bytes."""
        return np.stack([masks_of(logits, self.size) for logits in self.logits])


def masks_of(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Mask logits (n, S, S) -> masks bool (n, H, W): resized bilinearly, as SAM 2 does, and above 0."""
    masks = np.empty((len(logits), *size), bool)
    for number, one in enumerate(logits):  # one by one: a float mask of a large video is large
        resized = F.interpolate(torch.from_numpy(one)[None, None], size=size, mode="bilinear", align_corners=False)
        masks[number] = (resized[0, 0] > 0).numpy()
    return masks


def load(checkpoint: str | Path | None = None, device: str | torch.device | None = None) -> "Segmenter":
    """A segmenter for a trained checkpoint.

    checkpoint: a file such as data/refavs/model/best.safetensors, or a folder that `samlove bundle` wrote; None: the
    small model that comes with samlove, which knows only the shapes and sounds of LAVS-synth.
    device: None for the first GPU or, without one, the CPU.
    Raises RequestError if a file is missing, SamloveError if one is damaged.
    """
    return Segmenter(find_setup(checkpoint), torch.device(device) if device else default_device())


@dataclass(frozen=True)
class Run:
    """A clip whose features are computed. windows: tracks the clip, window by window, in constant memory."""

    media: Media
    clip: Clip
    sentences: tuple[str, ...]
    digest: str  # of the video's files
    fingerprints: dict[str, dict[str, Any]] = field(repr=False)  # of the four kinds of features
    windows: Iterator[TrackedWindow] = field(repr=False)


class Segmenter:
    """A checkpoint and its encoders' settings. Networks are loaded when they are needed, and released afterwards."""

    def __init__(self, setup: Setup, device: torch.device) -> None:
        self.setup, self.device = setup, device
        _ = setup.header  # a damaged checkpoint is reported at once

    def segment(
        self,
        video: str | Path,
        sentences: str | Sequence[str],
        *,
        start: float = 0.0,
        seconds: float | None = None,
        fps: float | None = 1.0,
        sound: str | Path | None = None,
        features: str | Path | None = None,
        keep_features: str | Path | None = None,
        bar: Bar | None = None,
    ) -> Segmentation:
        """Segment the object that each sentence refers to, in all frames.

        video: a file that FFmpeg reads, a folder of frames, or a picture (samlove.media.open_media). sentences: one or
        several, which share everything but the tracking. start, seconds: the part of the video; by default all of it.
        fps: tracked frames per second, at least 1; None: every frame. The first one shows `start`.
        sound: a file that is heard instead of the video's own sound; a video without sound is silent.
        features: a folder of feature stores to read instead of encoding the video: one that `keep_features` wrote, or
        data/PROFILE/features of the pipeline, if `video` is named like the media_id.
        keep_features: a new folder for the stores, which take at the paper's sizes 8.4 MB per tracked frame.
        bar: shows the progress of each step; called like tqdm.

        A video is encoded in windows of 10 s (the length that the model was trained on). SAM 2's memory goes on from
        one window to the next; samlove.predict.tracking says how. A clip of one window at one frame per second gives,
        on a CPU, the masks of the pipeline's `infer`, bit for bit, if all sentences of the video are asked together.
        All networks together never need more memory than the largest one and SAM 2's memory; `Segmentation` itself
        takes 4 * K * T * S * S bytes.

        Raises RequestError if the request is wrong (no such file, nothing at `start`, no sentence), SamloveError if a
        file is damaged or does not fit the checkpoint.
        """
        with self.run(
            video,
            sentences,
            start=start,
            seconds=seconds,
            fps=fps,
            sound=sound,
            features=features,
            keep_features=keep_features,
            bar=bar,
        ) as run:
            windows = list(run.windows)
            return Segmentation(
                run.sentences,
                run.clip.times,
                np.concatenate([window.scores for window in windows], axis=1),
                np.concatenate([window.logits for window in windows], axis=1),
                run.media.size[::-1],
                tuple(WindowPrompts(w.window.start, w.window.end, tuple(w.prompts)) for w in windows),
            )

    @contextmanager
    def run(
        self,
        video: str | Path,
        sentences: str | Sequence[str],
        *,
        start: float = 0.0,
        seconds: float | None = None,
        fps: float | None = 1.0,
        sound: str | Path | None = None,
        features: str | Path | None = None,
        keep_features: str | Path | None = None,
        scratch: Path | None = None,
        bar: Bar | None = None,
    ) -> Iterator[Run]:
        """As `segment`, but gives the windows one by one. scratch: where temporary feature stores are written."""
        texts, show = _checked(sentences), bar or _silent
        if features is not None and keep_features is not None:
            raise RequestError("features and keep_features: expected at most one of them, found both")
        path, heard = Path(video).expanduser(), Path(sound).expanduser() if sound is not None else None
        kept = Path(keep_features).expanduser() if keep_features is not None else None
        if kept is not None:
            refuse_existing(kept)
            scratch = existing_parent(kept)
        with open_media(path, heard) as media, TemporaryDirectory(prefix=".features-", dir=scratch) as temporary:
            clip = Clip.of(media, start, seconds, fps, self.setup.header.dims["frames"])
            name = path_text(path.resolve().name if path.is_dir() else path.resolve().stem)
            plan = Plan(media, clip, texts, name, video_digest(path, heard))
            if features is None:
                folder = Path(temporary) / "features"
                encode(plan, self.setup, folder, self.device, show)
                if kept is not None:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    folder = folder.rename(kept)
            else:
                folder = Path(features).expanduser()
            found = Features.open(folder, plan, self.setup, self.device)
            windows = self._track(found, clip, len(texts), show)
            try:
                yield Run(media, clip, texts, plan.digest, found.fingerprints, windows)
            finally:
                windows.close()  # type: ignore[attr-defined]

    def _track(self, features: Features, clip: Clip, count: int, bar: Bar) -> Iterator[TrackedWindow]:
        setup = self.setup
        model = load_model(setup.checkpoint, setup.sam2).to(self.device)
        try:
            tracker = Tracker(model, features, clip, count, setup.infer, setup.header.threshold)
            with bar(total=clip.frames, desc="track", unit="frame") as progress:
                for window in tracker.windows():
                    yield window
                    progress.update(window.logits.shape[1])
        finally:
            del model
            release(self.device)


def _checked(sentences: str | Sequence[str]) -> tuple[str, ...]:
    """The sentences as the index normalises expressions. Raises RequestError if there are none, or an empty one."""
    texts = tuple(normalise(text) for text in ([sentences] if isinstance(sentences, str) else sentences))
    if not texts or not all(texts):
        raise RequestError(f"sentences: expected at least one, none of them empty, found {list(texts)}")
    if odd := next((text for text in texts if text.encode("utf-8", "replace") != text.encode("utf-8", "ignore")), None):
        raise RequestError(f"sentences: expected UTF-8, found {odd[:80]!r}; check the encoding of the terminal")
    if long := next((text for text in texts if len(text) > LONGEST_SENTENCE), None):
        raise RequestError(f"sentences: expected at most {LONGEST_SENTENCE:,} characters, found {len(long):,}")
    return texts


def _silent(**options: Any) -> tqdm:
    return tqdm(**options, disable=True)
