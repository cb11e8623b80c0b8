"""The feature store: a folder of Zarr v3 groups, one a shard, beside a manifest and a failure ledger.

    PATH/manifest.json          schema, fingerprint, arrays {name: {shape, dtype}}, number of keys, shards
    PATH/failures.csv           key,stage,error of every item that could not be computed
    PATH/shard-00000.zarr/      group; its attributes list the shard's keys; one array a feature

An array of a shard is (keys in the shard, *item shape), one Zarr shard (one file) of chunks that hold one
item each, or `chunk_rows` rows of it. Every chunk ends in its crc32c, so damage is found on reading.

Writing: one shard has one writer. It is computed in SCRATCH/<fingerprint id>/, under a temporary name, and
renamed when whole; what lies there under its final name is the progress, so a killed run resumes. Publishing
renames the whole folder to PATH. Published files are never edited.
"""

import csv
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr

from samlove.errors import RequestError, SamloveError
from stores.chunks import Compression, ShardArray, compressors
from stores.codec import decode, is_coded, shapes
from stores.fingerprint import fingerprint_id
from stores.manifest import NAME, SCHEMA, read_manifest, replace_folder, write_json

Arrays = dict[str, np.ndarray]
DTYPES = ("bool", "uint8", "int8", "uint16", "int32", "int64", "float16", "float32")  # what a feature may be
FAILURES = "failures.csv"


class Failure(NamedTuple):
    """An item that could not be computed: its key, the stage that tried, and why."""

    key: str
    stage: str
    error: str


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.zarr"


