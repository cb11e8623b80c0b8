"""Exports a feature store to one HDF5 file, for other programs or for sending, and imports it back bit-identical.

    FILE.h5             sealed (see stores.sealed)
        keys            (n,) text, in the store's order
        arrays/NAME     (n, *item shape), as stored, every chunk with a checksum
        files/PATH      (bytes,) uint8: a verbatim copy of each file of the store that holds no array data

Import writes these files, fills the arrays that they describe, and compares the values it reads back. `ExportReader`
reads an exported store in place.
"""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np
import zarr

from samlove.errors import FULL, RequestError, SamloveError, absence
from stores.chunks import Layout, ShardArray, use_zarr_defaults
from stores.codec import decode
from stores.features import (
    FAILURES,
    INDEX,
    INDEX_COLUMNS,
    Arrays,
    Failure,
    FeatureStore,
    index_of_attributes,
    read_failures,
)
from stores.fingerprint import parse_json
from stores.listing import listed_files
from stores.manifest import NAME, check_part, parse_manifest, read_manifest, refuse_existing, replace_folder
from stores.remote import regular
from stores.sealed import BROKEN, Handle, create, open_checked, seal
from stores.table import Table

DATA = "c"  # Zarr v3 keeps an array's data in SHARD/ARRAY/c
REMEDY = "export the store again or copy the file again"
RECOMPUTE = "recompute the store"


def export_store(path: str | Path, file: str | Path) -> int:
    """Write the store in folder `path` to the new HDF5 file `file`; returns the number of items.

    Raises RequestError if there is no store or the file exists, SamloveError if an item cannot be read.
    """
    file, folder = Path(file), Path(path)
    store = FeatureStore.open(folder)
    refuse_existing(file)
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()  # if it cannot be made, this error names the path in fewer words than HDF5's
        with create(partial) as out:
            out["keys"] = np.array(store.keys(), dtype=h5py.string_dtype())
            files, arrays = out.create_group("files"), out.create_group("arrays")
            for name, content in _files_to_copy(store, folder):
                files[name] = np.frombuffer(content, np.uint8)
            for row, key in enumerate(store.keys()):
                for name, array in store.read_stored(key).items():
                    if name not in arrays:
                        _create(arrays, name, array, len(store))
                    arrays[name][row] = array
        seal(partial)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)
    return len(store)


