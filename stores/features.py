"""The feature store: a folder of Zarr v3 groups, one per shard, with a manifest, an index and a failure log.

    PATH/manifest.json          schema, fingerprint, code, arrays {name: {shape, dtype}}, number of keys and of shards,
                                and the checksums of the files next to it
    PATH/index.arrow            one row per item, in order: key, id, shard, row (see stores.table)
    PATH/files.arrow            the files of the shards (see stores.listing)
    PATH/failures.csv           key,stage,error of every item that could not be computed
    PATH/shard-00000.zarr/      group; its attributes list the shard's keys and their ids; one array per feature

An array of a shard is (keys in the shard, *item shape), one Zarr shard (one file) of chunks that each hold one item,
or `chunk_rows` rows of one item. Every chunk ends in its crc32c, so damage is found on reading.

This module reads a published store; stores.feature_writer writes one. A store of schema 1 has neither index.arrow nor
files.arrow; its index is built in memory.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from samlove.errors import SamloveError
from stores.chunks import ShardArray
from stores.codec import decode, is_coded, shapes
from stores.earlier import shard_attributes, shard_name, shard_number
from stores.listing import check_beside
from stores.manifest import NAME, check_part, identity, read_manifest, refuse_replaced
from stores.remote import AnyPath, as_path, keep_open, regular
from stores.table import TEXT, Table, TableWriter

Arrays = dict[str, np.ndarray]
FAILURES = "failures.csv"
INDEX = "index.arrow"
INDEX_COLUMNS = {
    "key": TEXT,
    "id": TEXT,
    "shard": "int32",
    "row": "int32",
}  # id: of the source content, as in the writer
REMEDY = "recompute the store"


class Failure(NamedTuple):
    """An item that could not be computed: its key, the stage that tried to compute it, and why it failed."""

    key: str
    stage: str
    error: str


def write_failures(path: Path, failures: Sequence[Failure]) -> None:
    """Write a failure log."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([Failure._fields, *failures])


def read_failures(file: IO[str]) -> list[Failure]:
    """The entries of an open failure log. Raises ValueError if it is not one."""
    try:
        header, *rows = csv.reader(file)
        if tuple(header) != Failure._fields:
            raise ValueError(f"columns {','.join(header)}")
        return [Failure(*row) for row in rows]
    except (csv.Error, TypeError, ValueError) as error:
        raise ValueError(f"expected a table of {','.join(Failure._fields)} ({error})") from None


