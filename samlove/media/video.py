"""The frames of a video file by number, whatever its container, codec and frame rate."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av import VideoFrame
from av.container import InputContainer
from av.video.stream import VideoStream

from samlove.data.images import MAX_PIXELS
from samlove.errors import RequestError, SamloveError
from samlove.media.container import Opened, Packets, reading, scan, time_base

FORWARD = 16  # frames; a jump of fewer is decoded rather than sought
GUESSED = 25  # frames per second of a file that states neither times nor a rate


class VideoFrames:
    """The frames of a video file. Reads all packets once, so that times are exact for variable frame rates too.

    times: (N,) float64, seconds from the first frame. duration: seconds to the end of the last frame. fps: mean frame
    rate; None for a single frame. size: (width, height), upright. origin: second of the first frame in the file's own
    time. sound_index: of the audio stream; None if there is none.
    """

    _decoded: Iterator[tuple[int, VideoFrame]]
    _last: VideoFrame | None  # the frame decoded last, `_at` its time
    _at: int
    _ahead: tuple[int, VideoFrame] | None  # the time and the frame after it, if that is decoded too

    def __init__(self, path: Path) -> None:
        """Raises RequestError without a video track; SamloveError if the file is truncated or cannot be decoded."""
        self.path = path
        self._shape: tuple[int, int] | None = None  # of the first frame, as decoded
        self._opened = Opened(path)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        stream = self._opened.container.streams.best("video")
        if not isinstance(stream, VideoStream) or stream.disposition & stream.disposition.attached_pic:
            kinds = ", ".join(sorted({s.type for s in self._opened.container.streams})) or "nothing"
            raise RequestError(f"{self.path}: expected a video track, found {kinds}; give a picture and this sound")
        self._stream = stream
        packets = scan(self._opened.container, self.path)
        found = packets[stream.index]
        self.origin, self.times, self.duration = self._timeline(found)
        sound = self._opened.container.streams.best("audio")
        self.sound_index = sound.index if sound is not None and packets[sound.index].pts else None
        self._restart()
        first = self._decode_at(0)
        self._shape = (first.width, first.height)
        self.size = self._upright(first).shape[1::-1]
        self.fps = (len(self.times) - 1) / float(self.times[-1]) if len(self.times) > 1 else None

    def _timeline(self, found: Packets) -> tuple[Fraction, np.ndarray, float]:
        """The second of the first frame in the file's own time, the times of all frames, and the duration."""
        if not found.pts:
            raise SamloveError(f"{self.path}: expected frames in the video track, found none; convert it again")
        base, last = time_base(self._stream), found.last
        stated = np.array([pts for pts in found.pts if pts is not None], dtype=np.int64)
        if len(stated) < len(found.pts):  # a raw stream: its frames have a rate only
            base = 1 / Fraction(self._stream.average_rate or self._stream.guessed_rate or GUESSED)
            stated, last = np.arange(len(found.pts)), 1
            self._counted = True
        else:  # AVI states times in the order of decoding, which is another one if frames depend on later ones
            self._counted = self._opened.container.format.name == "avi" and len(found.keys) < len(stated)
        self._pts = np.unique(stated)
        self._keys = self._pts[:1] if self._counted or not found.keys else np.unique(np.array(found.keys))
        times = (self._pts - self._pts[0]) * base.numerator / base.denominator
        step = float(np.median(np.diff(times))) if len(times) > 1 else 1 / GUESSED
        origin = Fraction(0) if self._counted else self._pts[0] * base
        return origin, times, float(times[-1]) + (float(last * base) or step)

    def decode(self, numbers: Iterable[int]) -> Iterator[np.ndarray]:
        """The frames of these numbers, each uint8 (H,W,3), RGB, upright. Ascending numbers are decoded only once."""
        for number in numbers:
            yield self._upright(self._decode_at(number))

    def close(self) -> None:
        self._opened.close()

    def _decode_at(self, number: int) -> VideoFrame:
        """The decodable frame with this number, or the last one before it; the first one if there is none before."""
        wanted = int(self._pts[number])
        key = int(self._keys[max(int(np.searchsorted(self._keys, wanted, "right")) - 1, 0)])
        if self._last is None or wanted < self._at:
            self._seek(key)
        elif np.searchsorted(self._pts, key) - np.searchsorted(self._pts, self._at) > FORWARD:
            self._seek(key)
        self._advance(wanted)
        if self._last is None:
            raise SamloveError(f"{self.path}: expected frames, found none that can be decoded; convert it again")
        return self._last

    def _advance(self, wanted: int) -> None:
        while self._last is None or self._at < wanted:
            if self._ahead is None:
                self._ahead = next(self._decoded, None)
            if self._ahead is None or (self._last is not None and self._ahead[0] > wanted):
                return
            (self._at, self._last), self._ahead = self._ahead, None

    def _seek(self, key: int) -> None:
        """Continue at the key frame, or begin again if the file has no way to get exactly there."""
        if key > self._pts[0] and not self._counted:
            try:
                self._opened.container.seek(key, stream=self._stream)
            except (av.FFmpegError, OSError):
                return self._restart()
            self._reset()
            self._ahead = next((found for found in self._decoded if found[0] >= key), None)
            if self._ahead is not None and self._ahead[0] == key:
                return None
        return self._restart()

    def _restart(self) -> None:
        """Begin at the first frame, in a new container: not all formats can go back."""
        index = self._stream.index
        self._opened.close()
        self._opened = Opened(self.path)
        stream = self._opened.container.streams[index]
        assert isinstance(stream, VideoStream)
        stream.thread_type = "AUTO"
        self._stream = stream
        self._reset()

    def _reset(self) -> None:
        self._decoded = _decode(self._opened.container, self._stream, self.path, self._pts if self._counted else None)
        self._last, self._at, self._ahead = None, 0, None

    def _upright(self, frame: VideoFrame) -> np.ndarray:
        """uint8 (H,W,3), RGB, turned and mirrored as the file's display matrix says."""
        width, height = self._shape or (frame.width, frame.height)  # a track may change its size midway
        image = np.asarray(frame.to_ndarray(format="rgb24", width=width, height=height))
        return np.ascontiguousarray(_turned(image, frame))


def _decode(
    container: InputContainer, stream: VideoStream, path: Path, counted: np.ndarray | None
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames from where the container is, with their time in the stream's units.

    counted: the times of all frames from the first on, if those of the decoder are wrong. As in players, packets that
    cannot be decoded are skipped.
    """
    count = 0
    with reading(path):
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                continue
            for frame in frames:
                if frame.width * frame.height > MAX_PIXELS:
                    raise SamloveError(
                        f"{path}: expected frames of at most {MAX_PIXELS:,} pixels, found {frame.width}x{frame.height}"
                    )
                time = frame.pts if counted is None else int(counted[min(count, len(counted) - 1)])
                count += 1
                if time is not None:
                    yield time, frame


def _turned(image: np.ndarray, frame: VideoFrame) -> np.ndarray:
    """Apply the frame's display matrix: (x, y) of the decoded picture is shown at (a x + c y, b x + d y)."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return image
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    if abs(b) > abs(a):
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
