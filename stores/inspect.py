"""Describes and compares artefacts: one interface to feature stores, shard sets, predictions files and checkpoints."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from samlove.errors import RequestError, SamloveError, absence
from stores.features import FAILURES, Failure, FeatureStore
from stores.fingerprint import differing, flat
from stores.hdf5 import ExportReader
from stores.manifest import NAME, files_below
from stores.predictions import PredictionReader
from stores.sealed import BROKEN, is_hdf5, open_checked
from stores.shard_index import INDEX
from stores.shards import ShardReader
from stores.tensors import TensorReader, is_tensors

ARTEFACTS = "a feature store, an exported store, a shard set, a predictions file or a checkpoint"
Item = dict[str, Any]  # {name: array or JSON value}


@dataclass(frozen=True)
class Artefact:
    """An artefact of any kind, read only.

    arrays: {name: {"shape": [...], "dtype": str}}. For a shard set, whose samples may differ, the arrays of its first
    sample; empty for a checkpoint, whose items are tensors.
    files, bytes: number and total size of the files on disk.
    read: returns an item by its key; raises SamloveError if its bytes are damaged.
    """

    kind: str
    path: Path
    fingerprint: dict[str, Any]
    keys: list[str]
    arrays: dict[str, dict[str, Any]]
    failures: list[Failure]
    shards: int
    files: int
    bytes: int
    read: Callable[[str], Item]


def open_artefact(path: str | Path) -> Artefact:
    """The artefact at `path`. Raises RequestError if there is none, SamloveError if it cannot be opened."""
    path = Path(path)
    if (path / FAILURES).is_file() or any(path.glob("shard-*.zarr")):
        return _open_features(path)
    if path.is_dir() and ((path / INDEX).is_file() or any(path.glob("*.tar"))):
        return _open_shards(path)
    if (path / NAME).is_file():
        return _open_features(path)
    if path.is_file():
        if is_tensors(path):
            return _open_tensors(path)
        if is_hdf5(path):
            return _open_export(path) if _is_export(path) else _open_predictions(path)
        raise RequestError(f"{path}: a different kind of file; expected {ARTEFACTS}")
    if not path.is_dir():
        raise RequestError(f"{path}: {absence(path)}; expected {ARTEFACTS}")
    raise RequestError(f"{path}: expected {ARTEFACTS}, found none; name a file or folder inside it")


def _open_features(path: Path) -> Artefact:
    store = FeatureStore.open(path)
    fingerprint, arrays = (store.manifest[name] for name in ("fingerprint", "arrays"))
    shards, size = len(store.shards), _size(path)
    return Artefact(
        "feature store", path, fingerprint, store.keys(), arrays, store.failures, shards, *size, read=store.read
    )


def _open_shards(path: Path) -> Artefact:
    reader = ShardReader(path)
    arrays = _arrays(_sample(reader, 0)) if len(reader) else {}
    fingerprint, shards, size = reader.manifest.get("fingerprint", {}), len(list(path.glob("*.tar"))), _size(path)

    def read(key: str) -> Item:
        number = reader.index.find(key)
        if number is None:
            raise SamloveError(f"{path}: no sample {key!r}")
        return _sample(reader, number)

    return Artefact("shard set", path, fingerprint, reader.keys(), arrays, [], shards, *size, read=read)


def _open_predictions(path: Path) -> Artefact:
    reader = PredictionReader(path)
    arrays = {"bins": {"shape": list(reader.shape), "dtype": "uint8"}}

    def read(row: str) -> Item:
        return {"bins": reader.read(row)}

    size = path.stat().st_size
    return Artefact("predictions file", path, reader.attrs, reader.row_ids, arrays, [], 1, 1, size, read=read)


def _is_export(path: Path) -> bool:
    try:
        with open_checked(path) as file:
            return "files" in file
    except BROKEN:
        return False


def _open_export(path: Path) -> Artefact:
    reader = ExportReader(path)
    fingerprint, arrays, shards = (reader.manifest[name] for name in ("fingerprint", "arrays", "shards"))
    shards = shards if isinstance(shards, int) else len(shards)  # schema 1 lists them
    size, kind = path.stat().st_size, "exported feature store"
    return Artefact(
        kind,
        path,
        fingerprint,
        reader.keys(),
        arrays,
        reader.failures,
        shards,
        1,
        size,
        read=lambda key: {**reader.read(key)},
    )


def _open_tensors(path: Path) -> Artefact:
    reader = TensorReader(path)

    def read(name: str) -> Item:
        return {"tensor": reader.read(name)}

    return Artefact("checkpoint", path, reader.header, reader.keys(), {}, [], 1, 1, path.stat().st_size, read=read)


def _sample(reader: ShardReader, i: int) -> Item:
    return {name: value for name, value in reader[i].items() if name != "__key__"}


def _arrays(item: Item) -> dict[str, dict[str, Any]]:
    arrays = {name: value for name, value in item.items() if isinstance(value, np.ndarray)}
    return {name: {"shape": list(a.shape), "dtype": a.dtype.name} for name, a in sorted(arrays.items())}


def _size(folder: Path) -> tuple[int, int]:
    try:
        sizes = [path.stat().st_size for path in files_below(folder).values()]
    except OSError as error:  # a link whose target does not exist
        raise SamloveError(f"{error.filename}: {absence(Path(error.filename))}; restore the file") from None
    return len(sizes), sum(sizes)


@dataclass
class Difference:
    """How the second of two artefacts differs from the first; None and empty fields mean no difference."""

    kinds: tuple[str, str] | None = None
    fingerprint: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # dotted field -> both values
    arrays: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)  # keys in both, with different values
    largest: dict[str, float] = field(default_factory=dict)  # array -> largest absolute difference over changed keys

    def __bool__(self) -> bool:
        parts = (self.kinds, self.fingerprint, self.arrays, self.only_first, self.only_second, self.changed)
        return any(bool(part) for part in parts)


def diff(first: str | Path, second: str | Path) -> Difference:
    """Compare two artefacts: their fingerprints, keys and arrays, and every value of the keys in both."""
    a, b = open_artefact(first), open_artefact(second)
    found = Difference(None if a.kind == b.kind else (a.kind, b.kind))
    found.fingerprint = differing(flat(a.fingerprint), flat(b.fingerprint))
    found.arrays = differing(a.arrays, b.arrays)
    in_first, in_second = set(a.keys), set(b.keys)
    found.only_first = [key for key in a.keys if key not in in_second]
    found.only_second = [key for key in b.keys if key not in in_first]
    for key in (key for key in a.keys if key in in_second):
        x, y = a.read(key), b.read(key)
        if not _same(x, y):
            found.changed.append(key)
            for name in x.keys() & y.keys():
                found.largest[name] = max(found.largest.get(name, 0.0), _distance(x[name], y[name]))
    return found


def _same(x: Item, y: Item) -> bool:
    return x.keys() == y.keys() and all(_bits(x[name]) == _bits(y[name]) for name in x)


def _bits(value: Any) -> Any:
    """A value in a form to compare bit by bit: an array's dtype, shape and bytes, or a JSON text."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    return json.dumps(value, sort_keys=True)


def _distance(x: Any, y: Any) -> float:
    """Largest absolute difference; infinite if the two differ but cannot be subtracted."""
    if not isinstance(x, np.ndarray) or not isinstance(y, np.ndarray) or x.shape != y.shape:
        return 0.0 if _bits(x) == _bits(y) else float("inf")
    return float(np.abs(x.astype(np.float64) - y.astype(np.float64)).max(initial=0.0))


def coverage(keys: Iterable[str], wanted: Iterable[tuple[str, str]]) -> dict[str, tuple[int, int]]:
    """Count how many of each part's wanted keys exist: {part: (found, wanted)}; `wanted` is (key, part) pairs."""
    pairs, existing = set(wanted), set(keys)
    total, found = Counter(part for _, part in pairs), Counter(part for key, part in pairs if key in existing)
    return {part: (found[part], total[part]) for part in sorted(total)}
