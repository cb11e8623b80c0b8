"""WebDataset training shards: plain tar files with an index, and a reader that memory-maps them without copying.

    ROOT/shard-00000.tar    members KEY.NAME.npy and KEY.NAME.json, uncompressed, data aligned to 64 bytes
    ROOT/index.arrow        the samples (see stores.shard_index)
    ROOT/files.arrow        the tar files, with their sizes and checksums (see stores.listing)
    ROOT/manifest.json      schema, fingerprint, number of keys, checksums of the two files above

The tar files alone are enough: webdataset reads them, and the reader rebuilds a missing index in memory. So it does
for shard sets of schema 1, whose index was a JSON text.
"""

import io
import json
import math
import mmap
import os
import shutil
import tarfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from samlove.errors import RequestError, SamloveError, absence
from stores.listing import FILES, File, check_beside, listed_files, seal_folder
from stores.manifest import NAME, identity, read_manifest, refuse_replaced, replace_folder
from stores.remote import AnyPath, RemotePath, as_path, keep_open, regular
from stores.shard_index import INDEX, ROWS, Member, ShardIndex, ShardIndexWriter, scan_shards
from stores.tar import BLOCK, ESCAPED, KINDS, check_name, escape_key

REMEDY = "run: dvc repro pack, or: dvc pull"
# Bytes per write and read. While a file is in the page cache, it reads more slowly if it was written in small pieces
# (docs/benchmarks.md).
_BLOCK = 1 << 24


