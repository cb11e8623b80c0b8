"""Exports a feature store to one HDF5 file, for other programs or for sending, and imports it back bit-identical.

    FILE.h5             sealed (see stores.sealed)
        keys            (n,) text, in the store's order
        arrays/NAME     (n, *item shape), as stored, every chunk with a checksum
        files/PATH      (bytes,) uint8: a verbatim copy of each file of the store that holds no array data

Import writes these files, fills the arrays that they describe, and compares the values it reads back. `ExportReader`
reads an exported store in place.
"""

import csv
import io
import json
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np
import zarr

from samlove.errors import RequestError, SamloveError
from stores.chunks import ShardArray
from stores.codec import decode
from stores.features import FAILURES, Arrays, Failure, FeatureStore
from stores.manifest import NAME, SCHEMA, read_manifest, refuse_existing, replace_folder
from stores.sealed import BROKEN, Handle, create, seal

DATA = "c"  # Zarr v3 keeps an array's data in SHARD/ARRAY/c
REMEDY = "export the store again or copy the file again"


def export_store(path: str | Path, file: str | Path) -> int:
    """Write the store in folder `path` to the new HDF5 file `file`; returns the number of items.

    Raises RequestError if there is no store or the file exists, SamloveError if an item cannot be read.
    """
    file, folder = Path(file), Path(path)
    store = FeatureStore.open(folder)
    refuse_existing(file)
    partial = file.with_name(f".{file.name}.partial")
    try:
        with create(partial) as out:
            out["keys"] = np.array(store.keys(), dtype=h5py.string_dtype())
            files, arrays = out.create_group("files"), out.create_group("arrays")
            shards = {shard["name"] for shard in store.manifest["shards"]}
            for source in sorted(p for p in folder.rglob("*") if p.is_file()):
                relative = source.relative_to(folder)
                if relative.parts[0] not in shards or relative.parts[2:3] != (DATA,):
                    files[relative.as_posix()] = np.frombuffer(source.read_bytes(), np.uint8)
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
            raise RequestError(f"{self.path}: no such file; run: samlove store export, or: dvc pull")
        self._handle = Handle(self.path)
        try:
            opened = self._handle.open()
            self.manifest: dict[str, Any] = json.loads(opened["files"][NAME][()].tobytes())
            failure_log = opened["files"][FAILURES][()].tobytes().decode()
            self.failures = [Failure(**row) for row in csv.DictReader(io.StringIO(failure_log, newline=""))]
            keys = [str(key) for key in opened["keys"].asstr()[:]]
            if self.manifest["schema"] != SCHEMA or self.manifest["keys"] != len(keys):
                raise ValueError(f"expected schema {SCHEMA} and as many keys as in its manifest")
        except BROKEN as error:
            raise SamloveError(f"{self.path}: not a complete exported store ({_line(error)}); {REMEDY}") from None
        self._row = {key: row for row, key in enumerate(keys)}

    def keys(self) -> list[str]:
        """All keys, in the store's order."""
        return list(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def read(self, key: str) -> Arrays:
        """The same as `FeatureStore.read`."""
        if key not in self._row:
            raise SamloveError(f"{self.path}: no item {key!r} among its {len(self)}")
        try:
            arrays = self._handle.open()["arrays"]
            return decode({name: np.asarray(arrays[name][self._row[key]]) for name in self.manifest["arrays"]})
        except BROKEN as error:
            raise SamloveError(f"{self.path}: {key!r} cannot be read ({_line(error)}); {REMEDY}") from None


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def import_store(file: str | Path, path: str | Path) -> int:
    """Write the store that `export_store` exported to `file` to the new folder `path`; returns the number of items.

    Raises RequestError if the file does not exist or the folder does, SamloveError if the file is not an exported
    store or is damaged. On an error, nothing is left at `path`.
    """
    file, path = Path(file), Path(path)
    if not file.is_file():
        raise RequestError(f"{file}: no such file; expected a file that samlove store export wrote")
    refuse_existing(path)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
    try:
        with h5py.File(file) as source:
            source["files"].visititems(lambda name, item: _write_file(partial, name, item))
            manifest = read_manifest(partial, f"{file} is not an exported store")
            start = 0
            for shard in manifest["shards"]:
                rows = slice(start, start := start + shard["keys"])
                for name in manifest["arrays"]:
                    _fill(partial, f"{shard['name']}/{name}", source["arrays"][name][rows])
            keys = [str(key) for key in source["keys"].asstr()[:]]
        if FeatureStore.open(partial).keys() != keys:
            raise ValueError("its keys differ from the keys in its shards")
        replace_folder(partial, path)
    except BROKEN as error:  # zarr raises the same types
        raise SamloveError(
            f"{file}: cannot be imported: expected a complete file that samlove store export wrote ({_line(error)})"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(keys)


def _write_file(folder: Path, name: str, item: Any) -> None:
    if not isinstance(item, h5py.Dataset):
        return
    target = _inside(folder, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(item[()].tobytes())


def _inside(folder: Path, name: str) -> Path:
    if ".." in PurePosixPath(name).parts or name.startswith("/"):
        raise ValueError(f"{name!r} points outside the folder")
    return folder / name


def _fill(store: Path, name: str, values: np.ndarray) -> None:
    """Write one array of a shard, (keys, *item shape), in the layout of its zarr.json."""
    folder = _inside(store, name)
    with zarr.config.set({"array.write_empty_chunks": True}):  # as FeatureStoreWriter does
        array = zarr.open_array(folder, mode="r+")
    if (array.shape, array.dtype) != (values.shape, values.dtype):
        expected, found = f"{array.dtype} {array.shape}", f"{values.dtype} {values.shape}"
        raise ValueError(f"{name}: expected {expected}, found {found}")
    array[:] = values
    written = ShardArray(folder)
    if not all(np.array_equal(written.read(row), value) for row, value in enumerate(values)):
        raise ValueError(f"{name}: the values read back differ from the values written")
