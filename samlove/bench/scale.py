"""How time and memory grow with the number of videos, from 3,000 to a million.

The videos are tiny, with five expressions each. Each step runs in a process of its own, so its memory is not that of
another step. Time is that of the step alone, from the page cache if the files fit into it. Memory is the most that the
process needed beyond what its imports took, preparation included: to draw an order, it also opens the dataset. Mapped
pages that processes share count towards it; the private memory at the end of the step is listed too.
"""

import json
import random
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from samlove.bench.memory import STATUS, Measured, Prepare, Work, measure
from samlove.config import LocalConfig
from samlove.data.digest import source_ids
from samlove.data.loader import ExpressionDataset, PoolSampler
from samlove.errors import RequestError, SamloveError
from samlove.features.encoders.base import Arrays
from samlove.features.extract import Job, extract
from stores import FeatureStore, FeatureStoreWriter, ShardReader, ShardWriter
from stores.inspect import open_artefact
from stores.verify import verify

EXPRESSIONS, PER_SHARD, POOL = 5, 32, 1024  # per video; videos per shard and in the pool, as in the profile refavs
ITEMS_PER_SHARD, BATCH = 1024, 64  # as in the stage text
SAMPLES = 2000  # read at random places, in more shards than the usual limit of open files
DISK = 13_000  # bytes per video, shard set and feature store together
FINGERPRINT = {"encoder": "scale"}
NOISE_S, NOISE_MB = 0.01, 1.0  # no growth is shown for less


def _sample(key: str) -> dict[str, Any]:
    """A sample as samlove.data.pack writes it, of 2 frames, with the smallest arrays that have all axes."""
    half, last = np.float16, EXPRESSIONS - 1
    return {
        "audio": np.ones((2, 4), half),
        "audio_valid": np.ones(2, bool),
        "visual": np.ones((2, 3, 4), half),
        "sam2_image_embed": np.ones((1, 4, 2, 2), half),
        "sam2_high_res_0": np.ones((1, 2, 8, 8), half),
        "sam2_high_res_1": np.ones((1, 2, 4, 4), half),
        "text": np.ones((EXPRESSIONS, 4, 4), half),
        "text_mask": np.ones((EXPRESSIONS, 4), bool),
        "masks": np.ones((2, 1, 8, 8), np.uint8),
        "rows": [
            {"row_id": f"{key}_{n}", "text": n, "mask": -1 if n == last else n % 2} for n in range(EXPRESSIONS)
        ],  # the last one is a null expression
    }


def _keys(videos: int) -> Iterator[str]:
    return (f"video_{n:07d}" for n in range(videos))


class _Encoder:
    """Returns a few numbers per text: all other time of an extraction is the pipeline's own."""

    def fingerprint(self) -> dict:
        return FINGERPRINT

    def load(self, source: str) -> str:
        return source

    def encode(self, items: list[str]) -> list[Arrays]:
        return [{"text": np.ones((4, 4), np.float16)} for _ in items]


def _job(root: Path, videos: int) -> Job:
    sources = {key: key for key in _keys(videos)}
    return Job(_Encoder(), sources, root / "features", root / "scratch", ITEMS_PER_SHARD, BATCH)


# Each step is a Prepare: from the folder of the artefacts and the number of videos to the work to time.


def write_shards(root: Path, videos: int) -> Work:
    def work() -> None:
        with ShardWriter(root / "shards", PER_SHARD, FINGERPRINT) as writer:
            for key in _keys(videos):
                writer.write(key, _sample(key))

    return work


def open_shards(root: Path, videos: int) -> Work:
    return lambda: ShardReader(root / "shards")


def open_dataset(root: Path, videos: int) -> Work:
    return lambda: ExpressionDataset(root / "shards")


def list_keys(root: Path, videos: int) -> Work:
    reader = ShardReader(root / "shards")
    return lambda: _exhaust(reader.keys())


def shards_info(root: Path, videos: int) -> Work:
    return lambda: open_artefact(root / "shards")


def verify_shards(root: Path, videos: int) -> Work:
    return lambda: _verify(root / "shards")


def draw_order(root: Path, videos: int) -> Work:
    dataset = ExpressionDataset(root / "shards")
    return lambda: PoolSampler(dataset.videos, POOL, seed=0, epoch=0).order()


def read_first(root: Path, videos: int) -> Work:
    dataset = ExpressionDataset(root / "shards")
    return lambda: _copy(dataset, [0])


def read_samples(root: Path, videos: int) -> Work:
    dataset = ExpressionDataset(root / "shards")
    places = random.Random(0).sample(range(len(dataset)), min(SAMPLES, len(dataset)))
    return lambda: _copy(dataset, places)


def plan_extraction(root: Path, videos: int) -> Work:
    """From the sources to the list of what is missing, with nothing computed yet."""
    job = _job(root, videos)

    def work() -> object:
        writer = FeatureStoreWriter(
            job.out, job.scratch, FINGERPRINT, list(job.sources), job.shard_size, ids=source_ids(job.sources)
        )
        return writer, writer.todo()

    return work


def extract_all(root: Path, videos: int) -> Work:
    """From the sources to the published store, on one local worker; a second time, there is nothing to compute."""
    job = _job(root, videos)
    return lambda: extract(job, LocalConfig(kind="local", workers=1))


def open_store(root: Path, videos: int) -> Work:
    return lambda: FeatureStore.open(root / "features")


