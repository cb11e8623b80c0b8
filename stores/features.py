"""The feature store: a folder of Zarr v3 groups, one a shard, beside a manifest and a failure ledger.

    PATH/manifest.json          schema, fingerprint, code, arrays {name: {shape, dtype}}, number of keys, shards, files
    PATH/failures.csv           key,stage,error of every item that could not be computed
    PATH/shard-00000.zarr/      group; its attributes list the shard's keys and their ids; one array a feature

An array of a shard is (keys in the shard, *item shape), one Zarr shard (one file) of chunks that hold one
item each, or `chunk_rows` rows of it. Every chunk ends in its crc32c, so damage is found on reading.

Writing: one shard has one writer. It is written to SCRATCH/partial and, when whole, renamed into
SCRATCH/<fingerprint id>/, its checksums beside that folder; what lies there is the progress, so a killed run resumes.
Publishing renames the whole folder to PATH. Published files are never edited: what a new store has in common with the
one before is linked (see stores.earlier).
"""

import csv
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import zarr

from samlove.errors import RequestError, SamloveError
from stores.chunks import Compression, ShardArray, compressors
from stores.codec import decode, is_coded, shapes
from stores.earlier import Shard, layout, link_folder, published_shards, shard_attributes, shard_name
from stores.fingerprint import fingerprint_id
from stores.manifest import (
    NAME,
    Files,
    check_part,
    file_entry,
    identity,
    list_files,
    read_manifest,
    refuse_replaced,
    replace_folder,
    write_json,
    write_manifest,
)
from stores.remote import AnyPath, as_path, keep_open

Arrays = dict[str, np.ndarray]
DTYPES = ("bool", "uint8", "int8", "uint16", "int32", "int64", "float16", "float32")  # what a feature may be
FAILURES = "failures.csv"


class Failure(NamedTuple):
    """An item that could not be computed: its key, the stage that tried, and why."""

    key: str
    stage: str
    error: str