class FeatureStore:
    """A published store, read only. Can be pickled: each process opens its own files.

    path: a folder, or a URL (see stores.remote).
    """

    def __init__(self, path: str | AnyPath) -> None:
        self.path = as_path(path)
        self._identity = identity(self.path / NAME)
        self.manifest: dict[str, Any] = read_manifest(self.path, "run the stage that writes it, or: dvc pull")
        try:
            names, total = self.manifest["arrays"].keys(), self.manifest["keys"]
            _ = self.manifest["fingerprint"], self.manifest["shards"]
            self._coded = is_coded(self.manifest["arrays"])
        except (AttributeError, KeyError, TypeError) as error:
            raise SamloveError(
                f"{self.path / NAME}: not a feature store's manifest ({error!r}); if it should be one, recompute it"
            ) from None
        for name in names:
            check_part(name, self.path / NAME)
        check_beside(self.path, self.manifest, REMEDY)
        source = self.path / INDEX if self.manifest["schema"] > 1 else self._index_of_attributes()
        self._index = Table(source, INDEX_COLUMNS, REMEDY, sorted_by="key")
        if len(self._index) != total:
            raise SamloveError(
                f"{self.path}: expected {total} keys, as in its manifest, found {len(self._index)}; {REMEDY}"
            )
        self._opened: dict[str, dict[str, ShardArray]] = {}

    def _index_of_attributes(self) -> bytes:
        return index_of_attributes(self.manifest, lambda shard: shard_attributes(self.path / shard), self.path / NAME)

    @classmethod
    def open(cls, path: str | AnyPath) -> "FeatureStore":
        """Open the store at `path`. Raises RequestError if there is none, SamloveError if it is damaged."""
        return cls(path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def keys(self) -> list[str]:
        """All keys, shard by shard. If the store was computed in one run, this is the order of the writer's `keys`."""
        return list(self._index.texts("key"))

    def key(self, place: int) -> str:
        """The key at a place in the order of `keys`."""
        return self._index.text("key", place)

    @property
    def shards(self) -> dict[str, int]:
        """The number of keys in each shard, by the name of its folder, in order."""
        numbers, counts = np.unique(self._index.numbers("shard"), return_counts=True)
        return {shard_name(number): int(count) for number, count in zip(numbers, counts, strict=True)}

    def keys_of(self, shard: str) -> list[str]:
        """The keys in the shard of this name."""
        places = np.flatnonzero(self._index.numbers("shard") == shard_number(shard))
        return [self.key(int(place)) for place in places]

    def id_of(self, key: str) -> str:
        """The id of the source content that the item of `key` was computed from; empty if it was not recorded.

        Raises SamloveError if the store has no such key.
        """
        return self._index.text("id", self._place(key))

    def _place(self, key: str) -> int:
        place = self._index.find(key)
        if place is None:
            known = [f"{f.stage} failed: {f.error}" for f in self.failures if f.key == key]
            raise SamloveError(f"{self.path}: no item {key!r} ({'; '.join(known) or 'not among its keys'})")
        return place

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._index.find(key) is not None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of an item, by name."""
        return shapes(self.manifest["arrays"])

    @property
    def failures(self) -> list[Failure]:
        """The failure log. Raises SamloveError if it is missing or damaged."""
        try:
            with regular(self.path / FAILURES).open("r", newline="", encoding="utf-8") as file:
                return read_failures(file)
        except (OSError, ValueError) as error:
            raise SamloveError(f"{self.path / FAILURES}: not a failure log ({error}); {REMEDY}") from None

    def _arrays(self, shard: str) -> dict[str, ShardArray]:
        arrays = self._opened.get(shard)  # another thread may close any shard at any time
        if arrays is None:
            keep_open(self._opened, self.path, files=len(self.manifest["arrays"]))
            arrays = {name: ShardArray(self.path / shard / name) for name in self.manifest["arrays"]}
            refuse_replaced(self.path / NAME, self._identity)
            self._opened[shard] = arrays
        return arrays

    def read(self, key: str, rows: slice | None = None) -> Arrays:
        """Copies of one item's arrays, {name: (*item shape)}. `rows`, a slice without a step, selects along axis 0.

        Reads only the chunks that hold these rows, and checks their checksums. Features that stores.codec stores in a
        narrower dtype are returned as floats.

        Raises SamloveError if the store has no such key, or if the bytes on disk are damaged.
        """
        arrays = self.read_stored(key, rows)
        try:
            return decode(arrays) if self._coded else arrays
        except SamloveError as error:
            raise SamloveError(f"{self.path}: {key!r}: {error}; {REMEDY}") from None

    def read_stored(self, key: str, rows: slice | None = None) -> Arrays:
        """As `read`, but returns the arrays as they are stored, under the names in the manifest."""
        place = self._place(key)
        shard, row = shard_name(int(self._index.numbers("shard")[place])), int(self._index.numbers("row")[place])
        try:
            return {name: array.read(row, rows) for name, array in self._arrays(shard).items()}
        except (OSError, ValueError, KeyError, TypeError, IndexError, MemoryError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SamloveError(
                f"{self.path / shard}: {key!r} cannot be read ({reason}); recompute the store"
            ) from error


def index_of_attributes(manifest: dict[str, Any], read: Callable[[str], dict[str, Any]], where: object) -> bytes:
    """The index of a store of schema 1, from the attributes of its shards. read: returns them by a shard's name.

    Raises SamloveError, naming the manifest's place `where`, if manifest or attributes are not those of a store.
    """
    writer = TableWriter(INDEX_COLUMNS, sorted_by="key")
    try:
        for shard in manifest["shards"]:
            check_part(shard["name"], where)
            attributes, number = read(shard["name"]), shard_number(shard["name"])
            ids = attributes.get("ids", [])
            for row, key in enumerate(attributes["keys"]):
                writer.add(key=key, id=ids[row] if row < len(ids) else "", shard=number, row=row)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SamloveError(f"{where}: not a list of shards and keys ({error!r}); {REMEDY}") from None
    return writer.to_bytes()
