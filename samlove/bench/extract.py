"""The throughput of a feature stage relative to its encoder alone, and of several workers relative to one.

The stage reads JPEGs, encodes, writes and publishes a store. The encoder alone gets items that are already in memory,
in the same batches, on the same threads. With several workers, the throughput after warm-up is compared with one worker
that has all cores. Weights are random, because speed does not depend on them: nothing is downloaded.
"""

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch

from pipelines import sam2, visual
from samlove.bench.media import FRAMES, SIZES, sam2_encoder, vit_encoder, write_clips
from samlove.bench.profile import check_profile, device_name
from samlove.bench.timing import in_turns, timed
from samlove.config import LocalConfig
from samlove.data.dataset import RefAvsFolder
from samlove.device import default_device
from samlove.errors import RequestError
from samlove.features.encoders.base import Encoder
from samlove.features.encoders.frames import frame_sources
from samlove.features.extract import Job, Report, extract
from samlove.features.worker import READERS

SAM2_FRAMES = 1  # per video, as in the training split
SHARDS = 4  # per stage, so that writing one shard and computing the next overlap as in a long run


def run(profile: str, items: int, rounds: int = 5, workers: int = 1) -> dict:
    """Time stage and encoder for ViT and SAM 2. Prints the result, the last line as one JSON object, and returns it.

    profile: its configs/<profile> sets the architectures. items: videos for ViT, frames for SAM 2. workers: number of
    local workers to compare with one, if more than one. The fastest round counts.
    Raises RequestError if there is no such profile.
    """
    check_profile(profile)
    device = device_name(default_device())
    result: dict = {"bench": "extract", "profile": profile, "device": device, "rounds": rounds}
    result |= {"threads": torch.get_num_threads(), "readers": READERS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        clips = RefAvsFolder(root / "clips")
        clip_names = write_clips(clips, items, SIZES[profile])
        jobs: dict[str, tuple[Encoder, int, int, int | None]] = {
            "visual": (vit_encoder(profile, root), FRAMES, visual.BATCH, None),
            "sam2": (sam2_encoder(profile, root), SAM2_FRAMES, sam2.SIZES["train"].batch, 1),
        }
        for name, (encoder, frames, batch, chunk_rows) in jobs.items():
            shard = -(-items // (SHARDS * batch)) * batch
            sources = frame_sources(clips, clip_names, frames)
            job = Job(encoder, sources, root / "out" / name, root / "scratch", shard, batch, chunk_rows)
            result[name] = measured = _measure(job, rounds)
            print(
                f"{name}: {measured['stage_items_s']:.2f} items/s as a stage ({measured['warm_items_s']:.2f} warm), "
                f"{measured['bare_items_s']:.2f} with the encoder alone, batches of {batch}: "
                f"ratio {measured['ratio']:.3f}, in processor time {measured['cpu_ratio']:.3f}"
            )
            if workers > 1:
                measured["workers"] = many = _measure_workers(job, rounds, workers)
                print(
                    f"{name}: {many['items_s']:.2f} items/s with {workers} workers after warm-up, "
                    f"{many['one_items_s']:.2f} with one: ratio {many['ratio']:.3f}"
                )
    print(json.dumps(result))
    return result


def _measure(job: Job, rounds: int) -> dict:
    """Time both ways and keep the fastest round of each, because other load on the machine can only slow them down.

    cpu_ratio compares processor time, which other load hardly changes. It shows the cost of reading and writing if the
    encoder keeps all processors busy, as on a machine without a GPU.
    """
    sources = list(job.sources.values())
    batches = [sources[i : i + job.batch_size] for i in range(0, len(sources), job.batch_size)]
    loaded = [[job.encoder.load(source) for source in batch] for batch in batches]
    job.encoder.encode(loaded[0])  # loads the network

    def bare() -> None:
        for items in loaded:
            job.encoder.encode(items)

    warm: list[float] = []

    def stage() -> None:
        warm.append(_extract(job, 1).rate or 0.0)

    times = in_turns({way: partial(timed, way) for way in (bare, stage)}, rounds)
    (wall_alone, cpu_alone), (wall, cpu) = (map(min, zip(*times[way], strict=True)) for way in (bare, stage))
    return {
        "items": len(sources),
        "batch": job.batch_size,
        "bare_items_s": round(len(sources) / wall_alone, 3),
        "stage_items_s": round(len(sources) / wall, 3),
        "warm_items_s": round(max(warm), 3),  # of the stage after its first batch, as in a long run
        "ratio": round(wall_alone / wall, 3),
        "cpu_ratio": round(cpu_alone / cpu, 3),
    }


def _measure_workers(job: Job, rounds: int, workers: int) -> dict:
    def rate(count: int) -> float:
        measured = _extract(job, count).rate
        if measured is None:
            raise RequestError(
                f"--items {len(job.sources)}: too few for {workers} workers: all of it is warm-up; use more"
            )
        return measured

    rates = in_turns({count: partial(rate, count) for count in (1, workers)}, rounds)
    one, many = max(rates[1]), max(rates[workers])
    return {"workers": workers, "items_s": round(many, 3), "one_items_s": round(one, 3), "ratio": round(many / one, 3)}


def _extract(job: Job, workers: int) -> Report:
    """Run the whole stage on local workers, then delete its output, so that the next round has work to do."""
    report = extract(job, LocalConfig(kind="local", workers=workers))
    shutil.rmtree(job.out)
    shutil.rmtree(job.scratch)
    return report