def _files_to_copy(store: FeatureStore, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the manifest and of every file that it lists, except array data.

    No other file is copied, and none with different content: a store from elsewhere may contain links to any file.
    """
    if not store.manifest.get("files"):
        raise SamloveError(f"{folder / NAME}: lists no files (written by an older version); {RECOMPUTE}")
    yield NAME, (folder / NAME).read_bytes()
    for file in listed_files(folder, store.manifest, RECOMPUTE):
        parts = file.path.split("/")
        if parts[0] in store.shards and parts[2:3] == [DATA]:
            continue
        try:
            content = regular(_inside(folder, file.path)).read_bytes()
        except OSError as error:
            raise SamloveError(f"{folder / file.path}: cannot be read ({error}); {RECOMPUTE}") from None
        if f"{google_crc32c.value(content):08x}" != file.crc32c:
            raise SamloveError(f"{folder / file.path}: damaged: its bytes do not match its checksum; {RECOMPUTE}")
        yield file.path, content


def _create(group: h5py.Group, name: str, first: np.ndarray, items: int) -> None:
    shape = first.shape
    rows = (1, *shape[1:]) if first.nbytes > 2**20 else shape  # so that one frame of a large item can be read alone
    group.create_dataset(name, (items, *shape), first.dtype, chunks=(1, *rows), fletcher32=True)


class ExportReader:
    """Reads a file that `export_store` wrote, in place; each process opens its own handle.

    Raises RequestError if the file does not exist, SamloveError if it is not a complete exported store.
    """

    def __init__(self, file: str | Path) -> None:
        self.path = Path(file)
        if not self.path.is_file():
            raise RequestError(f"{self.path}: {absence(self.path)}; run: samlove store export, or: dvc pull")
        self._handle = Handle(self.path)
        try:
            opened = self._handle.open()
            self.manifest: dict[str, Any] = parse_manifest(opened["files"][NAME][()].tobytes())
            failure_log = io.StringIO(opened["files"][FAILURES][()].tobytes().decode(), newline="")
            self.failures: list[Failure] = read_failures(failure_log)
            self._index = Table(self._find_index(opened["files"]), INDEX_COLUMNS, REMEDY, sorted_by="key")
            self._check(opened["arrays"])
        except (*BROKEN, SamloveError) as error:
            raise SamloveError(f"{self.path}: not a complete exported store ({_line(error)}); {REMEDY}") from None

    def _find_index(self, files: h5py.Group) -> bytes:
        """The index of the store. `keys` is for other programs: the HDF5 library does not read such texts safely."""

        def read(shard: str) -> dict[str, Any]:
            return parse_json(files[f"{shard}/zarr.json"][()].tobytes())["attributes"]

        return (
            files[INDEX][()].tobytes()
            if self.manifest["schema"] > 1
            else index_of_attributes(self.manifest, read, f"files/{NAME}")
        )

    def _check(self, arrays: h5py.Group) -> None:
        """Raise SamloveError, or one of BROKEN, unless the arrays are those in the manifest."""
        _, shards, keys = (self.manifest[name] for name in ("fingerprint", "shards", "keys"))
        if not isinstance(shards, int | list) or keys != len(self):
            raise ValueError(f"expected a store's manifest, with {len(self)} keys, found {keys}")
        for name, spec in self.manifest["arrays"].items():
            check_part(name, "arrays")
            expected = spec["dtype"], (len(self), *spec["shape"])
            if (found := (arrays[name].dtype.name, arrays[name].shape)) != expected:
                raise ValueError(f"arrays/{name}: expected {expected}, found {found}")

    def keys(self) -> list[str]:
        """All keys, in the store's order."""
        return list(self._index.texts("key"))

    def __len__(self) -> int:
        return len(self._index)

    def read(self, key: str) -> Arrays:
        """The same as `FeatureStore.read`."""
        row = self._index.find(key)
        if row is None:
            raise SamloveError(f"{self.path}: no item {key!r} among its {len(self)}")
        try:
            arrays = self._handle.open()["arrays"]
            return decode({name: np.asarray(arrays[name][row]) for name in self.manifest["arrays"]})
        except (*BROKEN, SamloveError) as error:
            raise SamloveError(f"{self.path}: {key!r} cannot be read ({_line(error)}); {REMEDY}") from None


def _line(error: Exception) -> str:
    return " ".join((f"{error}" if isinstance(error, SamloveError) else f"{type(error).__name__}: {error}").split())


def import_store(file: str | Path, path: str | Path) -> int:
    """Write the store that `export_store` exported to `file` to the new folder `path`; returns the number of items.

    Raises RequestError if the file does not exist or the folder does, SamloveError if the file is not an exported
    store or is damaged. On an error, nothing is left at `path`.
    """
    file, path = Path(file), Path(path)
    if not file.is_file():
        raise RequestError(f"{file}: {absence(file)}; expected a file that samlove store export wrote")
    refuse_existing(path)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
    partial.mkdir(parents=True)
    try:
        with open_checked(file) as source:
            source["files"].visititems(lambda name, item: _write_file(partial, name, item))
            read_manifest(partial, f"{file} is not an exported store")
            store = FeatureStore.open(partial)
            start = 0
            for shard, count in store.shards.items():
                rows = slice(start, start := start + count)
                for name in store.manifest["arrays"]:
                    _fill(partial, f"{shard}/{name}", source["arrays"][name][rows])
        replace_folder(partial, path)
    except (*BROKEN, SamloveError) as error:  # zarr raises the same types
        if isinstance(error, OSError) and error.errno in FULL:  # of the store's disk
            raise
        reason = _line(error).replace(f"{partial}/", "")
        raise SamloveError(
            f"{file}: cannot be imported: expected a complete file that samlove store export wrote ({reason})"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(store)


def _write_file(folder: Path, name: str, item: Any) -> None:
    if not isinstance(item, h5py.Dataset):
        return
    target = _inside(folder, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(item[()].tobytes())


def _inside(folder: Path, name: str) -> Path:
    for part in name.split("/"):
        check_part(part, folder)
    return folder / name


def _fill(store: Path, name: str, values: np.ndarray) -> None:
    """Write one array of a shard, (keys, *item shape), in the layout of its zarr.json."""
    folder = _inside(store, name)
    layout = Layout.read(folder)  # zarr would load whatever codec the file names
    if (layout.shape, layout.dtype) != (values.shape, values.dtype):
        expected, found = f"{layout.dtype} {layout.shape}", f"{values.dtype} {values.shape}"
        raise ValueError(f"{name}: expected {expected}, found {found}")
    use_zarr_defaults()
    with zarr.config.set({"array.write_empty_chunks": True}):  # as FeatureStoreWriter does
        array = zarr.open_array(folder, mode="r+")
    array[:] = values
    written = ShardArray(folder)
    if not all(np.array_equal(written.read(row), value) for row, value in enumerate(values)):
        raise ValueError(f"{name}: the values read back differ from the values written")
