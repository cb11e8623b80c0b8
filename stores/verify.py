"""Whether what lies on the disk is what was written: every file by name and size or, `deep`, every byte by checksum.

Works on feature stores and shard sets, whose manifests list their files, and on predictions files, which carry their
own checksum. Reads only.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from samlove.errors import RequestError, SamloveError
from stores.features import FeatureStore
from stores.manifest import NAME, SCHEMA, crc32c_file, files_below, render_json, seal
from stores.predictions import USER_BLOCK, PredictionReader, expected_seal

HDF5 = b"\x89HDF\r\n\x1a\n"  # how such a file begins, after its user block
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
        raise RequestError(f"{path}: expected a store, a shard set or a predictions file, found nothing there")
    return _verify_predictions(path, deep)


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


def _verify_predictions(path: Path, deep: bool) -> list[str]:
    with open(path, "rb") as file:
        block, magic = file.read(USER_BLOCK), file.read(len(HDF5))
    if block.startswith(HDF5):
        return [f"{path}: has no checksum: an older version made it; run infer again to have one"]
    try:
        size = json.loads(block.rstrip(b"\0"))["bytes"]
        if type(size) is not int:
            raise ValueError(f"size {size!r}")
    except (ValueError, KeyError, TypeError):
        if magic != HDF5:
            raise RequestError(f"{path}: expected a predictions file (HDF5), found another kind of file") from None
        return [f"{path}: damaged: its first {USER_BLOCK} bytes should hold its checksum"]
    if (found := path.stat().st_size) != size:
        return [f"{path}: expected {size} bytes, found {found}"]
    if deep and expected_seal(path) != block:
        return [f"{path}: its bytes do not have its checksum{_hurt_rows(path)}"]
    return []


def _hurt_rows(path: Path) -> str:
    try:
        reader = PredictionReader(path)
    except SamloveError:
        return "; it cannot be opened"
    return _cost(reader.row_ids, reader.read, "row's masks")
