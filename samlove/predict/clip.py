"""Which seconds and frames of a video are segmented, and their features.

A clip is cut into windows of as many seconds as the model was trained on (N, usually 10), each encoded like a video of
Ref-AVS: N frames, one a second, and N seconds of sound. SAM 2 tracks `fps` frames a second; N consecutive ones are an
item of its feature store. So at one frame a second, the features of a clip of one window are those of the pipeline.
A window or item that the clip ends in repeats the last frame, as the pipeline does with short videos.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np

from samlove.errors import RequestError
from samlove.media import Media

TOLERANCE = 1e-3  # seconds, as samlove.media rounds
FASTEST = 1000.0  # frames per second


@dataclass(frozen=True)
class Window:
    """Some seconds of a clip that are encoded together. start, end: seconds of the video. first, stop: tracked frames,
    `stop` excluded; at the end of the clip, frames may follow that only repeat the last one."""

    start: float
    end: float
    first: int
    stop: int


@dataclass(frozen=True)
class Clip:
    """The part of a video from `start` to `end`, in seconds; N frames a window, `fps` tracked frames a second."""

    start: float
    end: float
    fps: float
    N: int

    @classmethod
    def of(cls, media: Media, start: float, seconds: float | None, fps: float | None, N: int) -> "Clip":
        """seconds: None to the end of the video. fps: None for every frame of it.

        Raises RequestError if the video has nothing there, or a value is out of range.
        """
        if not 0 <= start < media.duration:
            raise RequestError(f"{media.path}: start: expected 0 s to its end, {media.duration:.2f} s, found {start:g}")
        if seconds is not None and not seconds > 0:
            raise RequestError(f"seconds: expected a number above 0, found {seconds:g}")
        if fps is None:
            fps = min(max(media.fps or 1.0, 1.0), FASTEST)
        elif not 1 <= fps <= FASTEST:
            raise RequestError(f"fps: expected 1 to {FASTEST:g} frames per second, found {fps:g}")
        end = media.duration if seconds is None else min(start + seconds, media.duration)
        return cls(start, end, fps, N)

    @property
    def frames(self) -> int:
        """Number of tracked frames."""
        return max(ceil((self.end - self.start) * self.fps - TOLERANCE), 1)

    @property
    def times(self) -> np.ndarray:
        """(T,) float64: the second of the video that each tracked frame shows."""
        return self.start + np.arange(self.frames) / self.fps

    def time(self, frame: int) -> float:
        """The second that a tracked frame shows; frames after the last one repeat it."""
        return float(self.start + min(frame, self.frames - 1) / self.fps)

    @property
    def items(self) -> int:
        """Number of items of SAM 2's features."""
        return ceil(self.frames / self.N)

    def item_times(self, item: int) -> np.ndarray:
        """(N,): the times of the frames of an item."""
        return self.times[np.minimum(np.arange(item * self.N, (item + 1) * self.N), self.frames - 1)]

    @property
    def windows(self) -> list[Window]:
        count = max(ceil((self.end - self.start - TOLERANCE) / self.N), 1)
        firsts = [self._frame_at(number * self.N) for number in range(count)]
        stops = [*firsts[1:], self.items * self.N]
        starts = [self.start + number * self.N for number in range(count)]
        ends = [*starts[1:], self.end]
        return [Window(*values) for values in zip(starts, ends, firsts, stops, strict=True)]

    def second_times(self, window: Window) -> np.ndarray:
        """(N,): the times of the frames that the fusion module sees."""
        last = max(ceil(window.end - window.start - TOLERANCE), 1) - 1
        return window.start + np.minimum(np.arange(self.N), last)

    def seconds_of(self, window: Window) -> list[int]:
        """The tracked frames of a window that show its seconds, or are the next ones."""
        seconds = range(ceil((window.stop - window.first) / self.fps - TOLERANCE))
        return sorted({frame for s in seconds if (frame := window.first + self._frame_at(s)) < window.stop})

    def _frame_at(self, seconds: float) -> int:
        """The first tracked frame that is not before a time after the start."""
        return ceil(seconds * self.fps - TOLERANCE)

    def key(self, name: str, time: float) -> str:
        """The key of the item of video `name` that begins at a time. At 0 it is the name itself, as in the pipeline."""
        return f"{name}@{time:.4f}".rstrip("0").rstrip(".") if time > TOLERANCE else name


def sound_blocks(media: Media, clip: Clip, rate: int, size: int) -> Iterator[np.ndarray]:
    """The sound of each window, in blocks of `size` samples: (blocks, size) float32, 1 at full scale.

    Zeros fill the last block. Yields nothing without a sound track.
    """
    for window in clip.windows:
        samples = media.sound(window.start, window.end - window.start, rate)
        if samples is not None:
            yield np.pad(samples, (0, -len(samples) % size)).reshape(-1, size)