class ShardWriter:
    """Context manager that writes samples to tar shards; ROOT appears, complete, when the block ends without error.

    fingerprint: a JSON dict that describes what the samples are made from, stored in the manifest.
    """

    def __init__(
        self, root: str | Path, samples_per_shard: int = 64, fingerprint: Mapping[str, Any] | None = None
    ) -> None:
        if samples_per_shard < 1:
            raise RequestError(f"{root}: expected samples_per_shard of at least 1, found {samples_per_shard}")
        self.root = Path(root)
        self._partial = self.root.with_name(f".{self.root.name}.partial")
        self._per_shard = samples_per_shard
        self._fingerprint = dict(fingerprint or {})
        self._keys: set[str] = set()
        self._tar: tarfile.TarFile | None = None
        self._open = ExitStack()  # holds the tar and its file
        shutil.rmtree(self._partial, ignore_errors=True)  # left by a killed run
        self._partial.mkdir(parents=True)
        self._index = ShardIndexWriter(self._partial)

    def __enter__(self) -> "ShardWriter":
        return self

    def write(self, key: str, sample: Mapping[str, Any]) -> None:
        """Append one sample: {name: numpy array or JSON value}.

        Raises SamloveError if the key is repeated, webdataset would change a name, an array is not bool, int or float,
        or a value cannot be stored as JSON. Nothing of that sample is then written.
        """
        if key in self._keys:
            raise SamloveError(f"{self.root}: expected each key once, found {key!r} twice")
        escaped = escape_key(key)
        members = [_member(f"{self.root}: {key!r}", name, value) for name, value in sample.items()]
        if not members:
            raise SamloveError(f"{self.root}: {key!r}: expected at least one array or JSON value, found none")
        if len(self._keys) % self._per_shard == 0:
            self._next_shard()
        assert self._tar is not None
        places = {}
        for (name, value), (member, data) in zip(sample.items(), members, strict=True):
            info = tarfile.TarInfo(f"{escaped}.{member}")  # time 0, no owner: equal samples give equal bytes
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
            places[name] = _place(value, self._tar.offset - -(-len(data) // BLOCK) * BLOCK, len(data))
        rows = dict(zip(sample, members, strict=True))[ROWS][1] if isinstance(sample.get(ROWS), list) else b""
        self._index.add(key, len(self._keys) // self._per_shard, places, rows)
        self._keys.add(key)

    def _next_shard(self) -> None:
        self._open.close()
        path = self._partial / _shard_name(len(self._keys) // self._per_shard)
        file = self._open.enter_context(open(path, "wb", buffering=_BLOCK))
        tar = tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": ESCAPED})
        self._tar = self._open.enter_context(tar)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._open.close()
                self._index.write(self._partial / INDEX)
                shards = range(-(-len(self._keys) // self._per_shard))
                files = (File.read(self._partial, _shard_name(number)) for number in shards)
                seal_folder(self._partial, {"fingerprint": self._fingerprint, "keys": len(self._keys)}, files)
                replace_folder(self._partial, self.root)
        finally:
            with suppress(OSError):  # closing fails again if the disk is full
                self._open.close()
            shutil.rmtree(self._partial, ignore_errors=True)


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.tar"


def _member(where: str, name: str, value: object) -> tuple[str, bytes]:
    """Member name (without the key) and bytes of one array or JSON value."""
    check_name(name)
    if not isinstance(value, np.ndarray):
        try:
            return f"{name}.json", json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise SamloveError(f"{where}: {name}: expected an array or a JSON value ({error})") from None
    if value.dtype.kind not in KINDS:
        raise SamloveError(f"{where}: {name}: expected bool, int or float numbers, found dtype {value.dtype}")
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(value, order="C"), version=(1, 0), allow_pickle=False)
    return f"{name}.npy", stream.getvalue()


def _place(value: object, offset: int, size: int) -> dict[str, Any]:
    """The place, as in stores.tar, of a value that `_member` turned into `size` bytes, now at `offset` in the tar."""
    if not isinstance(value, np.ndarray):
        return {"offset": offset, "size": size}
    header = size - value.nbytes
    return {"offset": offset + header, "dtype": value.dtype.str, "shape": list(value.shape), "order": "C"}


class ShardReader:
    """Map-style reader of a folder of tar shards; arrays are read-only views of the mapped files.

    root: a folder, or a URL (see stores.remote).
    Opening reads no shard. Each process maps a shard when it first reads from it: safe in forked and spawned workers.
    `manifest` is {} if another tool wrote the shards.
    Raises RequestError if there are no shards, SamloveError if a file is damaged or the index is wrong.
    """

    def __init__(self, root: str | AnyPath) -> None:
        self.root = as_path(root)
        sizes = _sizes_of_tars(self.root)
        if not sizes and not (self.root / INDEX).is_file():
            raise RequestError(f"{self.root}: expected a folder with .tar shards, found none; {REMEDY}")
        self._identity = identity(self.root / NAME)
        self.manifest: dict[str, Any] = read_manifest(self.root, REMEDY) if (self.root / NAME).is_file() else {}
        check_beside(self.root, self.manifest, REMEDY)
        self.nbytes: int = sum(sizes.values())  # of all tar files
        self._names = self._listed(sizes)
        self._sizes = [sizes[name] for name in self._names]
        indexed = (self.root / INDEX).is_file()
        self.index = ShardIndex(self.root / INDEX if indexed else scan_shards(self._paths()), REMEDY)
        self._maps: dict[int, mmap.mmap] = {}

    def _listed(self, found: Mapping[str, int]) -> list[str]:
        """The names of the shards, in order.

        Raises SamloveError if the shards listed when the set was written are not the files in the folder, with the
        same sizes.
        """
        if not self.manifest and not (self.root / FILES).is_file():
            return sorted(found)  # another tool wrote the shards
        listed = [file for file in listed_files(self.root, self.manifest, REMEDY) if file.path.endswith(".tar")]
        expected = {file.path: file.bytes for file in listed}
        for name in sorted({*expected, *found}):
            if found.get(name) != expected.get(name):
                sizes = f"expected {expected.get(name, 'no such file')} bytes, found {found.get(name, 'no such file')}"
                raise SamloveError(f"{self.root / name}: truncated, missing or not in the index ({sizes}); {REMEDY}")
        return [file.path for file in listed]

    def _paths(self) -> list[AnyPath]:
        return [self.root / name for name in self._names]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def keys(self) -> list[str]:
        """All keys, in the order of writing."""
        return self.index.keys()

    def preload(self) -> None:
        """Read every shard completely, so that it is in the system's page cache for all processes."""
        for path in self._paths():
            with regular(path).open("rb") as file:
                while file.read(_BLOCK):
                    pass

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Sample i: {"__key__": str, name: array (a read-only view) or decoded JSON value}.

        Raises IndexError if there is no such sample, SamloveError if the index does not fit the shard.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        mapped = self._mapped(self.index.shard(i))
        sample: dict[str, Any] = {"__key__": self.index.key(i)}
        for member in self.index.members(i):
            name = member[0]
            try:
                rows = self.index.rows(i) if name == ROWS else None
                sample[name] = _view(mapped, member) if rows is None else rows
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                where = f"{self.root / INDEX}: {sample['__key__']!r}: {name}"
                raise SamloveError(f"{where}: not in its shard of {len(mapped)} bytes ({error}); {REMEDY}") from None
        return sample

    def _mapped(self, shard: int) -> mmap.mmap:
        mapped = self._maps.get(shard)  # another thread may close any shard at any time
        if mapped is None:
            if not 0 <= shard < len(self._names):
                raise SamloveError(f"{self.root / INDEX}: shard {shard} of {len(self._names)}; {REMEDY}")
            keep_open(self._maps, self.root)
            mapped = self._maps[shard] = self._map(shard)
        return mapped

    def _map(self, shard: int) -> mmap.mmap:
        path = self.root / self._names[shard]
        try:
            with regular(path).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise SamloveError(f"{path}: cannot be memory-mapped ({error}); {REMEDY}") from None
        refuse_replaced(self.root / NAME, self._identity)
        if len(mapped) != self._sizes[shard]:
            raise SamloveError(f"{path}: expected {self._sizes[shard]} bytes, found {len(mapped)}; {REMEDY}")
        return mapped


def _view(mapped: mmap.mmap, member: Member) -> Any:
    """An array as a view of the mapped shard, or a decoded JSON text. Raises ValueError if it is not in the shard."""
    _, dtype, shape, offset, order = member
    if offset < 0 or (shape and min(shape) < 0):
        raise ValueError(f"offset {offset}, shape {shape}")
    size = shape[0] if dtype is None else math.prod(shape) * dtype.itemsize
    if offset + size > len(mapped):  # NumPy's own check overflows
        raise ValueError(f"ends at {offset + size}")
    if dtype is not None:
        return np.ndarray(shape, dtype, mapped, offset, order=order)
    return json.loads(mapped[offset : offset + size])


def _sizes_of_tars(root: AnyPath) -> dict[str, int]:
    """{name: bytes} of the tar files in a folder."""
    if isinstance(root, RemotePath):
        return {path.name: path.stat().st_size for path in root.glob("*.tar")}
    try:
        names = [name for name in os.listdir(root) if name.endswith(".tar")]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        return {name: (root / name).stat().st_size for name in names}
    except OSError as error:
        raise SamloveError(f"{error.filename}: {absence(Path(error.filename))}; {REMEDY}") from None
