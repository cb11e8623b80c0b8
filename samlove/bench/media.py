"""Media and encoders that benchmarks make for themselves: noise and random weights, so that nothing is downloaded."""

from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image

from samlove.bench.profile import section
from samlove.config import AudioConfig, Sam2Config, VisualConfig
from samlove.data.dataset import RefAvsFolder
from samlove.device import default_device
from samlove.features.encoders.sam2_image import Sam2ImageEncoder
from samlove.features.encoders.timm_image import TimmEncoder, build_timm
from samlove.features.encoders.vggish import RATE, VggishEncoder, build_vggish
from samlove.model.sam2_build import instantiate_sam2

FRAMES = 10  # per video, one per second
SIZES = {"micro": (128, 128), "refavs": (1280, 720)}  # width and height of the frames


def write_clips(folder: RefAvsFolder, count: int, size: tuple[int, int], audio: bool = False) -> list[str]:
    """Write videos of smooth noise, every frame different; returns their media_ids. size: width and height.

    audio: also write 10 s of noise, mono, at VGGish's own rate.
    """
    rng = np.random.default_rng(0)
    names = [f"clip_{n:04}" for n in range(count)]
    for name in names:
        folder.frame_path(name, 0).parent.mkdir(parents=True)
        for t in range(FRAMES):
            coarse = Image.fromarray(rng.integers(0, 256, (18, 32, 3), dtype=np.uint8))
            coarse.resize(size, Image.Resampling.BICUBIC).save(folder.frame_path(name, t), quality=90)
        if audio:
            soundfile.write(folder.audio_path(name), rng.uniform(-0.3, 0.3, FRAMES * RATE), RATE, subtype="PCM_16")
    return names


def vit_encoder(profile: str, root: Path) -> TimmEncoder:
    """The profile's ViT; root: where to write its weights."""
    config = section(profile, VisualConfig, weights=str(root / "vit.pth"))
    torch.save(build_timm(config.model, config.model_args, config.image_size).state_dict(), config.weights)
    return TimmEncoder(config, default_device())


def sam2_encoder(profile: str, root: Path) -> Sam2ImageEncoder:
    """The profile's SAM 2 image encoder; root: where to write its weights."""
    config = section(profile, Sam2Config, checkpoint=str(root / "sam2.pt"))
    torch.save({"model": instantiate_sam2(config.config).state_dict()}, config.checkpoint)
    return Sam2ImageEncoder(config, default_device())


def vggish_encoder(profile: str, root: Path) -> VggishEncoder:
    """The profile's VGGish without postprocessing; root: where to write its weights."""
    config = section(profile, AudioConfig, weights=str(root / "vggish.pth"), postprocess=False)
    torch.save(build_vggish(config.channels, config.hidden, config.pre_relu).state_dict(), config.weights)
    return VggishEncoder(config, FRAMES, default_device())
