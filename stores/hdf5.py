"""A feature store as one HDF5 file, for other programs and for sending, and back without a bit's difference.

    FILE.h5
        keys            (n,) text, in the store's order
        arrays/NAME     (n, *item shape), as stored, every chunk with a checksum
        files/PATH      (bytes,) uint8: each file of the store that holds no array's data, as it is

The way back writes those files, fills the arrays that they describe, and compares what it then reads.
"""

import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np
import zarr

from samlove.errors import RequestError, SamloveError
from stores.chunks import ShardArray
from stores.features import FeatureStore
from stores.manifest import read_manifest, refuse_existing, replace_folder

DATA = "c"  # SHARD/ARRAY/c holds an array's data, as Zarr v3 names it


def export_store(path: str | Path, file: str | Path) -> int:
    """Write the store below `path` to the new HDF5 file `file`; the number of items is returned.

    Raises RequestError where there is no store or the file exists, SamloveError where an item cannot be read.
    """
    file, folder = Path(file), Path(path)
    store = FeatureStore.open(folder)
    refuse_existing(file)
    partial = file.with_name(f".{file.name}.partial")
    try:
        with h5py.File(partial, "w") as out:
            out["keys"] = np.array(store.keys(), dtype=h5py.string_dtype())
            files, arrays = out.create_group("files"), out.create_group("arrays")
            shards = {shard["name"] for shard in store.manifest["shards"]}
            for source in sorted(p for p in folder.rglob("*") if p.is_file()):
                relative = source.relative_to(folder)
                if relative.parts[0] not in shards or relative.parts[2:3] != (DATA,):
                    files[relative.as_posix()] = np.frombuffer(source.read_bytes(), np.uint8)
            for place, key in enumerate(store.keys()):
                for name, array in store.read_stored(key).items():
                    if name not in arrays:
                        _create(arrays, name, array, len(store))
                    arrays[name][place] = array
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)
    return len(store)


def _create(group: h5py.Group, name: str, first: np.ndarray, items: int) -> None:
    shape = first.shape
    rows = (1, *shape[1:]) if first.nbytes > 2**20 else shape  # a frame is read alone where an item is large
    group.create_dataset(name, (items, *shape), first.dtype, chunks=(1, *rows), fletcher32=True)


def import_store(file: str | Path, path: str | Path) -> int:
    """Write the store that `export_store` put into `file` to the new folder `path`; the number of items is returned.

    Raises RequestError where there is no such file or the folder exists, SamloveError where the file is no such
    store, or damaged; then nothing is left at `path`.
    """
    file, path = Path(file), Path(path)
    if not file.is_file():
        raise RequestError(f"{file}: no such file; expected what samlove store export wrote")
    refuse_existing(path)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
    try:
        with h5py.File(file) as source:
            source["files"].visititems(lambda name, item: _write_file(partial, name, item))
            manifest = read_manifest(partial, f"{file} is no exported store")
            start = 0
            for shard in manifest["shards"]:
                rows = slice(start, start := start + shard["keys"])
                for name in manifest["arrays"]:
                    _fill(partial, f"{shard['name']}/{name}", source["arrays"][name][rows])
            keys = [str(key) for key in source["keys"].asstr()[:]]
        if FeatureStore.open(partial).keys() != keys:
            raise ValueError("its keys are not those of its shards")
        replace_folder(partial, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:  # what h5py and zarr raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SamloveError(
            f"{file}: cannot be imported, expected a whole file that samlove store export wrote ({reason})"
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
        raise ValueError(f"{name!r} leaves the folder")
    return folder / name


def _fill(store: Path, name: str, values: np.ndarray) -> None:
    """Write one array of a shard, (keys, *item shape), as its zarr.json lays it out."""
    folder = _inside(store, name)
    with zarr.config.set({"array.write_empty_chunks": True}):  # as FeatureStoreWriter does
        array = zarr.open_array(folder, mode="r+")
    if (array.shape, array.dtype) != (values.shape, values.dtype):
        expected, found = f"{array.dtype} {array.shape}", f"{values.dtype} {values.shape}"
        raise ValueError(f"{name}: expected {expected}, found {found}")
    array[:] = values
    written = ShardArray(folder)
    if not all(np.array_equal(written.read(row), value) for row, value in enumerate(values)):
        raise ValueError(f"{name}: what was written is not what is read")
