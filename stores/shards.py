"""WebDataset training shards: plain tar files, a JSON index, and a reader that memory-maps them without copying.

    ROOT/shard-00000.tar    members KEY.NAME.npy and KEY.NAME.json, uncompressed, data aligned to 64 bytes
    ROOT/index.json         shards {name, bytes}; samples {key, shard, members {name: place}} (see stores.tar)
    ROOT/manifest.json      schema, fingerprint, number of keys, files with their sizes and checksums

The tar files alone are enough: webdataset reads them, and the reader rebuilds a missing index in memory.
"""

import io
import json
import mmap
import shutil
import tarfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from samlove.errors import RequestError, SamloveError
from stores.manifest import NAME, SCHEMA, identity, read_manifest, refuse_replaced, replace_folder, write_manifest
from stores.remote import AnyPath, as_path, keep_open
from stores.tar import ESCAPED, KINDS, check_name, check_place, escape_key, scan_tar

INDEX = "index.json"
REMEDY = "run: dvc repro pack, or: dvc pull"
# Bytes per write and read. While a file is in the page cache, it reads more slowly if it was written in small pieces
# (docs/benchmarks.md).
_BLOCK = 1 << 24
# Name, dtype, shape, offset and order of an array. A JSON text has dtype None and its length in bytes as shape.
_Place = tuple[str, np.dtype | None, tuple[int, ...], int, Literal["C", "F"]]


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
        self._keys.add(key)
        assert self._tar is not None
        for name, data in members:
            info = tarfile.TarInfo(f"{escaped}.{name}")  # time 0, no owner: equal samples give equal bytes
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))

    def _next_shard(self) -> None:
        self._open.close()
        path = self._partial / f"shard-{len(self._keys) // self._per_shard:05d}.tar"
        file = self._open.enter_context(open(path, "wb", buffering=_BLOCK))
        tar = tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": ESCAPED})
        self._tar = self._open.enter_context(tar)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._open.close()
                index = build_index(self._partial)
                (self._partial / INDEX).write_text(json.dumps(index, ensure_ascii=False) + "\n", encoding="utf-8")
                write_manifest(self._partial, {"fingerprint": self._fingerprint, "keys": len(self._keys)})
                replace_folder(self._partial, self.root)
        finally:
            with suppress(OSError):  # closing fails again if the disk is full
                self._open.close()
            shutil.rmtree(self._partial, ignore_errors=True)


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


def build_index(root: str | AnyPath) -> dict[str, Any]:
    """The index of a folder's tar files, read from their headers.

    Raises SamloveError if a tar is incomplete, holds a member that must not be read, or shares a key with another.
    """
    shards, samples, seen = [], [], set()
    tars: list[AnyPath] = [*as_path(root).glob("*.tar")]
    for number, path in enumerate(sorted(tars, key=lambda tar: tar.name)):
        shards.append({"name": path.name, "bytes": path.stat().st_size})
        for sample in scan_tar(path):
            if sample["key"] in seen:
                raise SamloveError(f"{path}: key {sample['key']!r} is also in another shard")
            seen.add(sample["key"])
            samples.append({"key": sample["key"], "shard": number, "members": sample["members"]})
    return {"schema": SCHEMA, "shards": shards, "samples": samples}


class ShardReader:
    """Map-style reader of a folder of tar shards; arrays are read-only views of the mapped files.

    root: a folder, or a URL (see stores.remote).
    Each process maps the files itself, at first use: safe in forked and spawned workers.
    `manifest` is {} if another tool wrote the shards.
    Raises RequestError if there are no shards, SamloveError if a file is damaged or the index is wrong.
    """

    def __init__(self, root: str | AnyPath) -> None:
        self.root = as_path(root)
        if not any(self.root.glob("*.tar")) and not (self.root / INDEX).is_file():
            raise RequestError(f"{self.root}: expected a folder with .tar shards, found none; {REMEDY}")
        self._identity = identity(self.root / NAME)
        self.manifest: dict[str, Any] = read_manifest(self.root, REMEDY) if (self.root / NAME).is_file() else {}
        index = self._load_index()
        self._shards: list[AnyPath] = [self.root / shard["name"] for shard in index["shards"]]
        self._sizes: list[int] = [shard["bytes"] for shard in index["shards"]]
        self.nbytes: int = sum(self._sizes)  # of all tar files
        self._maps: dict[int, mmap.mmap] = {}
        self._samples: list[tuple[str, int, list[_Place]]] = []
        for sample in index["samples"]:
            limit = index["shards"][sample["shard"]]["bytes"]
            places = []
            for name, place in sample["members"].items():
                check_place(place, limit, f"{self.root / INDEX}: {sample['key']!r}: {name}")
                places.append(_place(name, place))
            self._samples.append((sample["key"], sample["shard"], places))

    def _load_index(self) -> dict[str, Any]:
        """The index, after a check that its shards are the files on disk; rebuilt if there is none."""
        path = self.root / INDEX
        if not path.is_file():
            return build_index(self.root)
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["schema"] != SCHEMA:
                raise ValueError(f"expected schema {SCHEMA}, found {index['schema']}")
            expected = {str(shard["name"]): shard["bytes"] for shard in index["shards"]}
            if any(not 0 <= sample["shard"] < len(index["shards"]) for sample in index["samples"]):
                raise ValueError("a sample refers to a shard that is not listed")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SamloveError(f"{path}: not a shard index ({type(error).__name__}: {error}); {REMEDY}") from None
        found = {tar.name: tar.stat().st_size for tar in self.root.glob("*.tar")}
        for name in sorted({*expected, *found}):
            if found.get(name) != expected.get(name):
                sizes = f"expected {expected.get(name, 'no such file')} bytes, found {found.get(name, 'no such file')}"
                raise SamloveError(f"{self.root / name}: truncated, missing or not in the index ({sizes}); {REMEDY}")
        return index

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def keys(self) -> list[str]:
        """All keys, in the order of writing."""
        return [key for key, _, _ in self._samples]

    def preload(self) -> None:
        """Read every shard completely, so that it is in the system's page cache for all processes."""
        for path in self._shards:
            with path.open("rb") as file:
                while file.read(_BLOCK):
                    pass

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Sample i: {"__key__": str, name: array (a read-only view) or decoded JSON value}."""
        key, shard, places = self._samples[i]
        if shard not in self._maps:
            self._maps[shard] = self._map(shard)
            keep_open(self._maps, self.root)
        mapped = self._maps[shard]
        sample: dict[str, Any] = {"__key__": key}
        for name, dtype, shape, offset, order in places:
            if dtype is None:
                sample[name] = json.loads(mapped[offset : offset + shape[0]])
            else:
                sample[name] = np.ndarray(shape, dtype, mapped, offset, order=order)
        return sample

    def _map(self, shard: int) -> mmap.mmap:
        path = self._shards[shard]
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise SamloveError(f"{path}: cannot be memory-mapped ({error}); {REMEDY}") from None
        refuse_replaced(self.root / NAME, self._identity)
        if len(mapped) != self._sizes[shard]:
            raise SamloveError(f"{path}: expected {self._sizes[shard]} bytes, found {len(mapped)}; {REMEDY}")
        return mapped


def _place(name: str, place: Mapping[str, Any]) -> _Place:
    if "size" in place:
        return name, None, (place["size"],), place["offset"], "C"
    return name, np.dtype(place["dtype"]), tuple(place["shape"]), place["offset"], place["order"]
