"""`samlove plan`: what the active profile will produce and how long its features take, before anything runs."""

import os
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any

import pandas as pd

from pipelines import audio, sam2, text, visual
from samlove.config import CONTROLLED_SPLITS, active_profile
from samlove.data.dataset import RefAvsFolder
from samlove.data.layout import layout
from samlove.device import default_device
from samlove.errors import SamloveError
from samlove.features.encoders.base import Encoder
from samlove.features.encoders.frames import frame_sources
from samlove.features.encoders.sam2_image import Sam2ImageEncoder
from samlove.features.encoders.text import TextEncoder
from samlove.features.sizes import (
    Counts,
    Planned,
    Settings,
    bytes_there,
    count,
    free_bytes,
    planned,
    read_settings,
)
from samlove.features.worker import READERS

GIB = 2**30
ARRAYS = {"audio": 2, "visual": 1, "text": 2, "sam2_train": 3, "sam2_eval": 3}  # of an item
ENCODERS = ("audio", "visual", "text", "sam2")
SECONDS = 2.0  # a calibration goes on for so long after its first batch
SAMPLE = 64  # items at most that one calibration takes


def run(calibrate: bool) -> bool:
    """Print the plan of the active profile. Returns whether the disk has enough free space for it."""
    settings, paths = read_settings(), layout()
    counts, source = count(settings, paths)
    made = planned(settings, counts)
    print(f"profile {active_profile()}, below {paths.root}/; counted from: {source}\n")
    times = measured(settings, made) if calibrate else {}
    print(render(made, {entry.path: _files(entry, settings, counts) for entry in made}, times))
    free, there = free_bytes(paths), bytes_there(paths)
    needed = sum(sum(entry.bytes.values()) for entry in made)
    missing = needed - there - free
    print(f"\ndisk: {gib(needed)} GiB in total, {gib(there)} GiB of it present, {gib(free)} GiB free")
    if missing > 0:
        print(
            f"MISSING {gib(missing)} GiB: free some, or clone onto a larger disk (data/ and .dvc/cache must share it)"
        )
    return missing <= 0


