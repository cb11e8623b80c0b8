"""Video and sound files in many containers and codecs, written with PyAV."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av import AudioFrame, VideoFrame

RATE = 16_000


def made_frames(count: int, width: int = 64, height: int = 48) -> np.ndarray:
    """uint8 (count,H,W,3): each has another colour, and a bright corner at the top left."""
    rng = np.random.default_rng(count)
    y, x = np.mgrid[:height, :width]
    frames = np.empty((count, height, width, 3), dtype=np.uint8)
    for number in range(count):
        colour = rng.integers(40, 200, 3)
        frames[number] = colour + (20 * np.sin((x + 3 * y + 5 * number) / 9))[..., None]
        frames[number, : height // 4, : width // 4] = 250
    return frames


def made_sound(seconds: float, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """int16 (S, channels): tones that swell, another one for each channel."""
    time = np.arange(round(seconds * rate)) / rate
    tones = [
        np.sin(2 * np.pi * (300 + 170 * c + 40 * time) * time) * (0.2 + 0.1 * np.sin(time)) for c in range(channels)
    ]
    return (np.stack(tones, 1) * 32767).astype(np.int16)


def write_media(
    path: Path,
    frames: np.ndarray | None = None,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    fps: int = 10,
    ticks: Sequence[int] | None = None,
    base: Fraction | None = None,
    options: dict[str, str] | None = None,
    sound: np.ndarray | None = None,
    sound_codec: str = "aac",
    rate: int = RATE,
    sound_start: float = 0.0,
    muxing: dict[str, str] | None = None,
) -> Path:
    """Write frames and sound; the suffix decides the container.

    ticks, base: presentation times of the frames in units of `base` seconds; by default `fps` frames a second.
    sound: int16 or float32 (S, channels). muxing: options of the container.
    """
    base = base or Fraction(1, fps)
    with av.open(str(path), "w", options=muxing or {}) as container:
        if frames is not None:
            picture = container.add_stream(codec, rate=fps, options=options or {})
            picture.height, picture.width = frames.shape[1:3]
            picture.pix_fmt = pixels
            picture.codec_context.time_base = base
        if sound is not None:
            layout = {1: "mono", 2: "stereo", 6: "5.1"}[sound.shape[1]]
            track = container.add_stream(sound_codec, rate=rate, layout=layout)
        packets = []
        if frames is not None:
            for number, array in enumerate(frames):
                frame = VideoFrame.from_ndarray(array, format="rgb24").reformat(format=pixels)
                frame.pts, frame.time_base = (ticks[number] if ticks else number), base
                packets += picture.encode(frame)
            packets += picture.encode(None)
        if sound is not None:
            kind = "s16" if sound.dtype == np.int16 else "flt"
            step = rate // 4
            for at in range(0, len(sound), step):
                part = np.ascontiguousarray(sound[at : at + step]).reshape(1, -1)
                heard = AudioFrame.from_ndarray(part, format=kind, layout=layout)
                heard.sample_rate, heard.pts = rate, at + round(sound_start * rate)
                heard.time_base = Fraction(1, rate)
                packets += track.encode(heard)
            packets += track.encode(None)
        packets.sort(key=lambda packet: float((packet.dts or 0) * packet.time_base))
        for packet in packets:
            container.mux(packet)
    return path


def decoded(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The time of each frame, seconds from the first, and all frames (N,H,W,3), decoded one after another.

    The decoder gives frames in the right order, but those of some containers with their times mixed up.
    """
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    times = np.sort([time for time, _ in frames])
    return times - times[0], np.stack([frame for _, frame in frames])
