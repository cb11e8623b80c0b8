"""What of a feature store is there already: shards that a stopped run finished, and those of a store made before.

Where a key lies is decided once: it stays in its shard for as long as it is wanted. New keys fill shards of their own,
so that adding media touches nothing else, and the same keys come to lie in the same places whether or not a run was
stopped in between. A row is as good as new where its key's id, which stands for the content of its source, is the
same; shards all of whose rows are good are linked, others are written anew from their good rows and computed ones.
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
    """The attributes of a shard's group; SamloveError where it is absent or torn."""
    try:
        return json.loads((shard / "zarr.json").read_text())["attributes"]
    except (OSError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SamloveError(f"{shard}: expected a Zarr group with its keys ({reason}); remake the store") from None


@dataclass(frozen=True)
class Shard:
    """A whole shard: the ids of its rows by key, in order, the keys that it was planned for, and its files."""

    folder: Path
    ids: dict[str, str]
    planned: list[str]
    files: Files

    @classmethod
    def read(cls, folder: Path, files: Files, chunk_rows: int | None) -> "Shard | None":
        """The shard in `folder`, None where it is absent, laid out otherwise, or not of `files` by name and size."""
        try:
            attributes = shard_attributes(folder)
            ids = dict(zip(attributes["keys"], attributes["ids"], strict=True))
            shard = cls(folder, ids, attributes["planned"], files)
            sizes = {name: path.stat().st_size for name, path in files_below(folder).items()}
            expected = {name: entry["bytes"] for name, entry in files.items()}
        except (SamloveError, KeyError, ValueError, TypeError, OSError):  # of an older version, or torn
            return None
        return shard if attributes["chunk_rows"] == chunk_rows and sizes == expected else None

    def whole(self) -> bool:
        """Whether every file has its checksum; all bytes are read."""
        return all(crc32c_file(self.folder / name) == entry["crc32c"] for name, entry in self.files.items())

    def good(self, planned: Iterable[str], ids: Mapping[str, str]) -> list[str]:
        """Those of the `planned` keys whose row here has the id that is asked for."""
        return [key for key in planned if key in self.ids and self.ids[key] == ids.get(key, "")]

    def rows(self, keys: Sequence[str]) -> dict[str, Arrays]:
        """The arrays of some of its keys; SamloveError where the bytes are damaged."""
        place = {key: row for row, key in enumerate(self.ids)}
        try:
            arrays = {p.parent.name: ShardArray(p.parent) for p in sorted(self.folder.glob("*/zarr.json"))}
            return {key: {name: array.read(place[key]) for name, array in arrays.items()} for key in keys}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SamloveError(f"{self.folder}: cannot be read ({error}); remove the store and make it anew") from error


def published_shards(
    stores: Iterable[Path], fingerprint: Mapping[str, Any], code: str, chunk_rows: int | None
) -> dict[int, Shard]:
    """The usable shards, by number, of the first of `stores` that is there, of this fingerprint and code."""
    for store in stores:
        try:
            manifest = read_manifest(store, "")
            names = {int(s["name"].removeprefix("shard-").removesuffix(".zarr")): s["name"] for s in manifest["shards"]}
            listed: Files = manifest["files"]
            made = canonical_json(manifest["fingerprint"])
            if made != canonical_json(fingerprint) or manifest["code"] != code:
                continue
        except (SamloveError, KeyError, ValueError, TypeError):  # none, or of an older version
            continue
        shards = {}
        for number, name in names.items():
            files = {path.removeprefix(f"{name}/"): e for path, e in listed.items() if path.startswith(f"{name}/")}
            if shard := Shard.read(store / name, files, chunk_rows):
                shards[number] = shard
        return shards
    return {}


def layout(keys: Iterable[str], standing: Mapping[int, Sequence[str]], size: int) -> list[tuple[int, list[str]]]:
    """Each shard's number and keys: those of `standing` shards in their places, the rest `size` to a free number."""
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
    """Hard links in `target`, which is made, to all files below `source`; copies where the file system has none."""
    for name, path in files_below(source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), target / name)  # DVC may have left a symbolic link
        except OSError:
            shutil.copyfile(path, target / name)
