"""What a feature stage costs beyond its encoder: items a second of the whole stage over those of the encoder alone.

The stage reads JPEGs, encodes, writes and publishes a store; the encoder alone gets items that are in memory already,
in the same batches, on the same threads. Weights are random, for speed does not depend on them: nothing is fetched.
"""

import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import yaml
from PIL import Image

from pipelines import sam2, visual
from samlove.config import Sam2Config, VisualConfig
from samlove.dataset import RefAvsFolder
from samlove.device import default_device
from samlove.encoders.base import Encoder
from samlove.encoders.frames import frame_sources
from samlove.encoders.sam2_image import Sam2ImageEncoder
from samlove.encoders.vit import VitEncoder, build_vit
from samlove.errors import RequestError
from samlove.extract import Job, extract
from samlove.sam2_build import instantiate_sam2

FRAMES = 10  # of a clip for ViT; SAM2's training split has one
SIZES = {"micro": (128, 128), "refavs": (1280, 720)}  # width and height of the frames
SHARDS = 4  # a stage's, so that writing one and computing the next overlap as they do in a long run
ROUNDS = 3


def run(profile: str, items: int) -> dict:
    """Times both ways in turns for ViT and SAM2; prints the result, last line one JSON object, and returns it.

    profile: whose architectures, configs/<profile>. items: clips for ViT, frames for SAM2. Ratios are of medians.
    Raises RequestError where there is no such profile.
    """
    if profile not in SIZES or not Path("configs", profile).is_dir():
        raise RequestError(f"--profile {profile}: expected one of {', '.join(SIZES)}, in the repository's root")
    result: dict = {"bench": "extract", "profile": profile, "threads": torch.get_num_threads(), "rounds": ROUNDS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        clips = RefAvsFolder(root / "clips")
        clip_names = _write_clips(clips, items, SIZES[profile])
        jobs = {
            "visual": (_vit(profile, root), FRAMES, visual.BATCH, None),
            "sam2": (_sam2(profile, root), 1, sam2.SIZES["train"].batch, 1),
        }
        for name, (encoder, frames, batch, chunk_rows) in jobs.items():
            shard = -(-items // (SHARDS * batch)) * batch
            sources = frame_sources(clips, clip_names, frames)
            job = Job(encoder, sources, root / "out" / name, root / "scratch", shard, batch, chunk_rows)
            result[name] = measured = _measure(job)
            print(
                f"{name}: {measured['stage_items_s']:.2f} items/s as a stage, {measured['bare_items_s']:.2f} "
                f"by the encoder alone, batches of {batch}: ratio {measured['ratio']:.3f}"
            )
    print(json.dumps(result))
    return result


def _measure(job: Job) -> dict:
    """Medians of the rounds."""
    sources = list(job.sources.values())
    batches = [sources[i : i + job.batch_size] for i in range(0, len(sources), job.batch_size)]
    loaded = [[job.encoder.load(source) for source in batch] for batch in batches]
    job.encoder.encode(loaded[0])  # loads the network
    bare, stage = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for items in loaded:
            job.encoder.encode(items)
        bare.append(time.perf_counter() - began)
        began = time.perf_counter()
        extract(job)
        stage.append(time.perf_counter() - began)
        shutil.rmtree(job.out)  # or the next round would find nothing to do
        shutil.rmtree(job.scratch)
    return {
        "items": len(sources),
        "batch": job.batch_size,
        "bare_items_s": round(len(sources) / median(bare), 3),
        "stage_items_s": round(len(sources) / median(stage), 3),
        "ratio": round(median(bare) / median(stage), 3),
    }


def _write_clips(folder: RefAvsFolder, count: int, size: tuple[int, int]) -> list[str]:
    """Clips of smooth noise, each frame its own; their names."""
    rng = np.random.default_rng(0)
    names = [f"clip_{n:04}" for n in range(count)]
    for name in names:
        folder.frame_path(name, 0).parent.mkdir(parents=True)
        for t in range(FRAMES):
            coarse = Image.fromarray(rng.integers(0, 256, (18, 32, 3), dtype=np.uint8))
            coarse.resize(size, Image.Resampling.BICUBIC).save(folder.frame_path(name, t), quality=90)
    return names


def _vit(profile: str, root: Path) -> Encoder:
    values = yaml.safe_load(Path("configs", profile, "visual.yaml").read_text())
    config = VisualConfig(**{**values, "weights": str(root / "vit.pth")})
    torch.save(build_vit(config.model, config.model_args, config.image_size).state_dict(), config.weights)
    return VitEncoder(config, default_device())


def _sam2(profile: str, root: Path) -> Encoder:
    values = yaml.safe_load(Path("configs", profile, "sam2.yaml").read_text())
    config = Sam2Config(**{**values, "checkpoint": str(root / "sam2.pt")})
    torch.save({"model": instantiate_sam2(config.config).state_dict()}, config.checkpoint)
    return Sam2ImageEncoder(config, default_device())
