"""A small adapter for each store class, so that one suite can test all of them.

An adapter writes {key: array}, all with the same dtype and shape, opens the result, and reads it back by key.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stores import (
    ExportReader,
    FeatureStore,
    FeatureStoreWriter,
    PredictionReader,
    PredictionWriter,
    ShardReader,
    ShardWriter,
    TensorReader,
    export_store,
)
from stores.features import INDEX
from stores.listing import FILES
from stores.manifest import NAME, list_files, seal, write_json
from stores.staging import DTYPES

SHAPE = (3, 4, 4)
KEYS = [
    "plain",
    "-dash",
    "--null_m-07",
    "_under.dots.npy",
    "a/b\\c",
    "..",
    "50%2E",
    "ünï 東京 \U0001f3bb",
    " the object, making the loudest sound\t(for 10 s). " * 8,
]
MADE = {"made": "here"}  # the fingerprint of each
Items = Mapping[str, np.ndarray]

any_shape = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
no_empty_shape = hnp.array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=4)


def finite(dtypes: st.SearchStrategy, shapes: st.SearchStrategy) -> st.SearchStrategy:
    """Arrays without infinity and NaN."""
    elements = {"allow_nan": False, "allow_infinity": False}
    return st.tuples(dtypes, shapes).flatmap(
        lambda pair: hnp.arrays(*pair, elements=elements if np.dtype(pair[0]).kind == "f" else None)
    )


class Features:
    """Zarr feature store. It refuses empty arrays and infinity, which are never valid features."""

    what = "feature store"
    values = finite(st.sampled_from(DTYPES), no_empty_shape)

    def write(self, path: Path, items: Items) -> None:
        writer = FeatureStoreWriter(path, path.parent / "scratch", MADE, list(items), shard_size=2)
        for number, keys in writer.todo():
            writer.write_shard(number, {key: {"x": items[key]} for key in keys})
        writer.publish()

    def open(self, path: Path) -> FeatureStore:
        return FeatureStore.open(path)

    def keys(self, store: FeatureStore) -> list[str]:
        return store.keys()

    def read(self, store: FeatureStore, key: str) -> np.ndarray:
        return store.read(key)["x"]


class Shards:
    """WebDataset shard set."""

    what = "shard set"
    numbers = st.one_of(
        hnp.boolean_dtypes(), hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.floating_dtypes()
    )
    values = hnp.arrays(numbers, any_shape)

    def write(self, path: Path, items: Items) -> None:
        with ShardWriter(path, samples_per_shard=2, fingerprint=MADE) as writer:
            for key, value in items.items():
                writer.write(key, {"x": value})

    def open(self, path: Path) -> ShardReader:
        return ShardReader(path)

    def keys(self, store: ShardReader) -> list[str]:
        return store.keys()

    def read(self, store: ShardReader, key: str) -> np.ndarray:
        sample = store[store.keys().index(key)]
        assert sample["__key__"] == key
        return sample["x"]


class Predictions:
    """Masks in HDF5: always uint8 (T, S, S)."""

    what = "predictions file"
    values = hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 6)).map(lambda s: (s[0], s[1], s[1])))

    def write(self, path: Path, items: Items) -> None:
        edges = np.linspace(0, 1, 255, dtype=np.float32)
        frames, size, _ = next(iter(items.values())).shape if items else SHAPE
        with PredictionWriter(path, frames, size, edges, MADE) as writer:
            for key, value in items.items():
                writer.write([key], value[None])

    def open(self, path: Path) -> PredictionReader:
        return PredictionReader(path)

    def keys(self, store: PredictionReader) -> list[str]:
        return store.row_ids

    def read(self, store: PredictionReader, key: str) -> np.ndarray:
        return store.read(key)


class Exported:
    """A feature store as one HDF5 file, read in place; tests/test_stores_hdf5.py tests the import."""

    what = "exported feature store"
    values = Features.values

    def write(self, path: Path, items: Items) -> None:
        inner = path.parent / "inner"
        shutil.rmtree(inner, ignore_errors=True)
        Features().write(inner / "store", items)
        path.unlink(missing_ok=True)  # export never overwrites a file
        export_store(inner / "store", path)
        shutil.rmtree(inner)

    def open(self, path: Path) -> ExportReader:
        return ExportReader(path)

    def keys(self, store: ExportReader) -> list[str]:
        return store.keys()

    def read(self, store: ExportReader, key: str) -> np.ndarray:
        return store.read(key)["x"]


class Tensors:
    """A checkpoint file. Its keys come back in safetensors' order, not in the order they were written."""

    what = "checkpoint"
    kept = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
    values = hnp.arrays(st.sampled_from(kept), any_shape)

    def write(self, path: Path, items: Items) -> None:
        import torch  # not at the top, because spawned processes only read

        from samlove.model.checkpoint import write_tensors

        tensors = {key: torch.from_numpy(np.array(value)) for key, value in items.items()}
        write_tensors(path, tensors, MADE)

    def open(self, path: Path) -> TensorReader:
        return TensorReader(path)

    def keys(self, store: TensorReader) -> list[str]:
        return store.keys()

    def read(self, store: TensorReader, key: str) -> np.ndarray:
        return store.read(key)


Kind = Any  # one of the adapters
STORES: list[Kind] = [Features(), Shards(), Predictions(), Exported(), Tensors()]


class Watched(dict):
    """Items that call `on_each` whenever a writer takes one."""

    def __init__(self, items: Items, on_each: Callable[[], object]) -> None:
        super().__init__(items)
        self.on_each = on_each

    def items(self) -> Iterator[tuple[str, np.ndarray]]:  # type: ignore[override]
        for pair in super().items():
            self.on_each()
            yield pair

    def __getitem__(self, key: str) -> np.ndarray:
        self.on_each()
        return super().__getitem__(key)


class Steps:
    """Counts this process's changes to the disk and calls of `step`, and kills it before step number `kill_at`."""

    def __init__(self, kill_at: int) -> None:
        self.seen, self.kill_at = 0, kill_at
        sys.addaudithook(self._audit)

    def step(self) -> None:
        if self.seen == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1

    def _audit(self, event: str, arguments: tuple) -> None:
        changed = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link")
        if changed or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            self.step()


def make_items(keys: list[str], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {key: rng.integers(0, 256, SHAPE, np.uint8) for key in keys}


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in files_of(path)}


def to_schema_1(path: Path) -> None:
    """Rewrite a feature store as earlier versions wrote it: without tables, all lists in the manifest."""
    store = FeatureStore.open(path)
    shards = [{"name": name, "keys": keys} for name, keys in store.shards.items()]
    for name in (INDEX, FILES, NAME):
        (path / name).unlink()
    write_json(path / NAME, seal({**store.manifest, "schema": 1, "shards": shards, "files": list_files(path)}))


def assert_same(kind: Kind, path: Path, items: Items) -> None:
    store = kind.open(path)
    found = kind.keys(store)
    assert (sorted(found) if isinstance(kind, Tensors) else found) == (
        sorted(items) if isinstance(kind, Tensors) else list(items)
    )
    assert len(store) == len(items)
    for key, value in items.items():
        array = kind.read(store, key)
        assert (array.dtype, array.shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(array, value)