def _files(entry: Planned, settings: Settings, counts: Counts) -> int:
    kind, name = entry.path.split("/")
    if kind == "features":  # four files; per shard one zarr.json, and per array zarr.json and data
        arrays = ARRAYS[name] * (2 if name.startswith("sam2") and settings.sam2.dtype == "int8" else 1)  # and scales
        return 4 + -(-sum(entry.items.values()) // per_shard(settings)[name]) * (1 + 2 * arrays)
    if kind == "shards":  # three files; one per shard
        return 3 + -(-counts[name].folders // settings.pack.videos_per_shard)
    return 1 + len(settings.infer.controls) * (name in CONTROLLED_SPLITS)


def per_shard(settings: Settings) -> dict[str, int]:
    """The number of items in a shard of each feature store."""
    of_sam2 = {f"sam2_{group}": sam2.sizes_of(group, settings.sam2).shard for group in sam2.SIZES}
    return {"audio": audio.SHARD, "visual": visual.SHARD, "text": text.SHARD, **of_sam2}


def render(made: list[Planned], files: dict[str, int], times: dict[str, float | str]) -> str:
    """The table. times: seconds per store, or why they are unknown."""
    lines = [f"{'':24}{'items':>10}{'files':>8}{'GiB':>10}  time"]
    for entry in made:
        name = entry.path.removeprefix("features/")
        spent = times.get(name, "")
        shown = str(timedelta(seconds=round(spent))) if isinstance(spent, float) else spent
        whole = sum(entry.bytes.values())
        lines.append(f"{entry.path:24}{sum(entry.items.values()):>10,}{files[entry.path]:>8,}{gib(whole):>10}  {shown}")
        if len(entry.items) > 1:
            lines += [
                f"  {split:22}{items:>10,}{'':8}{gib(entry.bytes[split]):>10}" for split, items in entry.items.items()
            ]
    known = [spent for spent in times.values() if isinstance(spent, float)]
    size = sum(sum(entry.bytes.values()) for entry in made)
    total = str(timedelta(seconds=round(sum(known)))) if known else ""
    lines.append(f"{'total':34}{sum(files.values()):>8,}{gib(size):>10}  {total}")
    return "\n".join(line.rstrip() for line in lines)


def gib(size: int) -> str:
    value = size / GIB
    return f"{value:,.1f}" if value >= 10 else f"{value:.4f}"


# --- time ------------------------------------------------------------------------------------------------------------


def measured(settings: Settings, made: list[Planned], sections: Collection[str] = ENCODERS) -> dict[str, float | str]:
    """Seconds per feature store, estimated here from a few items of the dataset, or why they are unknown.

    sections: the encoders to measure.
    """
    device, folder, frames = default_device(), RefAvsFolder(settings.dataset.root), settings.dataset.frames
    media_ids = sorted(p.name for p in (folder.root / "media").glob("*") if p.is_dir())[:SAMPLE]
    texts = _sample_texts(folder)
    clips = frame_sources(folder, media_ids, frames)
    makers: dict[str, tuple[Callable[[], Encoder], list[Any], int]] = {
        "audio": (
            lambda: audio.ENCODERS[settings.audio.encoder](settings.audio, frames, device),
            [folder.audio_path(media_id) for media_id in media_ids],
            audio.BATCH,
        ),
        "visual": (
            lambda: visual.ENCODERS[settings.visual.encoder](settings.visual, device),
            list(clips.values()),
            visual.BATCH,
        ),
        "text": (lambda: TextEncoder(settings.text, device), texts, text.BATCH),
        "sam2": (
            lambda: Sam2ImageEncoder(settings.sam2, device),
            [[path] for paths in clips.values() for path in paths][:SAMPLE],
            sam2.SIZES["train"].batch,
        ),
    }
    items = {entry.path.removeprefix("features/"): sum(entry.items.values()) for entry in made}
    work = {
        "audio": {"audio": items["audio"]},
        "visual": {"visual": items["visual"]},
        "text": {"text": items["text"]},
        "sam2": {  # in frames
            "sam2_train": items["sam2_train"] * settings.sam2.train_frames,
            "sam2_eval": items["sam2_eval"] * frames,
        },
    }
    times: dict[str, float | str] = {}
    for name in sections:
        make, sources, batch = makers[name]
        try:
            each: float | str = seconds_an_item(make(), sources, batch) if sources else "unknown: no dataset here yet"
        except SamloveError as error:  # no weights, for example: the rest of the plan is still valid
            each = f"unknown: {error}"
        times |= {store: each * n if isinstance(each, float) else each for store, n in work[name].items()}
    return times


def _sample_texts(folder: RefAvsFolder) -> list[str]:
    index = layout().expressions
    if index.is_file():
        return list(pd.read_parquet(index)["exp"].unique()[:SAMPLE])
    return list(folder.metadata()["exp"].unique()[:SAMPLE]) if (folder.root / "metadata.csv").is_file() else []


def seconds_an_item(encoder: Encoder, sources: list[Any], batch: int) -> float:
    """Seconds per item, with reading and computing in parallel and without writing.

    The first batch loads the network and is not counted. Batches of `sources` are repeated for SECONDS.
    """
    done, read_s, compute_s = 0, 0.0, 0.0
    encoder.encode([encoder.load(source) for source in sources[:batch]])
    while read_s + compute_s < SECONDS:
        part = [sources[(done + i) % len(sources)] for i in range(min(batch, len(sources)))]
        began = time.perf_counter()
        loaded = [encoder.load(source) for source in part]
        read = time.perf_counter()
        encoder.encode(loaded)
        read_s, compute_s = read_s + read - began, compute_s + time.perf_counter() - read
        done += len(part)
    return max(read_s / min(READERS, os.cpu_count() or 1), compute_s) / done
