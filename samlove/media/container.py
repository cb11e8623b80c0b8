"""Opens media files with PyAV, and lists their packets.

FFmpeg reads through a Python file object, and may open nothing else: playlists (HLS, concat) cannot name other files
or hosts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer
from av.stream import Stream

from samlove.errors import RequestError, SamloveError, absence

STATED = ("mov", "matroska", "wav")  # formats of which FFmpeg gives the duration in the header
TRUNCATED = 1.0  # seconds that may be missing at the end: headers are rarely exact
NOT_MEDIA = ("tty",)  # FFmpeg renders text files


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn FFmpeg's errors, and those of reading the file for it, into a SamloveError with the path."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or type(error).__name__
        raise SamloveError(f"{path}: cannot be decoded, possibly damaged or truncated: {reason}") from None


class Opened:
    """The file at `path`, opened by PyAV: `container`. Raises RequestError if FFmpeg does not know it."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("rb")
        except OSError:
            raise RequestError(f"{path}: {absence(path)}; expected a video or sound file") from None
        try:
            # The whitelist names no protocol: FFmpeg opens no second file.
            self.container = av.open(self._file, "r", options={"protocol_whitelist": "none"}, metadata_errors="replace")
            if self.container.format.name in NOT_MEDIA:
                raise av.InvalidDataError(0, "text")
        except BaseException as error:
            self._file.close()
            if not isinstance(error, av.FFmpegError | OSError):
                raise
            found = f"something else or a damaged file ({error.strerror})" if path.stat().st_size else "an empty file"
            raise RequestError(
                f"{path}: expected a video or sound file that FFmpeg reads, found {found}; play it to check it, or "
                "convert it to MP4"
            ) from None

    def close(self) -> None:
        self.container.close()
        self._file.close()


@dataclass
class Packets:
    """The packets of one stream: presentation times in its time base, in the order of the file; None if not stated."""

    pts: list[int | None] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)  # presentation times of packets at which decoding can begin
    end: int = 0  # where the last shown packet ends
    last: int = 0  # duration of the packet that begins last


def scan(container: InputContainer, path: Path) -> dict[int, Packets]:
    """The packets of all streams by index, read without decoding. Raises SamloveError if the file is truncated."""
    found: dict[int, Packets] = {stream.index: Packets() for stream in container.streams}
    latest = Fraction(0)  # second at which the last packet of any stream ends
    with reading(path):
        for packet in container.demux():
            if not packet.size:  # ends the stream
                continue
            packets, time = found[packet.stream_index], packet.dts if packet.pts is None else packet.pts
            if time is not None and packet.time_base:
                latest = max(latest, (time + (packet.duration or 0)) * packet.time_base)
            if packet.is_discard:  # decoded but not shown: before the cut of an edit list
                continue
            packets.pts.append(packet.pts)
            if packet.pts is not None:
                if packet.pts + (packet.duration or 0) >= packets.end:
                    packets.end, packets.last = packet.pts + (packet.duration or 0), packet.duration or 0
                if packet.is_keyframe:
                    packets.keys.append(packet.pts)
    missing = _stated(container) - float(latest - Fraction(container.start_time or 0, av.time_base))
    if missing > TRUNCATED:
        raise SamloveError(
            f"{path}: truncated: expected {_stated(container):.1f} s as its header states, found only "
            f"{_stated(container) - missing:.1f} s; copy or download it again"
        )
    return found


def _stated(container: InputContainer) -> float:
    """The seconds that the header of the file states; 0 if FFmpeg estimates them instead."""
    name = container.format.name.split(",")[0]
    if name == "avi":
        return max((float(s.frames / s.average_rate) for s in container.streams.video if s.average_rate), default=0.0)
    return (container.duration or 0) / av.time_base if name in STATED else 0.0


def time_base(stream: Stream) -> Fraction:
    """Seconds per unit of the stream's timestamps."""
    return stream.time_base or Fraction(1, av.time_base)
