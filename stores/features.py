"""The feature store: a folder of Zarr v3 groups, one per shard, with a manifest and a failure log.

    PATH/manifest.json          schema, fingerprint, code, arrays {name: {shape, dtype}}, number of keys, shards, files
    PATH/failures.csv           key,stage,error of every item that could not be computed
    PATH/shard-00000.zarr/      group; its attributes list the shard's keys and their ids; one array per feature

An array of a shard is (keys in the shard, *item shape), one Zarr shard (one file) of chunks that each hold one item,
or `chunk_rows` rows of one item. Every chunk ends in its crc32c, so damage is found on reading.

This module reads a published store; stores.feature_writer writes one.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from samlove.errors import SamloveError
from stores.chunks import ShardArray
from stores.codec import decode, is_coded, shapes
from stores.earlier import shard_attributes
from stores.manifest import NAME, check_part, identity, read_manifest, refuse_replaced
from stores.remote import AnyPath, as_path, keep_open

Arrays = dict[str, np.ndarray]
FAILURES = "failures.csv"


class Failure(NamedTuple):
    """An item that could not be computed: its key, the stage that tried to compute it, and why it failed."""

    key: str
    stage: str
    error: str


def write_failures(path: Path, failures: Sequence[Failure]) -> None:
    """Write a failure log."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([Failure._fields, *failures])


class FeatureStore:
    """A published store, read only. Can be pickled: each process opens its own files.

    path: a folder, or a URL (see stores.remote).
    """

    def __init__(self, path: str | AnyPath) -> None:
        self.path = as_path(path)
        self._identity = identity(self.path / NAME)
        self.manifest: dict[str, Any] = read_manifest(self.path, "run the stage that writes it, or: dvc pull")
        try:
            names = [*(shard["name"] for shard in self.manifest["shards"]), *self.manifest["arrays"]]
            total, _ = self.manifest["keys"], self.manifest["fingerprint"]
        except (KeyError, TypeError) as error:
            raise SamloveError(
                f"{self.path / NAME}: not a feature store's manifest ({error!r}); if it should be one, recompute it"
            ) from None
        for name in names:
            check_part(name, self.path / NAME)
        self._place: dict[str, tuple[str, int]] = {}  # key -> (shard, row in it)
        for shard in self.manifest["shards"]:
            keys = shard_attributes(self.path / shard["name"])["keys"]
            self._place.update({key: (shard["name"], row) for row, key in enumerate(keys)})
        if len(self._place) != total:
            raise SamloveError(
                f"{self.path}: expected {total} keys, as in its manifest, found {len(self._place)} in its shards; "
                "recompute the store"
            )
        self._opened: dict[str, dict[str, ShardArray]] = {}
        self._coded = is_coded(self.manifest["arrays"])

    @classmethod
    def open(cls, path: str | AnyPath) -> "FeatureStore":
        """Open the store at `path`. Raises RequestError if there is none, SamloveError if it is damaged."""
        return cls(path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def keys(self) -> list[str]:
        """All keys, shard by shard. If the store was computed in one run, this is the order of the writer's `keys`."""
        return list(self._place)

    def keys_of(self, shard: str) -> list[str]:
        """The keys in the shard of this name."""
        return [key for key, (name, _) in self._place.items() if name == shard]

    def id_of(self, key: str) -> str:
        """The id of the source content that the item of `key` was computed from; empty if it was not recorded."""
        shard, row = self._place[key]
        return dict(enumerate(shard_attributes(self.path / shard).get("ids", []))).get(row, "")

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, key: object) -> bool:
        return key in self._place

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of an item, by name."""
        return shapes(self.manifest["arrays"])

    @property
    def failures(self) -> list[Failure]:
        """The failure log."""
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
        """Copies of one item's arrays, {name: (*item shape)}. `rows`, a slice without a step, selects along axis 0.

        Reads only the chunks that hold these rows, and checks their checksums. Features that stores.codec stores in a
        narrower dtype are returned as floats.

        Raises SamloveError if the store has no such key, or if the bytes on disk are damaged.
        """
        arrays = self.read_stored(key, rows)
        return decode(arrays) if self._coded else arrays

    def read_stored(self, key: str, rows: slice | None = None) -> Arrays:
        """As `read`, but returns the arrays as they are stored, under the names in the manifest."""
        if key not in self._place:
            known = [f"{f.stage} failed: {f.error}" for f in self.failures if f.key == key]
            raise SamloveError(f"{self.path}: no item {key!r} ({'; '.join(known) or 'not among its keys'})")
        shard, row = self._place[key]
        try:
            return {name: array.read(row, rows) for name, array in self._arrays(shard).items()}
        except (OSError, ValueError, KeyError, TypeError, IndexError, MemoryError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SamloveError(
                f"{self.path / shard}: {key!r} cannot be read ({reason}); recompute the store"
            ) from error