def _attributes(shard: Path) -> dict[str, Any]:
    """The attributes of a shard's group; SamloveError where it is absent or torn."""
    try:
        return json.loads((shard / "zarr.json").read_text())["attributes"]
    except (OSError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SamloveError(f"{shard}: expected a Zarr group with its keys ({reason}); remake the store") from None


class FeatureStore:
    """A published store, read only. Opened files belong to one process: a copy in another opens its own."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] = read_manifest(self.path, "run the stage that makes it, or dvc pull")
        self._place: dict[str, tuple[str, int]] = {}  # key -> shard, row in it
        for shard in self.manifest["shards"]:
            keys = _attributes(self.path / shard["name"])["keys"]
            self._place.update({key: (shard["name"], row) for row, key in enumerate(keys)})
        if len(self._place) != self.manifest["keys"]:
            raise SamloveError(
                f"{self.path}: expected {self.manifest['keys']} keys by its manifest, found {len(self._place)} "
                "in its shards; remake the store"
            )
        self._opened: dict[str, dict[str, ShardArray]] = {}
        self._coded = is_coded(self.manifest["arrays"])

    @classmethod
    def open(cls, path: str | Path) -> "FeatureStore":
        """Open the store below `path`; RequestError where there is none, SamloveError where it is damaged."""
        return cls(path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def keys(self) -> list[str]:
        """All keys, in the order in which they were planned."""
        return list(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, key: object) -> bool:
        return key in self._place

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of an item."""
        return shapes(self.manifest["arrays"])

    @property
    def failures(self) -> list[Failure]:
        """The failure ledger."""
        with open(self.path / FAILURES, newline="", encoding="utf-8") as file:
            return [Failure(**row) for row in csv.DictReader(file)]

    def _arrays(self, shard: str) -> dict[str, ShardArray]:
        if shard not in self._opened:
            self._opened[shard] = {name: ShardArray(self.path / shard / name) for name in self.manifest["arrays"]}
        return self._opened[shard]

    def read(self, key: str, rows: slice | None = None) -> Arrays:
        """Copies of one item's arrays, {name: (*item shape)}; `rows`, without a step, cuts axis 0 of each.

        Only the chunks that hold these rows are read, and their checksums compared. Features that stores.codec keeps
        narrower come as floats.

        Raises SamloveError where the store has no such key, or where the bytes on disk are damaged.
        """
        arrays = self.read_stored(key, rows)
        return decode(arrays) if self._coded else arrays

    def read_stored(self, key: str, rows: slice | None = None) -> Arrays:
        """As `read`, the arrays as they are kept, under the names of the manifest."""
        if key not in self._place:
            known = [f"{f.stage} failed: {f.error}" for f in self.failures if f.key == key]
            raise SamloveError(f"{self.path}: no item {key!r} ({'; '.join(known) or 'not among its keys'})")
        shard, row = self._place[key]
        try:
            return {name: array.read(row, rows) for name, array in self._arrays(shard).items()}
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SamloveError(f"{self.path / shard}: {key!r} cannot be read ({reason}); remake the store") from error


@dataclass(frozen=True)
class FeatureStoreWriter:
    """Fills and publishes one store; holds no open file, so any process may write any of its shards.

    path: where the store is published. scratch: a folder on the same file system, outside every DVC out.
    keys: all items, in order; shard `n` holds keys[n * shard_size : (n + 1) * shard_size].
    chunk_rows: rows of axis 0 that are read together; None keeps an item in one chunk.
    compression: of every chunk; it loses nothing.
    """

    path: Path
    scratch: Path
    fingerprint: Mapping[str, Any]
    keys: Sequence[str]
    shard_size: int
    chunk_rows: int | None = None
    compression: Compression = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        object.__setattr__(self, "scratch", Path(self.scratch))
        if self.shard_size < 1 or (self.chunk_rows is not None and self.chunk_rows < 1):
            raise RequestError(f"{self.path}: expected shard_size and chunk_rows of at least 1")
        if repeated := [key for key, count in Counter(self.keys).items() if count > 1]:
            raise RequestError(f"{self.path}: expected each key once, found repeated: {repeated[:5]}")

    @property
    def staging(self) -> Path:
        """Where finished shards wait for publication: one folder a fingerprint."""
        return self.scratch / fingerprint_id(self.fingerprint)

    def plan(self) -> list[tuple[int, list[str]]]:
        """Every shard's number and keys."""
        return [(number, self._planned(number)) for number in range(-(-len(self.keys) // self.shard_size))]

    def _planned(self, number: int) -> list[str]:
        return list(self.keys[number * self.shard_size : (number + 1) * self.shard_size])

    def todo(self) -> list[tuple[int, list[str]]]:
        """The shards still to compute. One that lacks a planned key is tried again: its failure may be mended."""
        return [(number, keys) for number, keys in self.plan() if self._written(number) != keys]

    def _written(self, number: int) -> list[str] | None:
        """The keys of a finished shard, None where it is not finished or was planned otherwise."""
        shard = self.staging / _shard_name(number)
        try:
            attributes = _attributes(shard)
        except SamloveError:  # absent, or torn by a loss of power: computed anew
            return None
        same = attributes["planned"] == self._planned(number) and attributes["chunk_rows"] == self.chunk_rows
        return attributes["keys"] if same else None

    def write_shard(self, number: int, items: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Write one shard whole, atomically; {key: {name: array}}, planned keys that failed left out.

        Every item has the same names, shapes and dtypes. Raises SamloveError, naming key and array, where
        they differ, where a dtype is not storable, where a float is not finite (fp16 overflows to infinity).
        """
        planned = self._planned(number)
        if unknown := [key for key in items if key not in planned]:
            raise SamloveError(f"{self.path}: shard {number} has no place for {unknown[:5]}")
        keys = [key for key in planned if key in items]
        specs = {name: (a.shape, a.dtype) for name, a in items[keys[0]].items()} if keys else {}
        for key in keys:
            self._check_item(key, items[key], specs)
        partial = self.scratch / "partial" / f"{fingerprint_id(self.fingerprint)}-{_shard_name(number)}"
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
        attributes = {"keys": keys, "planned": planned, "chunk_rows": self.chunk_rows}
        group = zarr.create_group(partial, attributes=attributes)
        for name, (shape, dtype) in specs.items():
            rows = (min(self.chunk_rows, shape[0]), *shape[1:]) if self.chunk_rows and shape else shape
            stored = (-(-shape[0] // rows[0]) * rows[0], *shape[1:]) if shape else shape  # a shard holds whole chunks
            array = group.create_array(
                name,
                shape=(len(keys), *shape),
                chunks=(1, *rows),
                shards=(len(keys), *stored),
                dtype=dtype,
                compressors=compressors(self.compression),
                config={"write_empty_chunks": True},  # zeros are data: absent bytes would hide damage
            )
            array[:] = np.stack([items[key][name] for key in keys])  # (keys, *shape)
        self.staging.mkdir(parents=True, exist_ok=True)
        final = self.staging / _shard_name(number)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)

    def _check_item(self, key: str, item: Mapping[str, np.ndarray], specs: Mapping[str, tuple]) -> None:
        found = {name: (a.shape, a.dtype) for name, a in item.items()}
        if found != specs:
            raise SamloveError(f"{self.path}: {key!r}: expected arrays {specs} as the shard's first, found {found}")
        for name, array in item.items():
            if array.dtype.name not in DTYPES or 0 in array.shape:
                raise SamloveError(
                    f"{self.path}: {key!r}: {name}: expected a non-empty array of {', '.join(DTYPES)}, "
                    f"found {array.dtype.name} {array.shape}"
                )
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise SamloveError(
                    f"{self.path}: {key!r}: {name}: expected finite values, found infinity or NaN in "
                    f"{array.dtype.name}; where that is an overflow, set the encoder's dtype to float32"
                )

    def publish(self, failures: Sequence[Failure] = ()) -> None:
        """Move all shards, with manifest and failure ledger, to `path` in one rename.

        Raises SamloveError where a shard is not written, or a missing key is not among the failures.
        """
        excused = {f.key for f in failures}
        shards: list[dict[str, Any]] = []
        arrays: dict[str, Any] = {}
        for number, planned in self.plan():
            keys = self._written(number)
            lost = planned if keys is None else [k for k in planned if k not in keys and k not in excused]
            if lost:
                raise SamloveError(
                    f"{self.path}: shard {number} lacks {len(lost)} items without a recorded failure, "
                    f"first {lost[0]!r}; run the stage again"
                )
            if not keys:
                continue  # all its items failed: nothing to keep
            group = zarr.open_group(self.staging / _shard_name(number), mode="r")
            found = {n: {"shape": list(a.shape[1:]), "dtype": a.dtype.name} for n, a in sorted(group.arrays())}
            arrays = arrays or found
            if found != arrays:
                raise SamloveError(f"{self.path}: shard {number} holds {found}, the shards before it {arrays}")
            shards.append({"name": _shard_name(number), "keys": len(keys)})
        self.staging.mkdir(parents=True, exist_ok=True)
        keep = [shard["name"] for shard in shards]
        for other in self.staging.iterdir():
            if other.is_dir() and other.name not in keep:
                shutil.rmtree(other)
        with open(self.staging / FAILURES, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([Failure._fields, *failures])
        manifest = {
            "schema": SCHEMA,
            "fingerprint": dict(self.fingerprint),
            "arrays": arrays,
            "keys": sum(shard["keys"] for shard in shards),
            "shards": shards,
        }
        write_json(self.staging / NAME, manifest)
        shutil.rmtree(self.scratch / "partial", ignore_errors=True)
        replace_folder(self.staging, self.path)