def write_failures(path: Path, failures: Sequence[Failure]) -> None:
    """Write a failure ledger."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([Failure._fields, *failures])


class FeatureStore:
    """A published store, read only. Opened files belong to one process: a copy in another opens its own.

    path: a folder, or a URL (see stores.remote).
    """

    def __init__(self, path: str | AnyPath) -> None:
        self.path = as_path(path)
        self._identity = identity(self.path / NAME)
        self.manifest: dict[str, Any] = read_manifest(self.path, "run the stage that makes it, or dvc pull")
        try:
            names = [*(shard["name"] for shard in self.manifest["shards"]), *self.manifest["arrays"]]
            total, _ = self.manifest["keys"], self.manifest["fingerprint"]
        except (KeyError, TypeError) as error:
            raise SamloveError(
                f"{self.path / NAME}: expected a feature store's ({error!r}); remake the store"
            ) from None
        for name in names:
            check_part(name, self.path / NAME)
        self._place: dict[str, tuple[str, int]] = {}  # key -> shard, row in it
        for shard in self.manifest["shards"]:
            keys = shard_attributes(self.path / shard["name"])["keys"]
            self._place.update({key: (shard["name"], row) for row, key in enumerate(keys)})
        if len(self._place) != total:
            raise SamloveError(
                f"{self.path}: expected {total} keys by its manifest, found {len(self._place)} "
                "in its shards; remake the store"
            )
        self._opened: dict[str, dict[str, ShardArray]] = {}
        self._coded = is_coded(self.manifest["arrays"])

    @classmethod
    def open(cls, path: str | AnyPath) -> "FeatureStore":
        """Open the store below `path`; RequestError where there is none, SamloveError where it is damaged."""
        return cls(path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def keys(self) -> list[str]:
        """All keys, shard by shard: in a store made at once the order in which they were asked for."""
        return list(self._place)

    def keys_of(self, shard: str) -> list[str]:
        """The keys that lie in one shard, by its name."""
        return [key for key, (name, _) in self._place.items() if name == shard]

    def id_of(self, key: str) -> str:
        """What stands for the content that a row was computed from; empty where that was not recorded."""
        shard, row = self._place[key]
        return dict(enumerate(shard_attributes(self.path / shard).get("ids", []))).get(row, "")

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
        with (self.path / FAILURES).open("r", newline="", encoding="utf-8") as file:
            return [Failure(**row) for row in csv.DictReader(file)]

    def _arrays(self, shard: str) -> dict[str, ShardArray]:
        if shard not in self._opened:
            arrays = {name: ShardArray(self.path / shard / name) for name in self.manifest["arrays"]}
            refuse_replaced(self.path / NAME, self._identity)
            self._opened[shard] = arrays
            keep_open(self._opened, self.path)
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
        except (OSError, ValueError, KeyError, TypeError, IndexError, MemoryError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SamloveError(f"{self.path / shard}: {key!r} cannot be read ({reason}); remake the store") from error


@dataclass(frozen=True)
class FeatureStoreWriter:
    """Fills and publishes one store; holds no open file, so any process may write any of its shards.

    path: where the store is published. scratch: a folder on the same file system, outside every DVC out.
    keys: all items, in order; those that lie in no shard yet fill new ones, `shard_size` each.
    chunk_rows: rows of axis 0 that are read together; None keeps an item in one chunk.
    compression: of every chunk; it loses nothing.
    ids: what stands for the content of each key's source; a row is reused where it is the same.
    code: what stands for the code that computes the rows; one of other code is never reused.
    previous: stores to take rows and shards from: the first that is there, of this fingerprint and code.
    """

    path: Path
    scratch: Path
    fingerprint: Mapping[str, Any]
    keys: Sequence[str]
    shard_size: int
    chunk_rows: int | None = None
    compression: Compression = "none"
    ids: Mapping[str, str] = field(default_factory=dict)
    code: str = ""
    previous: Sequence[Path] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        object.__setattr__(self, "scratch", Path(self.scratch))
        if self.shard_size < 1 or (self.chunk_rows is not None and self.chunk_rows < 1):
            raise RequestError(f"{self.path}: expected shard_size and chunk_rows of at least 1")
        if repeated := [key for key, count in Counter(self.keys).items() if count > 1]:
            raise RequestError(f"{self.path}: expected each key once, found repeated: {repeated[:5]}")

    @property
    def staging(self) -> Path:
        """Where finished shards wait for publication: one folder a fingerprint and code."""
        return self.scratch / fingerprint_id({**self.fingerprint, "code": self.code})

    @property
    def _records(self) -> Path:
        """The checksums of the shards in staging; not among them, for staging itself is what becomes the store."""
        return self.staging.with_name(self.staging.name + ".files")

    def clean(self) -> None:
        """Remove from scratch what a killed run, or a loss of power, left half done; every byte there is read."""
        shutil.rmtree(self.scratch / "partial", ignore_errors=True)
        for folder in self.staging.glob("shard-*.zarr"):
            shard = self._staged(folder.name)
            if shard is None or not shard.whole():
                shutil.rmtree(folder)

    @cached_property
    def _published(self) -> dict[int, Shard]:
        return published_shards(self.previous, self.fingerprint, self.code, self.chunk_rows)

    def _staged(self, name: str) -> Shard | None:
        """A shard that this run or a stopped one finished."""
        try:
            files: Files = json.loads((self._records / f"{name}.json").read_text())
        except (OSError, ValueError):
            return None
        return Shard.read(self.staging / name, files, self.chunk_rows)

    def _shard(self, number: int) -> Shard | None:
        """What there is of a shard: as finished in scratch, or else as published before."""
        return self._staged(shard_name(number)) or self._published.get(number)

    def _good(self, shard: Shard | None, planned: Sequence[str]) -> list[str]:
        """The planned keys whose rows in a shard are as good as new."""
        return shard.good(planned, self.ids) if shard else []

    @cached_property
    def _plan(self) -> dict[int, list[str]]:
        names = [folder.name for folder in self.staging.glob("shard-*.zarr")]
        numbers = {int(name.removeprefix("shard-").removesuffix(".zarr")) for name in names} | set(self._published)
        standing = {number: shard.planned for number in numbers if (shard := self._shard(number))}
        return dict(layout(self.keys, standing, self.shard_size))

    def plan(self) -> list[tuple[int, list[str]]]:
        """Every shard's number and keys."""
        return list(self._plan.items())

    def todo(self) -> list[tuple[int, list[str]]]:
        """Every shard still to write, and those of its keys that it lacks: never computed, of a changed source, or
        failed, for that may be mended. None lack where rows are only to be left out."""
        todo = []
        for number, planned in self._plan.items():
            shard = self._shard(number)
            lacking = self._lacking(shard, planned)
            if lacking or (shard and len(planned) < len(shard.ids)):
                todo.append((number, lacking))
        return todo

    def lacking(self, number: int) -> list[str]:
        """Those of a shard's keys that it lacks by now: another process may have written it since `todo`."""
        return self._lacking(self._shard(number), self._plan[number])

    def _lacking(self, shard: Shard | None, planned: Sequence[str]) -> list[str]:
        kept = set(self._good(shard, planned))
        return [key for key in planned if key not in kept]

    def write_shard(self, number: int, items: Mapping[str, Mapping[str, np.ndarray]]) -> bool:
        """Write one shard whole, atomically; {key: {name: array}}, of the keys that `todo` named, failed ones left out.

        Good rows that are there already are kept; where they are all, nothing is written, and False returned.

        Every item has the same names, shapes and dtypes. Raises SamloveError, naming key and array, where
        they differ, where a dtype is not storable, where a float is not finite (fp16 overflows to infinity).
        An OSError, as where the disk is full, leaves the shards finished before.
        """
        planned = self._plan.get(number, [])
        if unknown := [key for key in items if key not in planned]:
            raise SamloveError(f"{self.path}: shard {number} has no place for {unknown[:5]}")
        shard = self._shard(number)
        good = self._good(shard, planned)
        if shard and not items and len(good) == len(shard.ids):
            return False  # staged, or linked when it is published
        rows: dict[str, Mapping[str, np.ndarray]] = {**items}
        if shard:
            rows |= shard.rows([key for key in good if key not in items])
        keys = [key for key in planned if key in rows]
        for key in keys:
            self._check_item(key, rows[key], rows[keys[0]])
        attributes = {
            "keys": keys,
            "ids": [self.ids.get(key, "") for key in keys],
            "planned": planned,
            "chunk_rows": self.chunk_rows,
        }
        # Of this writing alone: a worker that was thought dead may be at the same shard still.
        partial = self.scratch / "partial" / uuid4().hex / shard_name(number)
        try:
            self._write_group(partial, attributes, {key: rows[key] for key in keys})
            self._finish(partial, list_files(partial))
        finally:  # the disk is full, most often: leave the room there is
            shutil.rmtree(partial.parent, ignore_errors=True)
        return True

    def _write_group(self, partial: Path, attributes: dict, rows: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        group = zarr.create_group(partial, attributes=attributes)
        items = list(rows.values())
        for name, first in items[0].items() if items else ():
            shape = first.shape
            chunk = (min(self.chunk_rows, shape[0]), *shape[1:]) if self.chunk_rows and shape else shape
            stored = (-(-shape[0] // chunk[0]) * chunk[0], *shape[1:]) if shape else shape  # shards hold whole chunks
            array = group.create_array(
                name,
                shape=(len(items), *shape),
                chunks=(1, *chunk),
                shards=(len(items), *stored),
                dtype=first.dtype,
                compressors=compressors(self.compression),
                config={"write_empty_chunks": True},  # zeros are data: absent bytes would hide damage
            )
            array[:] = np.stack([item[name] for item in items])  # (keys, *shape)

    def _finish(self, partial: Path, files: Files) -> None:
        """Move a whole shard to staging, its checksums first: a shard that is there has them."""
        self._records.mkdir(parents=True, exist_ok=True)
        self.staging.mkdir(parents=True, exist_ok=True)
        write_json(self._records / f"{partial.name}.json", files)
        final = self.staging / partial.name
        shutil.rmtree(final, ignore_errors=True)
        try:
            partial.rename(final)
        except OSError:
            if not final.exists():  # another writer put the same shard there since
                raise

    def _check_item(self, key: str, item: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray]) -> None:
        specs, found = ({name: (a.shape, a.dtype) for name, a in arrays.items()} for arrays in (first, item))
        if found != specs:
            raise SamloveError(f"{self.path}: {key!r}: expected arrays {specs} as the shard's first, found {found}")
        for name, array in item.items():
            check_part(name, f"{self.path}: {key!r}")
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

    def publish(self, failures: Sequence[Failure] = (), keep: Path | None = None) -> None:
        """Move all shards, with manifest and failure ledger, to `path` in one rename.

        keep: a folder on the same file system that comes to hold links to the published files, before they are.

        Raises SamloveError where a shard is not written, or a missing key is not among the failures.
        """
        excused = {f.key for f in failures}
        shards: list[dict[str, Any]] = []
        arrays: dict[str, Any] = {}
        files: Files = {}
        for number, planned in self._plan.items():
            shard = self._shard(number)
            good = self._good(shard, planned)
            lost = [key for key in planned if key not in good and key not in excused]
            if shard is None or lost or len(good) < len(shard.ids):
                lost = lost or [*shard.ids] if shard else planned
                raise SamloveError(
                    f"{self.path}: shard {number} lacks {len(lost)} items without a recorded failure, "
                    f"first {lost[0]!r}; run the stage again"
                )
            name = shard_name(number)
            if not good:
                continue  # all its items failed: nothing to keep
            if shard.folder != self.staging / name:
                self._adopt(shard)
            group = zarr.open_group(self.staging / name, mode="r")
            found = {n: {"shape": list(a.shape[1:]), "dtype": a.dtype.name} for n, a in sorted(group.arrays())}
            arrays = arrays or found
            if found != arrays:
                raise SamloveError(f"{self.path}: shard {number} holds {found}, the shards before it {arrays}")
            shards.append({"name": name, "keys": len(good)})
            files |= {f"{name}/{path}": entry for path, entry in shard.files.items()}
        self.staging.mkdir(parents=True, exist_ok=True)
        names = [shard["name"] for shard in shards]
        for other in self.staging.iterdir():
            if other.is_dir() and other.name not in names:
                shutil.rmtree(other)
            elif other.is_file():
                other.unlink()  # a manifest that a killed run left
        write_failures(self.staging / FAILURES, failures)
        files[FAILURES] = file_entry(self.staging / FAILURES)
        manifest = {
            "fingerprint": dict(self.fingerprint),
            "code": self.code,
            "arrays": arrays,
            "keys": sum(shard["keys"] for shard in shards),
            "shards": shards,
        }
        write_manifest(self.staging, manifest, files)
        if keep is not None:
            partial = self.scratch / "partial" / "keep"
            shutil.rmtree(partial, ignore_errors=True)
            link_folder(self.staging, partial)
            replace_folder(partial, keep)
        replace_folder(self.staging, self.path)
        shutil.rmtree(self._records, ignore_errors=True)
        shutil.rmtree(self.scratch / "partial", ignore_errors=True)

    def _adopt(self, shard: Shard) -> None:
        """Link a published shard, all of whose rows are good, into staging."""
        partial = self.scratch / "partial" / shard.folder.name
        shutil.rmtree(partial, ignore_errors=True)
        link_folder(shard.folder, partial)
        self._finish(partial, shard.files)