def read_item(root: Path, videos: int) -> Work:
    store, (key,) = FeatureStore.open(root / "features"), _keys(1)
    return lambda: store.read(key)


def store_info(root: Path, videos: int) -> Work:
    return lambda: open_artefact(root / "features")


def verify_store(root: Path, videos: int) -> Work:
    return lambda: _verify(root / "features")


def _exhaust(values: Iterable[object]) -> None:
    deque(values, maxlen=0)


def _copy(dataset: ExpressionDataset, places: Sequence[int]) -> None:
    """Read these items, and every byte of their arrays."""
    for place in places:
        for value in dataset[place].values():
            np.array(value)


def _verify(path: Path) -> None:
    if faults := verify(path):
        raise SamloveError(f"expected no faults, found {len(faults)}, first: {faults[0]}")


class Step(NamedTuple):
    prepare: Prepare
    needs: str = ""  # the step that writes what this one reads


WRITE, EXTRACT = "write shard set", "extract and publish"
STEPS = {
    WRITE: Step(write_shards),
    "open shard set": Step(open_shards, WRITE),
    "open dataset": Step(open_dataset, WRITE),
    "list keys": Step(list_keys, WRITE),
    "info of shard set": Step(shards_info, WRITE),
    "verify shard set": Step(verify_shards, WRITE),
    "draw order": Step(draw_order, WRITE),
    "read first sample": Step(read_first, WRITE),
    f"read {SAMPLES:,} samples": Step(read_samples, WRITE),
    "plan extraction": Step(plan_extraction),
    EXTRACT: Step(extract_all),
    "extract again": Step(extract_all, EXTRACT),
    "open feature store": Step(open_store, EXTRACT),
    "read first item": Step(read_item, EXTRACT),
    "info of feature store": Step(store_info, EXTRACT),
    "verify feature store": Step(verify_store, EXTRACT),
}


Results = dict[str, dict[int, Measured | None]]  # step -> videos -> measured, or None if not reached


def parse_sizes(text: str) -> list[int]:
    """From numbers separated by commas. Raises RequestError unless they are positive and increase."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1:
        raise RequestError(f"--sizes {text}: expected increasing numbers of videos, such as 3000,30000")
    return sizes


def run(sizes: Sequence[int], folder: Path | None = None, limit: float = 1800) -> dict[str, Any]:
    """Measure every step at every size. Prints a table, then the result as one JSON object, and returns the result.

    folder: where temporary files are written, DISK bytes per video; None: the system's folder for them. limit: seconds
    after which a step is given up; steps that need its files are then left out.
    Raises RequestError if `folder` is missing or has too little space; SamloveError, after printing, if a step failed.
    """
    _check_place(Path(gettempdir()) if folder is None else folder, sizes[-1])
    results: Results = {name: {} for name in STEPS}
    failures = []
    with tqdm(total=len(STEPS) * len(sizes), bar_format="{n_fmt}/{total_fmt} steps [{elapsed}]: {desc}") as bar:
        for videos in sizes:
            with TemporaryDirectory(prefix="samlove-bench-", dir=folder) as top:
                for name, step in STEPS.items():
                    bar.set_description_str(f"{name}, {videos:,} videos")
                    results[name][videos] = None
                    if not step.needs or results[step.needs][videos]:
                        try:
                            results[name][videos] = measure(step.prepare, (Path(top), videos), limit, bar.refresh)
                        except SamloveError as error:
                            failures.append(f"{name}, {videos:,} videos: {error}")
                    bar.update()
    for line in _table(results):
        print(line)
    result = {
        "bench": "scale",
        "expressions_per_video": EXPRESSIONS,
        "steps": {
            name: {str(videos): one and one._asdict() for videos, one in row.items()} for name, row in results.items()
        },
    }
    print(json.dumps(result))
    if failures:
        raise SamloveError(f"{len(failures)} steps failed: {'; '.join(failures)}")
    return result


def _check_place(folder: Path, videos: int) -> None:
    if not STATUS.is_file():
        raise RequestError(f"{STATUS}: no such file; samlove bench scale reads its memory there, which needs Linux")
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder")
    if (free := shutil.disk_usage(folder).free) < videos * DISK:
        raise RequestError(
            f"{folder}: {videos:,} videos need {videos * DISK // 10**6:,} MB, found {free // 10**6:,} MB free; choose "
            "another --folder or smaller --sizes"
        )


def _table(results: Results) -> Iterator[str]:
    """One line per step and size, each with the growth since the size before."""
    yield f"{'step':24}{'videos':>10}{'time':>11}{'growth':>8}{'memory':>11}{'growth':>8}{'private':>11}{'files':>7}"
    for name, row in results.items():
        before: Measured | None = None
        for videos, one in row.items():
            line = f"{name:24}{videos:>10,}"
            if one is None:
                yield line + f"{'not reached':>13}"
            else:
                seconds = _growth(before and before.seconds, one.seconds, NOISE_S)
                memory = _growth(before and before.peak_mb, one.peak_mb, NOISE_MB)
                yield (
                    f"{line}{_time(one.seconds):>11}{seconds:>8}{one.peak_mb:>8.1f} MB{memory:>8}"
                    f"{one.private_mb:>8.1f} MB{one.files:>7}"
                )
            before = one


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _growth(before: float | None, after: float, noise: float) -> str:
    return f"x {after / before:.1f}" if before and after >= noise else ""
