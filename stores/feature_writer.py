"""Writes a feature store (see stores.features): shard by shard, resumable, published in one rename.

One shard has one writer. It is written to SCRATCH/partial and, when complete, renamed into SCRATCH/<fingerprint id>/;
its checksums are beside that folder. The finished shards there are the progress, so a killed run resumes.
Publishing renames the whole folder to PATH. Published files are never edited: shards that a new store shares with the
previous one are linked (see stores.earlier).
"""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import zarr

from samlove.errors import RequestError, SamloveError
from stores.chunks import Compression, compressors
from stores.earlier import Shard, layout, link_folder, published_shards, shard_name
from stores.features import FAILURES, Failure, write_failures
from stores.fingerprint import fingerprint_id
from stores.manifest import Files, check_part, file_entry, list_files, replace_folder, write_json, write_manifest

DTYPES = ("bool", "uint8", "int8", "uint16", "int32", "int64", "float16", "float32")  # that a feature may have


@dataclass(frozen=True)
class FeatureStoreWriter:
    """Writes the shards of one store and publishes it. Holds no open file, so any process may write any shard.

    path: where the store is published. scratch: a folder on the same file system, outside every DVC output.
    keys: all items, in order; keys that are in no shard yet fill new shards, `shard_size` keys each.
    chunk_rows: rows of axis 0 that are read together; None stores an item as one chunk.
    compression: of every chunk; lossless.
    ids: a hash of each key's source content; a row is reused only if its id is the same.
    code: a hash of the code that computes the rows; rows that other code computed are never reused.
    previous: stores to reuse rows and shards from: of those with this fingerprint and code, the one with the most
        reusable rows.
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
            raise RequestError(f"{self.path}: expected each key once, found repeated keys: {repeated[:5]}")

    @property
    def staging(self) -> Path:
        """The folder of finished shards until the store is published: one per fingerprint and code."""
        return self.scratch / fingerprint_id({**self.fingerprint, "code": self.code})

    @property
    def _records(self) -> Path:
        """The folder of the staged shards' checksums. It is outside `staging`, because `staging` becomes the store."""
        return self.staging.with_name(self.staging.name + ".files")

    def clean(self) -> None:
        """Remove incomplete shards that a killed run or a power failure left in scratch; reads every byte there."""
        shutil.rmtree(self.scratch / "partial", ignore_errors=True)
        for folder in self.staging.glob("shard-*.zarr"):
            shard = self._staged(folder.name)
            if shard is None or not shard.intact():
                shutil.rmtree(folder)

    @cached_property
    def _published(self) -> dict[int, Shard]:
        return published_shards(self.previous, self.fingerprint, self.code, self.chunk_rows, self.ids)

    def _staged(self, name: str) -> Shard | None:
        """The shard of this name if this run, or an interrupted one, finished it."""
        try:
            files: Files = json.loads((self._records / f"{name}.json").read_text())
        except (OSError, ValueError):
            return None
        return Shard.read(self.staging / name, files, self.chunk_rows)

    def _shard(self, number: int) -> Shard | None:
        """The existing shard of this number: the finished one in scratch or, if there is none, the published one."""
        return self._staged(shard_name(number)) or self._published.get(number)

    def _reusable(self, shard: Shard | None, planned: Sequence[str]) -> list[str]:
        """The planned keys whose rows in `shard` can be reused."""
        return shard.reusable(planned, self.ids) if shard else []

    @cached_property
    def _plan(self) -> dict[int, list[str]]:
        names = [folder.name for folder in self.staging.glob("shard-*.zarr")]
        numbers = {int(name.removeprefix("shard-").removesuffix(".zarr")) for name in names} | set(self._published)
        standing = {number: shard.planned for number in numbers if (shard := self._shard(number))}
        return dict(layout(self.keys, standing, self.shard_size))

    def plan(self) -> list[tuple[int, list[str]]]:
        """The number and keys of every shard."""
        return list(self._plan.items())

    def todo(self) -> list[tuple[int, list[str]]]:
        """Every shard still to write, with its missing keys.

        A key is missing if its item was never computed, its source changed, or it failed (the cause may be fixed by
        now). A shard from which rows are only removed has no missing keys.
        """
        todo = []
        for number, planned in self._plan.items():
            shard = self._shard(number)
            missing = self._missing(shard, planned)
            if missing or (shard and len(planned) < len(shard.ids)):
                todo.append((number, missing))
        return todo

    def missing(self, number: int) -> list[str]:
        """The keys of a shard that are still missing: another process may have written it since `todo`."""
        return self._missing(self._shard(number), self._plan[number])

    def _missing(self, shard: Shard | None, planned: Sequence[str]) -> list[str]:
        kept = set(self._reusable(shard, planned))
        return [key for key in planned if key not in kept]

    def write_shard(self, number: int, items: Mapping[str, Mapping[str, np.ndarray]]) -> bool:
        """Write one shard atomically. items: {key: {name: array}}, for the keys from `todo` except failed ones.

        Existing reusable rows are kept. If the shard needs no change, writes nothing and returns False.

        Every item must have the same names, shapes and dtypes. Raises SamloveError, naming key and array, if they
        differ, if a dtype cannot be stored, or if a float is not finite (fp16 overflows to infinity).
        An OSError, such as a full disk, leaves the shards finished earlier intact.
        """
        planned = self._plan.get(number, [])
        if unknown := [key for key in items if key not in planned]:
            raise SamloveError(f"{self.path}: keys not planned for shard {number}: {unknown[:5]}")
        shard = self._shard(number)
        reusable = self._reusable(shard, planned)
        if shard and not items and len(reusable) == len(shard.ids):
            return False  # already staged, or linked on publishing
        rows: dict[str, Mapping[str, np.ndarray]] = {**items}
        if shard:
            rows |= shard.rows([key for key in reusable if key not in items])
        keys = [key for key in planned if key in rows]
        for key in keys:
            self._check_item(key, rows[key], rows[keys[0]])
        attributes = {
            "keys": keys,
            "ids": [self.ids.get(key, "") for key in keys],
            "planned": planned,
            "chunk_rows": self.chunk_rows,
        }
        # A folder per call: a worker that was presumed dead may still be writing the same shard.
        partial = self.scratch / "partial" / uuid4().hex / shard_name(number)
        try:
            self._write_group(partial, attributes, {key: rows[key] for key in keys})
            self._finish(partial, list_files(partial))
        finally:  # the usual cause of failure is a full disk: free the space
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
                config={"write_empty_chunks": True},  # zeros are data: omitting them would hide damage
            )
            array[:] = np.stack([item[name] for item in items])  # (keys, *shape)

    def _finish(self, partial: Path, files: Files) -> None:
        """Move a complete shard to staging. Its checksums are written first, so every staged shard has them."""
        self._records.mkdir(parents=True, exist_ok=True)
        self.staging.mkdir(parents=True, exist_ok=True)
        write_json(self._records / f"{partial.name}.json", files)
        final = self.staging / partial.name
        shutil.rmtree(final, ignore_errors=True)
        try:
            partial.rename(final)
        except OSError:
            if not final.exists():  # another writer staged the same shard in the meantime
                raise

    def _check_item(self, key: str, item: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray]) -> None:
        specs, found = ({name: (a.shape, a.dtype) for name, a in arrays.items()} for arrays in (first, item))
        if found != specs:
            raise SamloveError(
                f"{self.path}: {key!r}: expected arrays {specs}, as in the shard's first item, found {found}"
            )
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
                    f"{array.dtype.name}; if it is an overflow, set the encoder's dtype to float32"
                )

    def publish(self, failures: Sequence[Failure] = (), keep: Path | None = None) -> None:
        """Move all shards, with the manifest and the failure log, to `path` in one rename.

        keep: a folder on the same file system in which the published files are also linked, before the rename.

        Raises SamloveError if a shard was not written, or if a missing key is not among the failures.
        """
        excused = {f.key for f in failures}
        shards: list[dict[str, Any]] = []
        arrays: dict[str, Any] = {}
        files: Files = {}
        for number, planned in self._plan.items():
            shard = self._shard(number)
            reusable = self._reusable(shard, planned)
            lost = [key for key in planned if key not in reusable and key not in excused]
            if shard is None or lost or len(reusable) < len(shard.ids):
                lost = lost or [*shard.ids] if shard else planned
                raise SamloveError(
                    f"{self.path}: shard {number}: {len(lost)} items missing without a recorded failure, "
                    f"first {lost[0]!r}; run the stage again"
                )
            name = shard_name(number)
            if not reusable:
                continue  # all items failed: the shard is empty
            if shard.folder != self.staging / name:
                self._adopt(shard)
            group = zarr.open_group(self.staging / name, mode="r")
            found = {n: {"shape": list(a.shape[1:]), "dtype": a.dtype.name} for n, a in sorted(group.arrays())}
            arrays = arrays or found
            if found != arrays:
                raise SamloveError(f"{self.path}: shard {number} holds {found}, earlier shards hold {arrays}")
            shards.append({"name": name, "keys": len(reusable)})
            files |= {f"{name}/{path}": entry for path, entry in shard.files.items()}
        self.staging.mkdir(parents=True, exist_ok=True)
        names = [shard["name"] for shard in shards]
        for other in self.staging.iterdir():
            if other.is_dir() and other.name not in names:
                shutil.rmtree(other)
            elif other.is_file():
                other.unlink()  # a manifest or failure log left by a killed run
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
        """Link a published shard into staging; all of its rows must be reusable."""
        partial = self.scratch / "partial" / shard.folder.name
        shutil.rmtree(partial, ignore_errors=True)
        link_folder(shard.folder, partial)
        self._finish(partial, shard.files)
