"""Writes a feature store (see stores.features): shard by shard, resumable, published in one rename.

One shard has one writer. Complete shards are kept in the scratch folder (see stores.staging), which is the progress of
a run. Publishing renames their folder to PATH. Published files are never edited: a shard that a new store shares with
an earlier one is a link to it (see stores.earlier).
"""

import shutil
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from samlove.errors import RequestError, SamloveError
from stores.chunks import Compression
from stores.earlier import Shard, layout, link_folder, missing_keys, published_shards, shard_name
from stores.features import FAILURES, INDEX, INDEX_COLUMNS, Failure, write_failures
from stores.listing import seal_folder
from stores.manifest import replace_folder
from stores.staging import Items, Staging
from stores.table import TableWriter


class FeatureStoreWriter:
    """Plans the shards of one store, writes them, and publishes the store.

    path: where the store is published. scratch: a folder on the same file system, outside every DVC output.
    keys: all items, in order; keys that are in no shard yet fill new shards, `shard_size` keys each.
    chunk_rows: rows of axis 0 that are read together; None stores an item as one chunk.
    compression: of every chunk; lossless.
    ids: a hash of each key's source content; a row is reused only if its id is the same.
    code: a hash of the code that computes the rows; rows that other code computed are never reused.
    previous: stores to reuse rows and shards from: of those with this fingerprint and code, the one with the most
        reusable rows.

    staging: writes single shards, in any process. Raises RequestError if a key is repeated or a size is below 1.
    """

    def __init__(
        self,
        path: Path,
        scratch: Path,
        fingerprint: Mapping[str, Any],
        keys: Sequence[str],
        shard_size: int,
        chunk_rows: int | None = None,
        compression: Compression = "none",
        ids: Mapping[str, str] | None = None,
        code: str = "",
        previous: Sequence[Path] = (),
    ) -> None:
        self.path, self.keys, self.shard_size = Path(path), keys, shard_size
        self.ids, self.previous = ids or {}, previous
        self.staging = Staging(self.path, Path(scratch), fingerprint, chunk_rows, compression, code)
        if shard_size < 1 or (chunk_rows is not None and chunk_rows < 1):
            raise RequestError(f"{self.path}: expected shard_size and chunk_rows of at least 1")
        if len(set(keys)) < len(keys):
            repeated = [key for key, count in Counter(keys).items() if count > 1]
            raise RequestError(f"{self.path}: expected each key once, found repeated keys: {repeated[:5]}")
        if broken := next((key for key in keys if not _is_utf8(key)), None):
            raise RequestError(f"{self.path}: {broken!r}: expected keys that can be encoded as UTF-8")

    def clean(self) -> None:
        """Remove incomplete shards that a killed run or a power failure left in scratch; reads every byte there."""
        self.staging.clean()
        self.__dict__.pop("_plan", None)

    @cached_property
    def _plan(self) -> dict[int, list[str]]:
        wanted = {key: key for key in self.keys}  # so that the plan holds the caller's texts, not copies
        if best := self._best(wanted):
            for shard in self._published(best):
                self.staging.link(shard)
        standing = ((shard.number, shard.planned) for shard in self.staging.shards())
        return dict(layout(wanted, standing, self.shard_size))

    def _best(self, wanted: Mapping[str, str]) -> Path | None:
        """The previous store with the most reusable rows, the first one on a tie; None if no store has any."""
        best, most = None, 0
        for store in self.previous:
            reusable = sum(
                len(shard.reusable(self._ids(key for key in shard.planned if key in wanted)))
                for shard in self._published(store)
            )
            if reusable > most:
                best, most = store, reusable
            if most == len(wanted):
                break  # no other store can have more
        return best

    def _published(self, store: Path) -> Iterator[Shard]:
        return published_shards(store, self.staging.fingerprint, self.staging.code, self.staging.chunk_rows)

    def _ids(self, keys: Iterable[str]) -> dict[str, str]:
        return {key: self.ids.get(key, "") for key in keys}

    def plan(self) -> list[tuple[int, list[str]]]:
        """The number and keys of every shard."""
        return list(self._plan.items())

    def todo(self) -> list[tuple[int, list[str]]]:
        """Every shard still to write, with its missing keys.

        A key is missing if its item was never computed, its source changed, or it failed (the cause may be fixed by
        now). A shard from which rows are only removed has no missing keys.
        """
        todo = []
        for number in self._plan:
            planned, shard = self.planned(number), self.staging.shard(number)
            missing = missing_keys(shard, planned)
            if missing or (shard and len(planned) < len(shard.ids)):
                todo.append((number, missing))
        return todo

    def planned(self, number: int) -> dict[str, str]:
        """{key: id} of all items of a shard, in order."""
        return self._ids(self._plan.get(number, ()))

    def write_shard(self, number: int, items: Items) -> bool:
        """Write one shard atomically. items: {key: {name: array}}, for the keys from `todo` except failed ones.

        Existing reusable rows are kept. If the shard needs no change, writes nothing and returns False.

        Every item must have the same names, shapes and dtypes. Raises SamloveError, naming key and array, if they
        differ, if a dtype cannot be stored, or if a float is not finite (fp16 overflows to infinity).
        An OSError, such as a full disk, leaves the shards finished earlier intact.
        """
        return self.staging.write(number, self.planned(number), items)

    def publish(self, failures: Sequence[Failure] = (), keep: Path | None = None) -> None:
        """Move all shards, with index, failure log and manifest, to `path` in one rename.

        keep: a folder on the same file system in which the published files are also linked, before the rename.

        Raises SamloveError if a shard was not written, or if a missing key is not among the failures.
        """
        folder = self.staging.folder
        folder.mkdir(parents=True, exist_ok=True)
        excused = {failure.key for failure in failures}
        index = TableWriter(INDEX_COLUMNS, sorted_by="key", folder=folder)
        arrays: dict[str, Any] = {}
        numbers = []
        for number in self._plan:
            shard = self._complete(number, excused)
            if not shard.ids:
                continue  # all items failed
            found = shard.arrays()
            arrays = arrays or found
            if found != arrays:
                raise SamloveError(f"{self.path}: shard {number} holds {found}, earlier shards hold {arrays}")
            for row, (key, id) in enumerate(shard.ids.items()):
                index.add(key=key, id=id, shard=number, row=row)
            numbers.append(number)
        self._remove_all_but({shard_name(number) for number in numbers})
        index.write(folder / INDEX)
        write_failures(folder / FAILURES, failures)
        manifest = {
            "fingerprint": dict(self.staging.fingerprint),
            "code": self.staging.code,
            "arrays": arrays,
            "keys": len(index),
            "shards": len(numbers),
        }
        seal_folder(folder, manifest, (file for number in numbers for file in self.staging.files(number)))
        partial = self.staging.scratch / "partial"
        if keep is not None:
            shutil.rmtree(partial / "keep", ignore_errors=True)
            link_folder(folder, partial / "keep")
            replace_folder(partial / "keep", keep)
        replace_folder(folder, self.path)
        shutil.rmtree(self.staging.records, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)

    def _complete(self, number: int, excused: Container[str]) -> Shard:
        """The shard of this number. Raises SamloveError unless it has exactly the planned rows that are not excused."""
        planned, shard = self.planned(number), self.staging.shard(number)
        missing = missing_keys(shard, planned)
        lost = [key for key in missing if key not in excused]
        if shard is None or lost or len(planned) - len(missing) < len(shard.ids):
            lost = lost or [*(shard.ids if shard else planned)]
            raise SamloveError(
                f"{self.path}: shard {number}: {len(lost)} items missing without a recorded failure, "
                f"first {lost[0]!r}; run the stage again"
            )
        return shard

    def _remove_all_but(self, names: Container[str]) -> None:
        """Remove empty shards, shards that are not planned, and the tables and manifest that a killed run left."""
        for other in self.staging.folder.iterdir():
            if other.is_file():
                other.unlink()
            elif other.name not in names:
                shutil.rmtree(other)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
