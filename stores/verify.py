"""Checks that an artefact on disk is as it was written: every file by name and size and, if `deep`, by checksum.

Works on feature stores and shard sets, whose manifests list their files, and on predictions files, exported stores and
checkpoints, which are single files that contain their own checksum. Never writes.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from samlove.errors import RequestError, SamloveError, absence
from stores import sealed, tensors
from stores.features import FeatureStore
from stores.fingerprint import parse_json
from stores.inspect import ARTEFACTS, open_artefact
from stores.listing import FILES, File, listed_files
from stores.manifest import NAME, READABLE, crc32c_file, files_below, render_json, seal

SHOWN = 5  # keys listed per damaged file


def verify(path: str | Path, deep: bool = False) -> list[str]:
    """The faults of an artefact, one line each, with the path of the file; empty if there are none.

    deep: also read all bytes and compare checksums, not only names and sizes.
    Raises RequestError if there is nothing at `path`, or nothing that can be verified.
    """
    path = Path(path)
    if path.is_dir():
        return _verify_folder(path, deep)
    if not path.is_file():
        raise RequestError(f"{path}: {absence(path)}; expected {ARTEFACTS}")
    return _verify_file(path, deep)


def _verify_folder(folder: Path, deep: bool) -> list[str]:
    manifest, faults = _read_manifest(folder / NAME)
    if manifest is None:
        return faults
    found = files_below(folder)
    del found[NAME]
    try:
        for file in listed_files(folder, manifest, "regenerate the artefact"):
            fault = _fault(folder, file, found.pop(file.path, None), manifest, deep)
            faults += [fault] if fault else []
            if fault and file.path == FILES:
                return faults  # the files that it lists cannot be checked
    except SamloveError as error:
        return [*faults, str(error)]
    faults += [f"{folder / name}: extra: the manifest does not list it" for name in found]
    return sorted(faults)


def _fault(folder: Path, file: File, found: Path | None, manifest: dict[str, Any], deep: bool) -> str:
    """What is wrong with a listed file; empty if nothing is."""
    where = folder / file.path
    deep = deep or file.path == FILES  # all others are compared with it
    if found is None or not found.is_file():
        return f"{where}: missing: expected a file of {file.bytes} bytes"
    if (size := found.stat().st_size) != file.bytes:
        return f"{where}: expected {file.bytes} bytes, found {size}{_affected(folder, file.path, manifest)}"
    if deep and (crc := _crc(found)) != file.crc32c:
        return f"{where}: expected crc32c {file.crc32c}, found {crc}{_affected(folder, file.path, manifest)}"
    return ""


def _read_manifest(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The manifest, or None if it cannot be used to check the other files, and its own faults."""
    if not path.is_file():
        if not any(path.parent.glob("shard-*")):
            raise RequestError(
                f"{path.parent}: expected a store or a shard set, found no {NAME} and no shards; name a file or folder "
                "inside it"
            )
        return None, [f"{path}: missing: without it, the other files cannot be checked"]
    try:
        text = path.read_text(encoding="utf-8")
        manifest = parse_json(text)
        expected = seal(manifest)
        if "schema" not in manifest:
            raise RequestError(f"{path}: a different program's file; expected the manifest of a store or a shard set")
        files = manifest.get("files")
        listed = {name: (entry["bytes"], entry["crc32c"]) for name, entry in (files or {}).items()}
    except RequestError:
        raise
    except (OSError, ValueError, AttributeError, KeyError, TypeError, SamloveError) as error:
        return None, [f"{path}: truncated or damaged: {' '.join(str(error).split())}"]
    if "crc32c" not in manifest and not listed:
        return None, [f"{path}: lists no files (written by an older version); regenerate it to add checksums"]
    if manifest.get("schema") not in READABLE or manifest != expected or text != render_json(manifest):
        return None, [f"{path}: damaged: its text does not match its checksum"]
    return manifest, []


def _crc(path: Path) -> str:
    try:
        return crc32c_file(path)
    except OSError as error:
        return f"an unreadable file ({error.strerror})"


def _affected(folder: Path, name: str, manifest: dict[str, Any]) -> str:
    """The items of a feature store that cannot be read because a file of a shard is damaged, as the end of a line."""
    shard = name.split("/")[0]
    if "arrays" not in manifest or not shard.endswith(".zarr") or name == f"{shard}/zarr.json":
        return ""
    try:
        store = FeatureStore.open(folder)
    except SamloveError:
        return ""
    return _unreadable(store.keys_of(shard), store.read)


def _unreadable(keys: Iterable[str], read: Callable[[str], object]) -> str:
    """The keys whose items cannot be read, as the end of a line."""
    lost = []
    for key in keys:
        try:
            read(key)
        except SamloveError:
            lost.append(key)
    if not lost:
        return "; no item is affected"
    more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
    return f"; cannot be read: {', '.join(lost[:SHOWN])}{more}"


def _verify_file(path: Path, deep: bool) -> list[str]:
    if tensors.is_tensors(path):
        fault = tensors.damage(path, deep)
        if not fault and not tensors.is_sealed(path):
            fault = "has no checksum (written by an older version); retrain to add one"
    elif sealed.is_hdf5(path):
        fault = sealed.damage(path, deep)
        if fault == sealed.DAMAGED:
            fault += _affected_rows(path)
    else:
        raise RequestError(f"{path}: a different kind of file; expected {ARTEFACTS}")
    return [f"{path}: {fault}"] if fault else []


def _affected_rows(path: Path) -> str:
    """The unreadable rows of a damaged predictions file, or items of an exported store, as the end of a line."""
    try:
        artefact = open_artefact(path)
    except SamloveError:
        return "; it cannot be opened"
    return _unreadable(artefact.keys, artefact.read)
