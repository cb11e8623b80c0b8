"""Whether what lies on the disk is what was written: every file by name and size or, `deep`, every byte by checksum.

Works on feature stores and shard sets, whose manifests list their files, and on predictions, exported stores and
checkpoints, single files that carry their own checksum. Reads only.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from samlove.errors import RequestError, SamloveError
from stores import sealed, tensors
from stores.features import FeatureStore
from stores.inspect import ARTEFACTS, open_artefact
from stores.manifest import NAME, SCHEMA, crc32c_file, files_below, render_json, seal

SHOWN = 5  # keys named of a damaged file


def verify(path: str | Path, deep: bool = False) -> list[str]:
    """What is wrong with an artefact, a line a fault, each with the path of its file; empty where nothing is.

    deep: read all bytes and compare checksums, rather than names and sizes alone.
    Raises RequestError where there is nothing at `path`, or no artefact that can be verified.
    """
    path = Path(path)
    if path.is_dir():
        return _verify_folder(path, deep)
    if not path.exists():
        raise RequestError(f"{path}: expected {ARTEFACTS}, found nothing there")
    return _verify_file(path, deep)


def _verify_folder(folder: Path, deep: bool) -> list[str]:
    manifest, faults = _read_manifest(folder / NAME)
    if manifest is None:
        return faults
    expected = manifest["files"]
    found = files_below(folder)
    del found[NAME]
    for name in sorted({*expected, *found}):
        where, entry = folder / name, expected.get(name)
        if entry is None:
            faults.append(f"{where}: extra: the manifest does not list it")
        elif name not in found or not found[name].is_file():
            faults.append(f"{where}: missing: expected a file of {entry['bytes']} bytes")
        elif (size := found[name].stat().st_size) != entry["bytes"]:
            faults.append(f"{where}: expected {entry['bytes']} bytes, found {size}{_hurt(folder, name, manifest)}")
        elif deep and (crc := _crc(found[name])) != entry["crc32c"]:
            faults.append(f"{where}: expected crc32c {entry['crc32c']}, found {crc}{_hurt(folder, name, manifest)}")
    return faults


def _read_manifest(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The manifest, None where it cannot be trusted with the rest, and its own faults."""
    if not path.is_file():
        if not any(path.parent.glob("shard-*")):
            raise RequestError(f"{path.parent}: expected a store or a shard set, found no {NAME} and no shards")
        return None, [f"{path}: missing: nothing says what should be here"]
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        sealed = seal(manifest)
        files = manifest.get("files")
        listed = {name: (entry["bytes"], entry["crc32c"]) for name, entry in (files or {}).items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, SamloveError) as error:
        return None, [f"{path}: torn or damaged: {' '.join(str(error).split())}"]
    if "crc32c" not in manifest and not listed:
        return None, [f"{path}: lists no files: an older version made it; make it anew to have checksums"]
    if manifest.get("schema") != SCHEMA or manifest != sealed or text != render_json(manifest):
        return None, [f"{path}: damaged: its text does not have its checksum"]
    return manifest, []


def _crc(path: Path) -> str:
    try:
        return crc32c_file(path)
    except OSError as error:
        return f"nothing readable ({error.strerror})"


def _hurt(folder: Path, name: str, manifest: dict[str, Any]) -> str:
    """Which items of a feature store a damaged file of a shard costs."""
    shard = name.split("/")[0]
    if "arrays" not in manifest or not shard.endswith(".zarr") or name == f"{shard}/zarr.json":
        return ""
    try:
        store = FeatureStore.open(folder)
    except SamloveError:
        return ""
    return _cost(store.keys_of(shard), store.read, "item's values")


def _cost(keys: Iterable[str], read: Callable[[str], object], what: str) -> str:
    """Which of the keys cannot be read any more."""
    lost = []
    for key in keys:
        try:
            read(key)
        except SamloveError:
            lost.append(key)
    if not lost:
        return f"; no {what} are hurt"
    more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
    return f"; cannot be read: {', '.join(lost[:SHOWN])}{more}"


def _verify_file(path: Path, deep: bool) -> list[str]:
    if tensors.is_tensors(path):
        fault = tensors.damage(path, deep)
        if not fault and not tensors.is_sealed(path):
            fault = "has no checksum: an older version made it; train again to have one"
    elif sealed.is_hdf5(path):
        fault = sealed.damage(path, deep)
        if fault == sealed.DAMAGED:
            fault += _hurt_rows(path)
    else:
        raise RequestError(f"{path}: expected {ARTEFACTS}, found another kind of file")
    return [f"{path}: {fault}"] if fault else []


def _hurt_rows(path: Path) -> str:
    """Which rows of a predictions file, or items of an exported store, its damage costs."""
    try:
        artefact = open_artefact(path)
    except SamloveError:
        return "; it cannot be opened"
    return _cost(artefact.keys, artefact.read, "item's values")
