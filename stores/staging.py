"""The shards of a feature store that is being written, in its scratch folder; see stores.feature_writer.

    SCRATCH/ID/shard-00000.zarr/     a complete shard; ID stands for the store's fingerprint and code
    SCRATCH/ID.files/NAME.json       the shard's files with their checksums, and whether it is linked from a store
    SCRATCH/partial/                 incomplete shards

A shard is written in `partial` and then renamed into ID. So the complete shards are the progress of a run, and a killed
run resumes. ID becomes the store, so nothing else is in it.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import zarr

from samlove.errors import SamloveError
from stores.chunks import LIMIT, Compression, compressors, use_zarr_defaults
from stores.earlier import Shard, link_folder, missing_keys, shard_name
from stores.fingerprint import fingerprint_id
from stores.listing import File
from stores.manifest import Files, check_part, list_files, write_json

DTYPES = ("bool", "uint8", "int8", "uint16", "int32", "int64", "float16", "float32")  # that a feature may have
Items = Mapping[str, Mapping[str, np.ndarray]]  # {key: {name: array}}


@dataclass(frozen=True)
class Staging:
    """Reads and writes these shards. Small, and holds no open file: any process may write any shard.

    The fields are arguments of FeatureStoreWriter.
    """

    path: Path
    scratch: Path
    fingerprint: Mapping[str, Any]
    chunk_rows: int | None
    compression: Compression
    code: str

    @property
    def folder(self) -> Path:
        """The folder of the complete shards."""
        return self.scratch / fingerprint_id({**self.fingerprint, "code": self.code})

    @property
    def records(self) -> Path:
        """The folder of the files' checksums."""
        return self.folder.with_name(self.folder.name + ".files")

    def shard(self, number: int) -> Shard | None:
        """The shard of this number; None if there is none, or it is not complete."""
        name = shard_name(number)
        record = self._record(name)
        return Shard.read(self.folder / name, record["files"], self.chunk_rows) if record else None

    def shards(self) -> Iterator[Shard]:
        """All complete shards, by increasing number; one at a time is held."""
        names = (path.stem for path in self.records.glob("shard-*.zarr.json"))
        numbers = (int(digits) for name in names if (digits := name[len("shard-") : -len(".zarr")]).isdecimal())
        return (shard for number in sorted(numbers) if (shard := self.shard(number)))

    def files(self, number: int) -> Iterator[File]:
        """The files of a complete shard, with their paths in the store."""
        name = shard_name(number)
        record = self._record(name)
        assert record, name
        for path, entry in sorted(record["files"].items()):
            yield File(f"{name}/{path}", entry["bytes"], entry["crc32c"])

    def _record(self, name: str) -> dict[str, Any] | None:
        try:
            record = json.loads((self.records / f"{name}.json").read_text(encoding="utf-8"))
            return record if {"files", "linked"} <= record.keys() else None
        except (OSError, ValueError, AttributeError):
            return None

    def clean(self) -> None:
        """Remove incomplete shards, which a killed run or a power failure left, and links to published shards.

        Reads every byte of the others.
        """
        shutil.rmtree(self.scratch / "partial", ignore_errors=True)
        for folder in sorted(self.folder.glob("shard-*.zarr")):
            record = self._record(folder.name)
            shard = Shard.read(folder, record["files"], self.chunk_rows) if record and not record["linked"] else None
            if shard is None or not shard.intact():
                shutil.rmtree(folder)

    def missing(self, number: int, planned: Mapping[str, str]) -> list[str]:
        """The keys whose items the shard does not have yet. planned: {key: id} of all its keys, in order."""
        return missing_keys(self.shard(number), planned)

    def link(self, shard: Shard) -> None:
        """Add a published shard, unless there is one of its number."""
        if not self.shard(shard.number):
            partial = self.scratch / "partial" / shard.folder.name
            shutil.rmtree(partial, ignore_errors=True)
            link_folder(shard.folder, partial)
            self._finish(partial, shard.files, linked=True)

    def write(self, number: int, planned: Mapping[str, str], items: Items) -> bool:
        """Write a shard atomically: the given items, and the rows that an existing shard has of other planned keys.

        If the shard needs no change, writes nothing and returns False. Raises as FeatureStoreWriter.write_shard.
        """
        if unknown := [key for key in items if key not in planned]:
            raise SamloveError(f"{self.path}: keys not planned for shard {number}: {unknown[:5]}")
        rows: dict[str, Mapping[str, np.ndarray]] = {**items}
        if shard := self.shard(number):
            reusable = shard.reusable(planned)
            if not items and len(reusable) == len(shard.ids):
                return False
            rows |= shard.rows([key for key in reusable if key not in items])
        keys = [key for key in planned if key in rows]
        for key in keys:
            self._check_item(key, rows[key], rows[keys[0]])
        attributes = {
            "keys": keys,
            "ids": [planned[key] for key in keys],
            "planned": list(planned),
            "chunk_rows": self.chunk_rows,
        }
        # A folder per call: a worker that was presumed dead may still be writing the same shard.
        partial = self.scratch / "partial" / uuid4().hex / shard_name(number)
        try:
            self._write_group(partial, attributes, {key: rows[key] for key in keys})
            self._finish(partial, list_files(partial), linked=False)
        finally:  # the usual cause of failure is a full disk: free the space
            shutil.rmtree(partial.parent, ignore_errors=True)
        return True

    def _write_group(self, partial: Path, attributes: dict, rows: Items) -> None:
        use_zarr_defaults()
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

    def _finish(self, partial: Path, files: Files, linked: bool) -> None:
        """Move a complete shard to its folder. Its record is written first, so every shard there has one."""
        self.records.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.records / f"{partial.name}.json", {"files": files, "linked": linked})
        final = self.folder / partial.name
        shutil.rmtree(final, ignore_errors=True)
        try:
            partial.rename(final)
        except OSError:
            if not final.exists():  # another writer finished the same shard in the meantime
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
            if self.compression != "none" and array.nbytes > LIMIT:
                raise SamloveError(
                    f"{self.path}: {key!r}: {name}: expected at most {LIMIT} bytes to compress, found {array.nbytes}; "
                    "store it with compression none"
                )
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise SamloveError(
                    f"{self.path}: {key!r}: {name}: expected finite values, found infinity or NaN in "
                    f"{array.dtype.name}; if it is an overflow, set the encoder's dtype to float32"
                )
