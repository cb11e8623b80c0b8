"""What a feature stage costs beyond its encoder: items a second of the whole stage over those of the encoder alone.

And what more workers bring: items a second, once all are warm, of so many over those of one with all cores.

The stage reads JPEGs, encodes, writes and publishes a store; the encoder alone gets items that are in memory already,
in the same batches, on the same threads. Weights are random, for speed does not depend on them: nothing is fetched.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipelines import sam2, visual
from samlove.bench.profile import check_profile, device_name, section
from samlove.config import LocalConfig, Sam2Config, VisualConfig
from samlove.data.dataset import RefAvsFolder
from samlove.device import default_device
from samlove.errors import RequestError
from samlove.features.encoders.base import Encoder
from samlove.features.encoders.frames import frame_sources
from samlove.features.encoders.sam2_image import Sam2ImageEncoder
from samlove.features.encoders.vit import VitEncoder, build_vit
from samlove.features.extract import Job, Report, extract
from samlove.features.worker import READERS
from samlove.model.sam2_build import instantiate_sam2

FRAMES = 10  # of a clip for ViT; SAM2's training split has one
SIZES = {"micro": (128, 128), "refavs": (1280, 720)}  # width and height of the frames
SHARDS = 4  # a stage's, so that writing one and computing the next overlap as they do in a long run


def run(profile: str, items: int, rounds: int = 5, workers: int = 1) -> dict:
    """Times both ways in turns for ViT and SAM2; prints the result, last line one JSON object, and returns it.

    profile: whose architectures, configs/<profile>. items: clips for ViT, frames for SAM2. workers: these local ones
    are compared with one, where they are more. Of the rounds the fastest each way counts.
    Raises RequestError where there is no such profile.
    """
    check_profile(profile)
    device = device_name(default_device())
    result: dict = {"bench": "extract", "profile": profile, "device": device, "rounds": rounds}
    result |= {"threads": torch.get_num_threads(), "readers": READERS}
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
            result[name] = measured = _measure(job, rounds)
            print(
                f"{name}: {measured['stage_items_s']:.2f} items/s as a stage ({measured['warm_items_s']:.2f} warm), "
                f"{measured['bare_items_s']:.2f} by the encoder alone, batches of {batch}: "
                f"ratio {measured['ratio']:.3f}, of processor time {measured['cpu_ratio']:.3f}"
            )
            if workers > 1:
                measured["workers"] = many = _measure_workers(job, rounds, workers)
                print(
                    f"{name}: {many['items_s']:.2f} items/s once warm by {workers} workers, {many['one_items_s']:.2f} "
                    f"by one: ratio {many['ratio']:.3f}"
                )
    print(json.dumps(result))
    return result


def _measure(job: Job, rounds: int) -> dict:
    """The fastest of the rounds each way: other work on the machine can only slow one down.

    cpu_ratio is of processor time, which other work hardly changes: what reading and writing cost where the encoder
    leaves no processor idle, as on a machine without a GPU.
    """
    sources = list(job.sources.values())
    batches = [sources[i : i + job.batch_size] for i in range(0, len(sources), job.batch_size)]
    loaded = [[job.encoder.load(source) for source in batch] for batch in batches]
    job.encoder.encode(loaded[0])  # loads the network

    def bare() -> None:
        for items in loaded:
            job.encoder.encode(items)

    alone, stage = [], []
    warm: list[float] = []
    for _ in range(rounds):
        alone.append(_seconds(bare))
        stage.append(_seconds(lambda: warm.append(_extract(job, 1).rate or 0.0)))
    (wall_alone, cpu_alone), (wall, cpu) = (tuple(map(min, zip(*times, strict=True))) for times in (alone, stage))
    return {
        "items": len(sources),
        "batch": job.batch_size,
        "bare_items_s": round(len(sources) / wall_alone, 3),
        "stage_items_s": round(len(sources) / wall, 3),
        "warm_items_s": round(max(warm), 3),  # of the stage after its first batch: what a long one comes to
        "ratio": round(wall_alone / wall, 3),
        "cpu_ratio": round(cpu_alone / cpu, 3),
    }


def _measure_workers(job: Job, rounds: int, workers: int) -> dict:
    rates: dict[int, list[float]] = {1: [], workers: []}
    for _ in range(rounds):
        for count, found in rates.items():
            rate = _extract(job, count).rate
            if rate is None:
                raise RequestError(
                    f"--items {len(job.sources)}: too few for {workers} workers, all is warm-up; give more"
                )
            found.append(rate)
    one, many = max(rates[1]), max(rates[workers])
    return {"workers": workers, "items_s": round(many, 3), "one_items_s": round(one, 3), "ratio": round(many / one, 3)}


def _extract(job: Job, workers: int) -> Report:
    """The whole stage, by local workers; what it made is removed, or the next round would find nothing to do."""
    report = extract(job, LocalConfig(kind="local", workers=workers))
    shutil.rmtree(job.out)
    shutil.rmtree(job.scratch)
    return report


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Of the clock, and of the processors."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


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
    config = section(profile, "visual", VisualConfig, weights=str(root / "vit.pth"))
    torch.save(build_vit(config.model, config.model_args, config.image_size).state_dict(), config.weights)
    return VitEncoder(config, default_device())


def _sam2(profile: str, root: Path) -> Encoder:
    config = section(profile, "sam2", Sam2Config, checkpoint=str(root / "sam2.pt"))
    torch.save({"model": instantiate_sam2(config.config).state_dict()}, config.checkpoint)
    return Sam2ImageEncoder(config, default_device())
