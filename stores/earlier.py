"""Reusable shards of a feature store: finished by an interrupted run, or part of a previously published store.

A key stays in its shard as long as it is wanted. New keys go into new shards, so adding items changes no other shard.
The same keys end up in the same places whether or not a run was interrupted. A row can be reused if its key's id, which
identifies the content of its source, is unchanged. A shard stays as it is if all its rows can be reused. Otherwise it
is rewritten from its reusable rows and recomputed ones.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from samlove.errors import SamloveError
from stores.chunks import Layout, ShardArray
from stores.fingerprint import canonical_json, parse_json
from stores.listing import listed_files
from stores.manifest import Files, crc32c_file, files_below, read_manifest
from stores.remote import AnyPath, regular

Arrays = dict[str, np.ndarray]
_DAMAGED = (SamloveError, KeyError, ValueError, TypeError, AttributeError)  # or written by an older version


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.zarr"


def shard_number(name: str) -> int:
    """The inverse of `shard_name`. Raises ValueError if it is not the name of a shard."""
    number = int(name.removeprefix("shard-").removesuffix(".zarr"))
    if shard_name(number) != name or not 0 <= number < 2**31:  # int32 in the index
        raise ValueError(f"expected the name of a shard, found {name!r}")
    return number


def shard_attributes(shard: AnyPath) -> dict[str, Any]:
    """The attributes of a shard's group. Raises SamloveError if it is missing or damaged."""
    try:
        return dict(parse_json(regular(shard / "zarr.json").read_text(encoding="utf-8"))["attributes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SamloveError(f"{shard}: expected a Zarr group with its keys ({reason}); recompute the store") from None


def _texts(values: list[str]) -> list[str]:
    if not all(isinstance(value, str) for value in values):
        raise TypeError("expected a list of texts")
    return values


@dataclass(frozen=True)
class Shard:
    """A complete shard: {key: id} of its rows, in order, the keys that it was planned for, and its files."""

    number: int
    folder: Path
    ids: dict[str, str]
    planned: list[str]
    files: Files

    @classmethod
    def read(cls, folder: Path, files: Files, chunk_rows: int | None) -> "Shard | None":
        """The shard in `folder`; None if missing, in a different layout, or if its files' names or sizes differ."""
        try:
            attributes = shard_attributes(folder)
            keys, ids, planned = (_texts(attributes[name]) for name in ("keys", "ids", "planned"))
            shard = cls(shard_number(folder.name), folder, dict(zip(keys, ids, strict=True)), planned, files)
            sizes = {name: path.stat().st_size for name, path in files_below(folder).items()}
            expected = {name: entry["bytes"] for name, entry in files.items()}
        except (*_DAMAGED, OSError):
            return None
        return shard if attributes["chunk_rows"] == chunk_rows and sizes == expected else None

    def intact(self) -> bool:
        """Whether every file matches its checksum; reads all bytes."""
        return all(crc32c_file(self.folder / name) == entry["crc32c"] for name, entry in self.files.items())

    def reusable(self, planned: Mapping[str, str]) -> list[str]:
        """The keys in `planned`, {key: id}, whose rows can be reused: those with the same id."""
        return [key for key, id in planned.items() if self.ids.get(key) == id]

    def rows(self, keys: Sequence[str]) -> dict[str, Arrays]:
        """The arrays of some of its keys. Raises SamloveError if the bytes are damaged."""
        numbers = {key: row for row, key in enumerate(self.ids)}
        with self._reading():
            arrays = {folder.name: ShardArray(folder) for folder in self._folders()}
            return {key: {name: array.read(numbers[key]) for name, array in arrays.items()} for key in keys}

    def arrays(self) -> dict[str, dict[str, Any]]:
        """{name: {"shape", "dtype"}} of an item's arrays. Raises SamloveError if their metadata are damaged."""
        with self._reading():
            layouts = {folder.name: Layout.read(folder) for folder in self._folders()}
        return {name: {"shape": list(one.shape[1:]), "dtype": one.dtype.name} for name, one in layouts.items()}

    def _folders(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("*/zarr.json"))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise SamloveError(f"{self.folder}: cannot be read ({error}); delete the store and recompute it") from error


def missing_keys(shard: Shard | None, planned: Mapping[str, str]) -> list[str]:
    """The keys in `planned`, {key: id}, that have no reusable row in `shard`, in order."""
    kept = set(shard.reusable(planned)) if shard else set()
    return [key for key in planned if key not in kept]


def published_shards(store: Path, fingerprint: Mapping[str, Any], code: str, chunk_rows: int | None) -> Iterator[Shard]:
    """The complete shards of a published store, by increasing number; one at a time is held.

    Ends early if the store is missing or damaged, or has a different fingerprint or code.
    """
    try:
        manifest = read_manifest(store, "")
        if canonical_json(manifest["fingerprint"]) != canonical_json(fingerprint) or manifest["code"] != code:
            return
        for name, files in groupby(listed_files(store, manifest, ""), lambda file: file.path.partition("/")[0]):
            if name.startswith("shard-"):
                entries = {f.path.removeprefix(f"{name}/"): {"bytes": f.bytes, "crc32c": f.crc32c} for f in files}
                if shard := Shard.read(store / name, entries, chunk_rows):
                    yield shard
    except _DAMAGED:
        return


def layout(
    wanted: dict[str, str], standing: Iterable[tuple[int, Iterable[str]]], size: int
) -> list[tuple[int, list[str]]]:
    """The number and keys of each shard. Removes all keys from `wanted`, {key: key}, and returns its values.

    standing: the number and keys of each existing shard, by increasing number. Their keys stay there; the others are
    split into shards of `size` keys, with free numbers.
    """
    placed = {}
    for number, keys in standing:
        if mine := [wanted.pop(key) for key in keys if key in wanted]:
            placed[number] = mine
    rest, number = iter(wanted.values()), 0
    while chunk := list(islice(rest, size)):
        while number in placed:
            number += 1
        placed[number] = chunk
    wanted.clear()
    return sorted(placed.items())


def link_folder(source: Path, target: Path) -> None:
    """Create `target` with hard links to all files below `source`, or copies if hard links are not possible."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
        path, copy = source / entry.name, target / entry.name
        if entry.is_dir(follow_symlinks=False):
            link_folder(path, copy)
        elif entry.is_file():
            try:
                os.link(path.resolve() if entry.is_symlink() else path, copy)  # DVC may have left a symbolic link
            except OSError:
                shutil.copyfile(path, copy)
