"""The sound of a media file as samples, decoded from the beginning in order, so that every sample is exact."""

from collections.abc import Generator, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream

from samlove.errors import RequestError, SamloveError
from samlove.media.container import Opened, reading, scan, time_base

GAP = 0.1  # seconds; timestamps may jitter by less without meaning silence
MARGIN = 2.0  # seconds read after a window, so that the resampler's last samples do not depend on where it ends


def open_sound(path: Path) -> tuple["Sound", float]:
    """The sound of a file, from its beginning, and its seconds.

    Raises RequestError without a sound track, SamloveError if the file is truncated or nothing can be decoded.
    """
    opened = Opened(path)
    try:
        stream = opened.container.streams.best("audio")
        if stream is None:
            raise RequestError(f"{path}: expected a sound track, found none; give a sound file")
        packets, base = scan(opened.container, path)[stream.index], time_base(stream)
        origin = min((pts for pts in packets.pts if pts is not None), default=0)
        return Sound(path, stream.index, origin * base), float((packets.end - origin) * base)
    finally:
        opened.close()


class Sound:
    """One sound track of a file, from second `origin` of the file's own time.

    rate: samples per second. channels: their number. layout: FFmpeg's name of their places, such as "stereo".
    """

    def __init__(self, path: Path, index: int, origin: Fraction) -> None:
        """index: of the stream. Raises SamloveError if nothing in it can be decoded."""
        self.path, self._index, self._origin = path, index, origin
        decoded = self._decoded()
        _, first = next(decoded, (None, None))
        decoded.close()
        if first is None:
            raise SamloveError(f"{path}: expected sound, found none that can be decoded; convert it again")
        self.rate, self.channels, self.layout = first.sample_rate, first.layout.nb_channels, first.layout.name
        self._reader: Generator[np.ndarray] | None = None  # after it has read `_held`, which begins at sample `_at`
        self._at, self._held = 0, np.zeros(0, dtype=np.float32)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()

    def chunks(self, start: float) -> Generator[np.ndarray]:
        """All samples from second `start` on: float32 (n, channels), 1 at full scale, in pieces.

        Silence fills the time before the track begins, and gaps in it.
        """
        wanted = round(start * self.rate)
        at: int | None = None  # number of the next sample
        for time, frame in self._decoded():
            piece = self._samples(frame)
            stated = at or 0 if time is None else round((time - self._origin) * self.rate)
            if at is None:
                yield from self._silence(wanted, stated)
                at = stated
            elif abs(stated - at) > GAP * self.rate:
                yield from self._silence(max(at, wanted), stated)
                piece, at = piece[max(at - stated, 0) :], max(at, stated)
            yield piece[max(wanted - at, 0) :]
            at += len(piece)

    def _silence(self, start: int, end: int) -> Iterator[np.ndarray]:
        for at in range(start, end, self.rate):
            yield np.zeros((min(self.rate, end - at), self.channels), dtype=np.float32)

    def mono(self, start: float, seconds: float, rate: int) -> np.ndarray:
        """float32 (at most seconds * rate,), the mean of all channels at `rate`, as the audio encoders read a file cut
        at `start`. Calls with ascending `start` decode the file once."""
        import soxr

        begin, count = round(start * self.rate), round((seconds + MARGIN) * self.rate)
        if self._reader is None or begin < self._at:
            self._reader = self.chunks(start)
            self._at, self._held = begin, np.zeros(0, dtype=np.float32)
        pieces, have = [self._held], len(self._held)
        while have < begin - self._at + count and (piece := next(self._reader, None)) is not None:
            pieces.append(piece.mean(axis=1, dtype=np.float32))
            have += len(piece)
            if have < begin - self._at:  # still before the window
                self._at, pieces, have = self._at + have, [], 0
        self._held = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.float32)
        self._held, self._at = self._held[max(begin - self._at, 0) :], max(begin, self._at)
        samples = self._held[:count]
        if not np.isfinite(samples).all():
            raise SamloveError(f"{self.path}: expected finite samples, found NaN or infinity; convert the sound to WAV")
        if self.rate != rate and len(samples):
            samples = soxr.resample(samples, self.rate, rate)
        return samples[: round(seconds * rate)].copy()

    def _decoded(self) -> Generator[tuple[Fraction | None, AudioFrame]]:
        """All frames with their second in the file's time. As in players, damaged packets are skipped."""
        opened = Opened(self.path)
        try:
            stream = opened.container.streams[self._index]
            assert isinstance(stream, AudioStream)
            with reading(self.path):
                for packet in opened.container.demux(stream):
                    try:
                        frames = packet.decode()
                    except av.InvalidDataError:
                        continue
                    for frame in frames:
                        time = None if frame.pts is None else frame.pts * (frame.time_base or time_base(stream))
                        yield time, frame
        finally:
            opened.close()

    def _samples(self, frame: AudioFrame) -> np.ndarray:
        """float32 (n, channels), 1 at full scale, converted from any sample format as libsndfile does."""
        if (frame.sample_rate, frame.layout.nb_channels) != (self.rate, self.channels):
            raise SamloveError(
                f"{self.path}: expected {self.channels} channels at {self.rate} Hz throughout, found "
                f"{frame.layout.nb_channels} at {frame.sample_rate} Hz; convert the sound to WAV"
            )
        values: np.ndarray = frame.to_ndarray()  # (channels, n), or (1, n * channels) if interleaved
        values = values.T if frame.format.is_planar else values.reshape(-1, self.channels)
        if values.dtype == np.uint8:
            values = (values.astype(np.float32) - 128) / 128
        elif values.dtype.kind == "i":
            values = values.astype(np.float32) / 2.0 ** (8 * values.itemsize - 1)
        return np.ascontiguousarray(values, dtype=np.float32)
