"""The manifest: a small JSON file in every feature store and shard set, with its fingerprint.

`files` maps the name of each file next to it to its size and crc32c; one of them, files.arrow, lists the files of the
shards (stores.listing). `crc32c` is the checksum of the manifest's other fields.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c

from samlove.errors import RequestError, SamloveError, absence
from stores.fingerprint import canonical_json, parse_json
from stores.remote import AnyPath, regular

SCHEMA = 2  # of the feature stores and shard sets that this package writes
READABLE = (1, 2)  # schema 1 lists all files and shards in the manifest
NAME = "manifest.json"
_PART = re.compile(r"(?!\.{1,2}\Z)[^/\0\ud800-\udfff]+")  # not . and .., nor anything that UTF-8 cannot encode
BLOCK = 1 << 20  # bytes per read
Files = dict[str, dict[str, Any]]  # path in the folder -> {"bytes": int, "crc32c": 8 hex digits}


def crc32c_file(path: Path, start: int = 0) -> str:
    """crc32c, as 8 hex digits, of a file's bytes from offset `start`."""
    crc = 0
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(BLOCK):
            crc = google_crc32c.extend(crc, block)
    return f"{crc:08x}"


def files_below(folder: Path) -> dict[str, Path]:
    """All files below a folder by their relative path, sorted."""
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if not p.is_dir()}


def file_entry(path: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    return {"bytes": path.stat().st_size, "crc32c": crc32c_file(path)}


def list_files(folder: Path) -> Files:
    """Size and checksum of every file below a folder."""
    return {name: file_entry(path) for name, path in files_below(folder).items()}


def render_json(value: Mapping[str, Any]) -> str:
    """A dict as indented JSON with sorted keys: equal dicts give equal bytes."""
    return json.dumps(json.loads(canonical_json(value)), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a dict in the form of `render_json`, atomically: readers see the old content or the complete new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(render_json(value), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the checksum of its other fields."""
    rest = {name: value for name, value in manifest.items() if name != "crc32c"}
    return {**rest, "crc32c": f"{google_crc32c.value(canonical_json(rest).encode()):08x}"}


def write_manifest(folder: Path, manifest: Mapping[str, Any], files: Files) -> None:
    """Write the manifest of a folder that is otherwise complete. files: the files next to it."""
    write_json(folder / NAME, seal({"schema": SCHEMA, **manifest, "files": files}))


def read_manifest(folder: AnyPath, remedy: str) -> dict[str, Any]:
    """The manifest of the artefact in `folder`.

    Raises RequestError if there is none, SamloveError if it is damaged or has a different schema.
    """
    path = folder / NAME
    try:
        return parse_manifest(regular(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = absence(path) if isinstance(path, Path) else "no such file"
        raise RequestError(f"{path}: {found}; {remedy}") from None
    except (OSError, ValueError) as error:
        raise SamloveError(f"{path}: cannot be read ({error}); {remedy}") from None


def parse_manifest(text: str | bytes) -> dict[str, Any]:
    """The manifest in a JSON text.

    Raises ValueError if it is not a manifest of a readable schema, or if its fingerprint or arrays have the wrong type.
    Fields may be missing: which ones an artefact needs depends on its kind.
    """
    manifest = parse_json(text)
    schema = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
    if schema not in READABLE:
        raise ValueError(f"expected schema {' or '.join(map(str, READABLE))}, found {schema}")
    if not isinstance(manifest.get("fingerprint", {}), dict):
        raise ValueError(f"expected the fingerprint as an object, found {manifest['fingerprint']!r}")
    arrays = manifest.get("arrays", {})
    for spec in arrays.values() if isinstance(arrays, dict) else [arrays]:
        shape = spec.get("shape") if isinstance(spec, dict) else None
        named = isinstance(spec, dict) and isinstance(spec.get("dtype"), str)
        if not named or not isinstance(shape, list) or not all(type(length) is int for length in shape):
            raise ValueError(f"expected arrays with shape and dtype, found {spec!r}")
    return manifest


def check_part(name: object, where: object) -> None:
    """Raise SamloveError unless `name` is the plain name of a file or folder, without a path."""
    if not isinstance(name, str) or not _PART.fullmatch(name):
        raise SamloveError(f"{where}: expected the plain name of a file or folder inside it, found {name!r}")


def identity(path: AnyPath) -> object:
    """A value that changes if another file replaces this one; None if there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size) if isinstance(stat, os.stat_result) else stat


def refuse_replaced(path: AnyPath, opened: object) -> None:
    """Raise SamloveError if the `identity` of `path` is no longer `opened`.

    Call it after opening another file of the same artefact: if it passes, both files belong to the same version.
    """
    if identity(path) != opened:
        raise SamloveError(f"{path}: replaced since it was opened; run the same command again")


def refuse_existing(path: Path) -> None:
    """Raise RequestError if `path` already exists, if only as a link to nothing."""
    if os.path.lexists(path):
        raise RequestError(f"{path}: already exists and will not be overwritten; remove it or choose another path")


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists: what is written there can be renamed to `path`, and a failure leaves
    no new folders above it. Where that is a file, writing fails at once."""
    return next(folder for folder in path.absolute().parents if os.path.lexists(folder))


def replace_folder(new: Path, path: Path) -> None:
    """Rename `new` to `path`; an existing folder is first renamed away and then removed, never edited.

    It is put back if the second rename fails or is interrupted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = new.with_name(new.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    try:
        if path.exists():
            path.rename(old)
        new.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
