"""How fast the arrays of a training sample are read from shards, compared with other formats.

Every format holds the same bytes: random numbers, videos at the paper's sizes, 11.4 MB each in fp16. One process, one
thread, everything in the page cache; each array is copied into a buffer, as into a batch. Each round takes the formats
in a different order, because a format's speed depends on what ran before it. A format is left out if its library is not
installed. Compare the ratios: the rates depend on the machine and its load.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from samlove.bench.timing import in_turns, timed
from stores import ShardReader, ShardWriter
from stores.chunks import use_zarr_defaults

SHAPES = {
    "audio": (10, 128),
    "visual": (10, 197, 768),
    "sam2_image_embed": (256, 64, 64),
    "sam2_high_res_0": (32, 256, 256),
    "sam2_high_res_1": (64, 128, 128),
}
BYTES = 2 * sum(int(np.prod(shape)) for shape in SHAPES.values())  # per video
VIDEOS, ROUNDS = 24, 15

Sample = Mapping[str, np.ndarray]
Pass = Callable[[], Iterable[Mapping[str, Any]]]  # reads all videos once; {name: array} per video


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
    """One file per video, its arrays one after the other, read by one read()."""
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
    """One file per video."""
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
    """One array per feature, uncompressed; one video per chunk, eight per shard."""
    import zarr

    use_zarr_defaults()
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
    """Videos of random numbers; all arrays are different."""
    random = np.random.default_rng(0)
    numbers = {name: random.standard_normal(shape, np.float32).astype(np.float16) for name, shape in SHAPES.items()}
    return [{name: array + np.float16(i) for name, array in numbers.items()} for i in range(videos)]


def copy_all(read: Pass, buffer: torch.Tensor) -> None:
    """One pass that copies every array to the start of `buffer`."""
    for sample in read():
        for value in sample.values():
            values = torch.as_tensor(value).reshape(-1)
            buffer[: len(values)].copy_(values)


def run(videos: int = VIDEOS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time every format on one thread. Prints a table, then the result as one JSON object, and returns the result.

    By format: GB/s (median of the rounds), and the ratio of shards to the format.
    """
    samples, threads = make_samples(videos), torch.get_num_threads()
    passes: dict[str, Callable[[], None]] = {}
    buffer = torch.empty(BYTES // 2, dtype=torch.float16)
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory(prefix="samlove-bench-") as top, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            for make in FORMATS:
                root = Path(top) / make.__name__
                root.mkdir()
                try:
                    passes[make.__name__] = partial(copy_all, make(samples, root), buffer)
                except ImportError as error:
                    print(f"{make.__name__}: left out, not installed ({error})")
            ways = {name: partial(timed, work) for name, work in passes.items()}
            times = in_turns(ways, rounds + 1, shuffle=Random(0))
    finally:
        torch.set_num_threads(threads)
    seconds = {name: median(one.wall for one in spent[1:]) for name, spent in times.items()}  # round 0 is the warm-up
    rates = {name: videos * BYTES / one / 1e9 for name, one in seconds.items()}
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
