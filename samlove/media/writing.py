"""Writes videos that browsers play: H.264 and AAC in MP4."""

from collections.abc import Iterable
from fractions import Fraction
from itertools import chain
from math import inf
from pathlib import Path

import av
import numpy as np
from av import AudioFrame, VideoFrame
from av.container import OutputContainer
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from samlove.errors import SamloveError
from samlove.media.reading import Media
from samlove.media.sound import Sound

QUALITY = 20  # x264's constant rate factor: 0 is lossless, 18 looks like the original, 28 is small
PRESET = "veryfast"  # of x264: a third of the time of its default, and files of about the same size
KEY_SECONDS = 2  # between key frames, so that a player can jump
BT709 = 1  # H.264's number of these colours, their curve and their matrix
AAC_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
AAC_RATE = 48_000  # for a sound of another rate


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    fps: float,
    sound_of: Media | None = None,
    start: float = 0.0,
    seconds: float = inf,
    quality: int = QUALITY,
) -> None:
    """Write frames uint8 (H,W,3), RGB, as MP4, with the sound of `sound_of` from second `start`.

    H.264 with yuv420p pixels (odd sizes get one more row or column, a copy of the last), AAC in mono or stereo, and the
    header first, as browsers need it. The sound ends after `seconds`, or with the last frame. Frames are taken one by
    one. quality: 0 (lossless but for the resolution of colour) to 51.
    The file is written under another name, then renamed.
    Raises SamloveError if there are no frames, or if they differ in size; OSError if the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    stream = iter(frames)
    first = next(stream, None)
    if first is None:
        raise SamloveError(f"{path}: expected frames to write, found none")
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            picture = _add_picture(container, first, fps, quality)
            sound = _Track(container, sound_of.track, start) if sound_of and sound_of.track else None
            for number, frame in enumerate(chain([first], stream)):
                if frame.shape != first.shape:
                    raise SamloveError(f"{path}: expected frames of shape {first.shape}, found one of {frame.shape}")
                container.mux(picture.encode(_video_frame(frame, number)))
                if sound is not None:
                    sound.write(min((number + 1) / fps, seconds))
            container.mux(picture.encode(None))
            if sound is not None:
                sound.finish()
        partial.replace(path)
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def _add_picture(container: OutputContainer, frame: np.ndarray, fps: float, quality: int) -> VideoStream:
    options = {"crf": str(quality), "preset": PRESET, "g": str(max(round(KEY_SECONDS * fps), 1))}
    picture = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
    picture.height, picture.width = (side + side % 2 for side in frame.shape[:2])
    picture.pix_fmt = "yuv420p"
    context = picture.codec_context
    context.color_primaries = context.color_trc = context.colorspace = BT709
    context.color_range = ColorRange.MPEG
    return picture


def _video_frame(frame: np.ndarray, number: int) -> VideoFrame:
    height, width = frame.shape[:2]
    even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    picture = VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
    picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
    picture.pts = number
    return picture


class _Track:
    """The sound track of a video that is being written."""

    def __init__(self, container: OutputContainer, sound: Sound, start: float) -> None:
        self._container, self._rate = container, sound.rate
        rate = sound.rate if sound.rate in AAC_RATES else AAC_RATE
        self._layout = sound.layout
        self._stream = container.add_stream("aac", rate=rate, layout="mono" if sound.channels == 1 else "stereo")
        self._chunks, self._chunk, self._at = sound.chunks(start), np.zeros((0, sound.channels), np.float32), 0

    def write(self, second: float) -> None:
        """Write the sound up to `second` of the video."""
        end = round(second * self._rate)
        while self._at < end:
            if not len(self._chunk):
                chunk = next(self._chunks, None)
                if chunk is None:
                    return
                self._chunk = chunk
                continue
            part, self._chunk = self._chunk[: end - self._at], self._chunk[end - self._at :]
            frame = AudioFrame.from_ndarray(np.ascontiguousarray(part).reshape(1, -1), "flt", self._layout)
            frame.sample_rate, frame.pts, frame.time_base = self._rate, self._at, Fraction(1, self._rate)
            self._container.mux(self._stream.encode(frame))
            self._at += len(part)

    def finish(self) -> None:
        self._chunks.close()
        self._container.mux(self._stream.encode(None))
