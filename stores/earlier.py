"""Reusable shards of a feature store: finished by an interrupted run, or part of a previously published store.

A key stays in its shard as long as it is wanted. New keys go into new shards, so adding items changes no other shard.
The same keys end up in the same places whether or not a run was interrupted. A row can be reused if its key's id, which
identifies the content of its source, is unchanged. A shard is linked if all its rows can be reused. Otherwise it is
rewritten from its reusable rows and recomputed ones.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from samlove.errors import SamloveError
from stores.chunks import ShardArray
from stores.fingerprint import canonical_json
from stores.manifest import Files, crc32c_file, files_below, read_manifest
from stores.remote import AnyPath

Arrays = dict[str, np.ndarray]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.zarr"


def shard_attributes(shard: AnyPath) -> dict[str, Any]:
    """The attributes of a shard's group. Raises SamloveError if it is missing or damaged."""
    try:
        return json.loads((shard / "zarr.json").read_text())["attributes"]
    except (OSError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SamloveError(f"{shard}: expected a Zarr group with its keys ({reason}); recompute the store") from None


@dataclass(frozen=True)
class Shard:
    """A complete shard: {key: id} of its rows, in order, the keys that it was planned for, and its files."""

    folder: Path
    ids: dict[str, str]
    planned: list[str]
    files: Files

    @classmethod
    def read(cls, folder: Path, files: Files, chunk_rows: int | None) -> "Shard | None":
        """The shard in `folder`; None if missing, in a different layout, or if its files' names or sizes differ."""
        try:
            attributes = shard_attributes(folder)
            ids = dict(zip(attributes["keys"], attributes["ids"], strict=True))
            shard = cls(folder, ids, attributes["planned"], files)
            sizes = {name: path.stat().st_size for name, path in files_below(folder).items()}
            expected = {name: entry["bytes"] for name, entry in files.items()}
        except (SamloveError, KeyError, ValueError, TypeError, OSError):  # damaged, or written by an older version
            return None
        return shard if attributes["chunk_rows"] == chunk_rows and sizes == expected else None

    def intact(self) -> bool:
        """Whether every file matches its checksum; reads all bytes."""
        return all(crc32c_file(self.folder / name) == entry["crc32c"] for name, entry in self.files.items())

    def reusable(self, planned: Iterable[str], ids: Mapping[str, str]) -> list[str]:
        """The `planned` keys whose rows can be reused: they have the ids in `ids`."""
        return [key for key in planned if key in self.ids and self.ids[key] == ids.get(key, "")]

    def rows(self, keys: Sequence[str]) -> dict[str, Arrays]:
        """The arrays of some of its keys. Raises SamloveError if the bytes are damaged."""
        numbers = {key: row for row, key in enumerate(self.ids)}
        try:
            arrays = {p.parent.name: ShardArray(p.parent) for p in sorted(self.folder.glob("*/zarr.json"))}
            return {key: {name: array.read(numbers[key]) for name, array in arrays.items()} for key in keys}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SamloveError(f"{self.folder}: cannot be read ({error}); delete the store and recompute it") from error


def published_shards(
    stores: Iterable[Path],
    fingerprint: Mapping[str, Any],
    code: str,
    chunk_rows: int | None,
    ids: Mapping[str, str],
) -> dict[int, Shard]:
    """The reusable shards, by number, of the store with the most reusable rows; of the first one on a tie.

    Only stores with this fingerprint and code count. ids: {key: id} of the wanted keys.
    """
    found: dict[int, Shard] = {}
    most = 0
    for store in stores:
        try:
            manifest = read_manifest(store, "")
            names = {int(s["name"].removeprefix("shard-").removesuffix(".zarr")): s["name"] for s in manifest["shards"]}
            listed: Files = manifest["files"]
            found_fingerprint = canonical_json(manifest["fingerprint"])
            if found_fingerprint != canonical_json(fingerprint) or manifest["code"] != code:
                continue
        except (SamloveError, KeyError, ValueError, TypeError):  # no store, or one written by an older version
            continue
        shards = {}
        for number, name in names.items():
            files = {path.removeprefix(f"{name}/"): e for path, e in listed.items() if path.startswith(f"{name}/")}
            if shard := Shard.read(store / name, files, chunk_rows):
                shards[number] = shard
        reusable = sum(len(shard.reusable(shard.planned, ids)) for shard in shards.values())
        if reusable > most:
            found, most = shards, reusable
        if found and most == len(ids):
            break  # no other store can have more
    return found


def layout(keys: Iterable[str], standing: Mapping[int, Sequence[str]], size: int) -> list[tuple[int, list[str]]]:
    """The number and keys of each shard.

    Keys in `standing` shards stay there; the others are split into shards of `size` keys, with free numbers.
    """
    wanted = dict.fromkeys(keys)
    placed: dict[int, list[str]] = {}
    for number, planned in sorted(standing.items()):
        if mine := [key for key in planned if key in wanted]:
            placed[number] = mine
            for key in mine:
                del wanted[key]
    rest, number = iter(wanted), 0
    while chunk := list(islice(rest, size)):
        while number in placed:
            number += 1
        placed[number] = chunk
    return sorted(placed.items())


def link_folder(source: Path, target: Path) -> None:
    """Create `target` with hard links to all files below `source`, or copies if hard links are not possible."""
    for name, path in files_below(source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), target / name)  # DVC may have left a symbolic link
        except OSError:
            shutil.copyfile(path, target / name)
