"""Videos of LAVS-synth scenes for the tests of `samlove predict`: as a Ref-AVS folder, lossless and lossy."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pandas as pd
import soundfile
from PIL import Image

from samlove.data.dataset import RefAvsFolder, load_frame
from samlove.synth.scene import SECONDS, SEEN, Scene, render, sample_scene
from samlove.synth.voice import RATE, mix

SIZE = (96, 72)


def scene(seed: int) -> Scene:
    return sample_scene(np.random.default_rng(seed), SEEN)


def sound_of(seed: int) -> np.ndarray:
    return mix(scene(seed), np.random.default_rng(seed))


def write_refavs(root: Path, seeds: list[int], sentences: list[str]) -> tuple[RefAvsFolder, pd.DataFrame]:
    """A Ref-AVS folder with one video per seed, named v<seed>, and the rows of the index for a split of them."""
    folder = RefAvsFolder(root)
    rows = []
    for seed in seeds:
        folder.frame_path(f"v{seed}", 0).parent.mkdir(parents=True)
        for t in range(SECONDS):
            Image.fromarray(render(scene(seed), t, SIZE)[0]).save(folder.frame_path(f"v{seed}", t), quality=90)
        soundfile.write(folder.audio_path(f"v{seed}"), sound_of(seed), RATE)
        rows += [(f"v{seed}_{n}", f"v{seed}", f"v{seed}", 1, text, "test_s", False) for n, text in enumerate(sentences)]
    return folder, pd.DataFrame(rows, columns=["row_id", "media_id", "vid", "fid", "exp", "split", "null"])


def frames_of(folder: RefAvsFolder, media_id: str) -> list[np.ndarray]:
    return [load_frame(folder.frame_path(media_id, t)) for t in range(SECONDS)]


def write_lossless(path: Path, frames: list[np.ndarray], samples: np.ndarray | None, fps: int = 1) -> Path:
    """FFV1 and PCM in Matroska: the very pixels and samples."""
    with av.open(str(path), "w") as file:
        video = file.add_stream("ffv1", rate=fps)
        video.width, video.height, video.pix_fmt = frames[0].shape[1], frames[0].shape[0], "bgr0"
        audio = None if samples is None else file.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="bgr0")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
        if audio is not None and samples is not None:
            sound = av.AudioFrame.from_ndarray(samples[None], "s16", "mono")
            sound.sample_rate, sound.pts = RATE, 0
            file.mux(audio.encode(sound))
            file.mux(audio.encode(None))
    return path
