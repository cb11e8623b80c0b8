"""Media: frames by time, and sound, of a video file, a folder of frames or a picture."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from samlove.data.dataset import load_frame
from samlove.data.images import LOSSLESS, LOSSY
from samlove.errors import RequestError, SamloveError, absence
from samlove.media.sound import Sound, open_sound
from samlove.media.video import VideoFrames

RATE = 16_000  # samples per second of `Media.sound`
TOLERANCE = 6e-4  # seconds; Matroska and others round timestamps to milliseconds
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".jp2", ".avif")
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".wma")
EXPECTED = "expected a video, a picture or a folder of frames"


class Frames(Protocol):
    """Frames by number: of a video file or of picture files."""

    times: np.ndarray  # (N,) seconds, ascending from 0
    duration: float  # seconds
    fps: float | None
    size: tuple[int, int]  # width, height

    def decode(self, numbers: Iterable[int]) -> Iterator[np.ndarray]: ...

    def close(self) -> None: ...


class Media:
    """Frames and sound on one timeline, on which 0 is the first frame. Not for several threads at once.

    path: as given. duration: seconds to the end of the last frame. fps: mean frame rate; None for a single frame. size:
    (width, height) of the upright frames. track: the sound, sample by sample; None without one.
    """

    def __init__(self, path: Path, frames: Frames, sound: Sound | None) -> None:
        self.path, self._frames, self.track = path, frames, sound
        self.duration, self.fps, self.size = frames.duration, frames.fps, frames.size

    @property
    def has_sound(self) -> bool:
        return self.track is not None

    def __enter__(self) -> "Media":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._frames.close()
        if self.track is not None:
            self.track.close()

    def frames_at(self, times: Sequence[float]) -> np.ndarray:
        """uint8 (N,H,W,3), RGB: the frame shown at each time, which is the last one that begins then or earlier.

        Before the first frame that is the first one, after the end the last one. Decodes from the nearest key frame.
        Raises SamloveError if the file cannot be decoded.
        """
        numbers = self._numbers(np.asarray(times, dtype=np.float64))
        distinct, places = np.unique(numbers, return_inverse=True)
        width, height = self.size
        found = np.zeros((len(distinct), height, width, 3), dtype=np.uint8)
        for place, frame in enumerate(self._frames.decode(distinct.tolist())):
            found[place] = frame
        return found if np.array_equal(distinct, numbers) else found[places]

    def frames(self, start: float, seconds: float, fps: float | None = None) -> Iterator[tuple[float, np.ndarray]]:
        """Time and frame uint8 (H,W,3), in order and one by one, from `start` until before `start + seconds`.

        fps: frames at start + k / fps. None: every frame of the file; the first is the one shown at `start`, and has
        this time. Nothing is shown after `duration`.
        """
        end = min(start + seconds, self.duration)
        if fps is not None:
            times = start + np.arange(max(ceil((end - start) * fps - TOLERANCE), 0)) / fps
            numbers = self._numbers(times)
        else:
            first, last = self._numbers(np.array([start, end - 2 * TOLERANCE]))
            numbers = np.arange(first, last + 1) if end > start else np.arange(0)
            times = np.maximum(self._frames.times[numbers], start)
        yield from zip(times.tolist(), self._frames.decode(numbers.tolist()), strict=True)

    def sound(self, start: float, seconds: float, rate: int = RATE) -> np.ndarray | None:
        """float32 (S,), 1 at full scale: the mean of all channels, resampled to `rate`; None without a sound track.

        The samples are those that the pipeline reads, bit for bit, from a WAV file cut at `start` (load_audio, then
        soxr). S is seconds * rate, or less if the track ends earlier. Windows with ascending `start` decode the file
        once. Raises SamloveError if samples are not finite.
        """
        return None if self.track is None else self.track.mono(start, seconds, rate)

    def _numbers(self, times: np.ndarray) -> np.ndarray:
        return np.maximum(np.searchsorted(self._frames.times, times + TOLERANCE, "right") - 1, 0)


class PictureFrames:
    """Picture files as frames, `fps` a second."""

    def __init__(self, paths: list[Path], fps: float, duration: float) -> None:
        self._paths = paths
        self.times = np.arange(len(paths)) / fps
        self.duration, self.fps = duration, fps if len(paths) > 1 else None
        self._number, self._frame = 0, load_frame(paths[0])
        self.size = self._frame.shape[1], self._frame.shape[0]

    def decode(self, numbers: Iterable[int]) -> Iterator[np.ndarray]:
        """uint8 (H,W,3) each. Raises SamloveError, naming the path, if one cannot be read or has another size."""
        for number in numbers:
            if number != self._number:
                frame = load_frame(self._paths[number])
                if frame.shape != self._frame.shape:
                    raise SamloveError(
                        f"{self._paths[number]}: expected {self.size[0]}x{self.size[1]} pixels as in the first frame, "
                        f"found {frame.shape[1]}x{frame.shape[0]}; resize the frames"
                    )
                self._number, self._frame = number, frame
            yield self._frame

    def close(self) -> None:
        """Nothing is open."""


def open_media(path: Path, sound: Path | None = None, fps: float = 1.0) -> Media:
    """Open a video file, a folder of frames, or a picture; a context manager, or call `close`.

    A video file is read once, without decoding, for the exact times of its frames.
    A folder holds pictures, which are the frames in natural order (2.jpg before 10.jpg), and at most one sound file; or
    it is a video's folder of Ref-AVS, with the pictures in `frames`. Pictures are shown at `fps`, one a second as in
    Ref-AVS. A single picture lasts as long as its sound, or 1 / fps.
    sound: a file that is heard instead of the video's own sound; its first sample is at time 0.
    Raises RequestError if `path` or `sound` is missing, or is nothing of this kind; SamloveError if it is damaged or
    truncated.
    """
    path = Path(path)
    if not fps > 0:
        raise RequestError(f"fps: expected a number above 0, found {fps}")
    if not path.is_file() and not path.is_dir():
        raise RequestError(f"{path}: {absence(path)}; {EXPECTED}")
    if path.is_dir():
        sound = sound or _sound_in(path)
    track, seconds = (None, 0.0) if sound is None else open_sound(Path(sound))
    if path.is_dir():
        paths = _pictures_in(path)
        return Media(path, PictureFrames(paths, fps, len(paths) / fps), track)
    if _is_picture(path):
        return Media(path, PictureFrames([path], fps, seconds or 1 / fps), track)
    frames = VideoFrames(path)
    if track is None and frames.sound_index is not None:
        try:
            track = Sound(path, frames.sound_index, frames.origin)
        except BaseException:
            frames.close()
            raise
    return Media(path, frames, track)


def _is_picture(path: Path) -> bool:
    """Whether Pillow knows the file as a single picture. A GIF is a video, whatever it holds."""
    try:
        with Image.open(path, formats=[name for name in (*LOSSLESS, *LOSSY) if name != "GIF"]) as image:
            return getattr(image, "n_frames", 1) == 1 or image.format == "MPO"
    except Exception:  # Pillow raises all kinds for files of other formats
        return False


def _pictures_in(folder: Path) -> list[Path]:
    inside = folder / "frames" if (folder / "frames").is_dir() else folder
    paths = sorted(_with_suffix(inside, PICTURES), key=lambda path: _natural(path.name))
    if not paths:
        raise RequestError(f"{inside}: expected frames ({', '.join(PICTURES)}), found none; {EXPECTED}")
    return paths


def _sound_in(folder: Path) -> Path | None:
    found = sorted(_with_suffix(folder, SOUNDS))
    if len(found) > 1:
        raise RequestError(f"{folder}: expected at most one sound file, found {found[0].name} and {found[1].name}")
    return found[0] if found else None


def _with_suffix(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.name[0] != "."]
    except OSError as error:
        raise RequestError(f"{folder}: cannot be read: {error.strerror}") from None


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by value."""
    parts = re.split(r"([0-9]+)", name)
    return list(chain((int(part), "") if part.isdecimal() else (-1, part) for part in parts))
