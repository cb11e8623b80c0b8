"""Tracks the objects of several sentences through the windows of a clip.

How windows connect. The token of the first window prompts SAM 2, as in the pipeline. SAM 2's memory then goes on into
the next windows, which is what keeps the object the same. A later window asks again, with its own token, only for
sentences whose object was nowhere in the window before. If SAM 2 finds the object with it, a new track begins there;
otherwise the old one goes on, because its object may come back.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sam2.modeling.sam2_base import NO_OBJ_SCORE
from torch import Tensor

from samlove.config import InferConfig
from samlove.infer import prompt_frames
from samlove.model.sam2 import LEVELS, Seen, Track
from samlove.model.sam2_love import SamLove
from samlove.predict.clip import Clip, Window
from samlove.predict.features import Features

FOUND = 0.0  # SAM 2's object score (a logit) from which an object counts as present


@dataclass(frozen=True)
class Prompt:
    """A sentence's token that was put to SAM 2. time: the second of the prompted frame. score: the object score there,
    a logit. used: whether a track began with it."""

    time: float
    score: float
    used: bool


@dataclass(frozen=True)
class TrackedWindow:
    """What SAM 2 says about the frames of a window. prompts: by sentence; None if the memory alone tracked it."""

    window: Window
    logits: np.ndarray  # (K, n, S, S) float32; all NO_OBJ_SCORE where a mask is left empty
    scores: np.ndarray  # (K, n) float32, object scores
    prompts: list[Prompt | None]


class Tracker:
    """Tracks K sentences. threshold: the object score of the prompted frame below which masks are left empty."""

    def __init__(
        self, model: SamLove, features: Features, clip: Clip, count: int, config: InferConfig, threshold: float | None
    ) -> None:
        self._model, self._features, self._clip, self._config = model, features, clip, config
        self._threshold = threshold
        self._tracks: list[tuple[list[int], Track]] = []  # sentences that share a track's batch
        self._shown = np.zeros(count, bool)
        self._lost: np.ndarray = np.ones(count, bool)  # nowhere in the window before

    def windows(self) -> Iterator[TrackedWindow]:
        """All windows in order; memory does not depend on their number."""
        device = self._model.sam2.device
        for window in self._clip.windows:
            with torch.autocast(device.type, torch.bfloat16, enabled=self._config.precision == "bfloat16"):
                yield self._window(window)

    @torch.no_grad()
    def _window(self, window: Window) -> TrackedWindow:
        begun, prompts = self._ask(window, np.flatnonzero(self._lost).tolist())
        # Only the way back of `best` sees the frames that repeat the last one.
        stop = window.stop if self._config.prompt_frame == "best" else min(window.stop, self._clip.frames)
        frames = range(window.first, stop)
        parts = [(rows, self._follow(track, {}, [list(frames)], window)) for rows, track in self._tracks]
        for frame, rows, token in begun:
            track = Track(self._model.sam2, self._clip.items * self._clip.N)
            seen = {frame: track.prompt(self._features.sam2(frame), frame, len(rows), token=token)}
            ways = [list(range(frame + 1, stop)), list(range(frame - 1, window.first - 1, -1))]
            parts.append((rows, self._follow(track, seen, ways, window)))
            self._tracks.append((rows, track))
        size = parts[0][1][0].shape[1:]
        logits = np.empty((len(self._lost), *size), np.float32)
        scores = np.empty(logits.shape[:2], np.float32)
        for rows, (masks, said) in parts:
            logits[rows], scores[rows] = masks, said
        logits[~self._shown] = NO_OBJ_SCORE
        self._lost = np.asarray((logits <= 0).all(axis=(1, 2, 3)))
        return TrackedWindow(window, logits, scores, prompts)

    def _ask(self, window: Window, rows: list[int]) -> tuple[list[tuple[int, list[int], Tensor]], list[Prompt | None]]:
        """Put the window's tokens of some sentences to SAM 2. Returns the tracks to begin, each a frame with its
        sentences and their tokens, and what became of each sentence. Removes those sentences from the old tracks."""
        prompts: list[Prompt | None] = [None] * len(self._lost)
        if not rows:
            return [], prompts
        sam2, config = self._model.sam2, self._config
        fusion = self._features.fusion(window, rows)
        token = self._model.token({name: array.to(sam2.device) for name, array in fusion.items()})
        candidates = [window.first] if config.prompt_frame == "first" else self._clip.seconds_of(window)
        said = [self._features.sam2(frame) for frame in candidates]
        embeds = {name: torch.cat([levels[name] for levels in said]) for name in LEVELS}
        scores, places = prompt_frames(sam2, embeds, token, config)
        tracked = {row for others, _ in self._tracks for row in others}
        limit = FOUND if self._threshold is None else self._threshold
        begun: dict[int, list[int]] = {}  # frame -> places in `rows`
        for number, (row, score, place) in enumerate(zip(rows, scores.tolist(), places, strict=True)):
            used = score >= limit or row not in tracked
            prompts[row] = Prompt(float(self._clip.time(candidates[place])), score, used)
            self._shown[row] |= self._threshold is None or score >= self._threshold
            if used:
                begun.setdefault(candidates[place], []).append(number)
        new = {rows[number] for numbers in begun.values() for number in numbers}
        self._tracks = [part for track in self._tracks if (part := _without(*track, new))]
        found = [(frame, [rows[n] for n in numbers], token[numbers]) for frame, numbers in sorted(begun.items())]
        return found, prompts

    def _follow(
        self, track: Track, seen: dict[int, Seen], ways: list[list[int]], window: Window
    ) -> tuple[np.ndarray, np.ndarray]:
        """Track a window's frames along `ways`, one after the other. seen: the prompted frame.

        Returns logits (batch, n, S, S) and object scores (batch, n) of the frames that the clip has.
        """
        ends = window.stop == self._clip.items * self._clip.N
        for number, way in enumerate(ways):
            later = [frames[0] for frames in ways[number + 1 :] if frames] + [window.stop] * (not ends)
            for place, frame in enumerate(way):
                upcoming = way[place + 1 : place + 2] + later
                seen[frame] = track.step(self._features.sam2(frame), frame, upcoming)
        shown = range(window.first, min(window.stop, self._clip.frames))
        masks = torch.stack([seen[frame].masks for frame in shown], dim=1).float()
        scores = torch.stack([seen[frame].object_score for frame in shown], dim=1).float()
        return masks.cpu().numpy(), scores.cpu().numpy()


def _without(rows: list[int], track: Track, others: set[int]) -> tuple[list[int], Track] | None:
    """A track without some sentences; None if no sentence is left."""
    kept = [number for number, row in enumerate(rows) if row not in others]
    if len(kept) == len(rows):
        return rows, track
    return ([rows[number] for number in kept], track.select(kept)) if kept else None
