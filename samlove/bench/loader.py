"""How fast a training sample's arrays are read from shards, beside other formats, all measured in turns in one run.

The same bytes in every format: videos at the paper's sizes, 11.4 MB each in fp16, of random numbers. One process, one
thread, everything in the page cache; each array is copied into a buffer, as into a batch. Each round takes the formats
in another order, for what ran before is felt. A format whose library is not installed is left out. The ratios tell; the
rates depend on the machine and on what else it does.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from stores import ShardReader, ShardWriter

SHAPES = {
    "audio": (10, 128),
    "visual": (10, 197, 768),
    "sam2_image_embed": (256, 64, 64),
    "sam2_high_res_0": (32, 256, 256),
    "sam2_high_res_1": (64, 128, 128),
}
BYTES = 2 * sum(int(np.prod(shape)) for shape in SHAPES.values())  # of one video
VIDEOS, ROUNDS = 24, 15

Sample = Mapping[str, np.ndarray]
Pass = Callable[[], Iterable[Mapping[str, Any]]]  # reads all videos once: {name: array} each


def shards(samples: Sequence[Sample], root: Path) -> Pass:
    with ShardWriter(root / "shards") as writer:
        for i, sample in enumerate(samples):
            writer.write(str(i), sample)
    reader = ShardReader(root / "shards")

    def read() -> Iterator[Mapping[str, Any]]:
        for i in range(len(reader)):
            sample = reader[i]
            del sample["__key__"]
            yield sample

    return read


def plain_read(samples: Sequence[Sample], root: Path) -> Pass:
    """One file a video, its arrays one after another, taken in by one read()."""
    for i, sample in enumerate(samples):
        (root / str(i)).write_bytes(b"".join(array.tobytes() for array in sample.values()))
    return lambda: ({"all": np.frombuffer((root / str(i)).read_bytes(), np.float16)} for i in range(len(samples)))


def webdataset(samples: Sequence[Sample], root: Path) -> Pass:
    import webdataset as wds

    with wds.TarWriter(str(root / "0.tar")) as writer:
        for i, sample in enumerate(samples):
            writer.write({"__key__": str(i), **{f"{name}.npy": array for name, array in sample.items()}})

    def read() -> Iterator[Mapping[str, Any]]:
        for found in wds.WebDataset(str(root / "0.tar"), shardshuffle=False).decode():
            yield {name: found[f"{name}.npy"] for name in SHAPES}

    return read


def litdata(samples: Sequence[Sample], root: Path) -> Pass:
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(root), chunk_bytes="64MB")
    for i, sample in enumerate(samples):
        writer.add_item(i, {name: torch.from_numpy(array) for name, array in sample.items()})
    writer.done()
    writer.merge()
    dataset = StreamingDataset(str(root))
    return lambda: (dataset[i] for i in range(len(samples)))


def safetensors(samples: Sequence[Sample], root: Path) -> Pass:
    """One file a video."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    for i, sample in enumerate(samples):
        save_file(dict(sample), root / str(i))

    def read() -> Iterator[Mapping[str, Any]]:
        for i in range(len(samples)):
            with safe_open(root / str(i), "pt") as file:
                yield {name: file.get_tensor(name) for name in SHAPES}

    return read


def zarr(samples: Sequence[Sample], root: Path) -> Pass:
    """One array a feature, uncompressed, a video a chunk, eight a shard."""
    import zarr

    group = zarr.create_group(root)
    for name, shape in SHAPES.items():
        array = group.create_array(
            name,
            shape=(len(samples), *shape),
            dtype="float16",
            chunks=(1, *shape),
            shards=(min(8, len(samples)), *shape),
            compressors=None,
        )
        array[:] = np.stack([sample[name] for sample in samples])
    arrays = {name: zarr.open_array(root / name, mode="r") for name in SHAPES}
    return lambda: ({name: array[i] for name, array in arrays.items()} for i in range(len(samples)))


FORMATS = (shards, plain_read, webdataset, litdata, safetensors, zarr)


def make_samples(videos: int) -> list[Sample]:
    """Videos of random numbers, no two arrays alike."""
    random = np.random.default_rng(0)
    numbers = {name: random.standard_normal(shape, np.float32).astype(np.float16) for name, shape in SHAPES.items()}
    return [{name: array + np.float16(i) for name, array in numbers.items()} for i in range(videos)]


def seconds(read: Pass, buffer: torch.Tensor) -> float:
    """Of one pass in which every array is copied to the start of `buffer`."""
    start = time.perf_counter()
    for sample in read():
        for value in sample.values():
            values = torch.as_tensor(value).reshape(-1)
            buffer[: len(values)].copy_(values)
    return time.perf_counter() - start


def run(videos: int = VIDEOS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time every format in turns, on one thread; prints a table, then the result as one JSON object, and returns it.

    GB/s of each (median of the rounds), and the ratios of shards to each other format, by name.
    """
    samples, threads = make_samples(videos), torch.get_num_threads()
    passes: dict[str, Pass] = {}
    buffer = torch.empty(BYTES // 2, dtype=torch.float16)
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory(prefix="samlove-bench-") as top, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            for make in FORMATS:
                root = Path(top) / make.__name__
                root.mkdir()
                try:
                    passes[make.__name__] = make(samples, root)
                except ImportError as error:
                    print(f"{make.__name__}: left out, not installed ({error})")
            times: dict[str, list[float]] = {name: [] for name in passes}
            turns = Random(0)
            for _ in range(rounds + 1):  # in turns, so that a change of the machine's load meets all alike
                for name in turns.sample(list(passes), len(passes)):
                    times[name].append(seconds(passes[name], buffer))
    finally:
        torch.set_num_threads(threads)
    rates = {name: videos * BYTES / median(of[1:]) / 1e9 for name, of in times.items()}  # the first round warms up
    ratios = {name: round(rates["shards"] / rate, 2) for name, rate in rates.items() if name != "shards"}
    result = {
        "bench": "loader",
        "videos": videos,
        "rounds": rounds,
        "gb_per_s": {name: round(rate, 3) for name, rate in rates.items()},
        "shards_over": ratios,
    }
    print(f"{videos} videos of {BYTES / 1e6:.1f} MB, warm cache, one thread, median of {rounds} rounds:")
    for name, rate in rates.items():
        print(
            f"  {name:12s} {rate:6.2f} GB/s"
            + (f"   shards are {ratios[name]:.2f} times as fast" if name in ratios else "")
        )
    print(json.dumps(result))
    return result
