"""Reads one array of a feature store's shard: maps the file, reads the requested chunks and checks each one.

Zarr's general reader takes 1 to 3 ms per array, because it runs an event loop and re-reads the shard's index. This
reader takes about 20 us. It reads only the layouts that FeatureStoreWriter writes (Zarr v3, one sharding_indexed shard
of little-endian chunks, uncompressed or zstd, with crc32c, index at the end) and refuses any other. Tests compare it
with zarr itself. A chunk is decompressed only if it says that it holds exactly the bytes of its part of the array.
"""

import math
import mmap
import re
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import google_crc32c
import numpy as np
import zarr
from numcodecs.zstd import Zstd
from zarr.codecs import Crc32cCodec, ZstdCodec

from stores.fingerprint import differing, parse_json
from stores.remote import AnyPath, regular

Compression = Literal["none", "zstd"]
LIMIT = 1 << 31  # bytes of one item's compressed array: more is refused before memory is reserved for it
_DTYPE = re.compile(r"bool|u?int\d+|float\d+")
_CODECS = ["bytes", "crc32c"]  # of the index and of uncompressed chunks
_ZSTD = ["bytes", "zstd", "crc32c"]
_LEVEL = 3  # zstd's default
_CRC = np.dtype("<u4")
_PLACE = np.dtype("<u8")  # an index entry is two of these: a chunk's offset and its number of bytes


def compressors(compression: Compression) -> list[Any]:
    """Zarr's codecs for a chunk's bytes; the checksum covers the bytes on disk."""
    return [*([ZstdCodec(level=_LEVEL)] if compression == "zstd" else []), Crc32cCodec()]


def use_zarr_defaults() -> None:
    """Give zarr its own defaults in this process. Call it before zarr writes.

    Otherwise ZARR_* variables and zarr's YAML files, such as ~/.config/zarr/zarr.yaml, could change a store's bytes.
    """
    for defaults in zarr.config.defaults:
        zarr.config.set(deepcopy(defaults))  # not reset(), which empties the settings first: other threads may write


@dataclass(frozen=True)
class Layout:
    """How one array, (keys, *item shape), of a shard is stored.

    chunk: the shape of a chunk, without its first axis, which is one key; only axis 0 of an item may be split.
    per_key: chunks per item. zstd: whether chunks are compressed.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    per_key: int
    zstd: bool

    @classmethod
    def read(cls, folder: AnyPath) -> "Layout":
        """The layout in an array's zarr.json. Raises OSError or ValueError if it is missing, damaged or different."""
        text = regular(folder / "zarr.json").read_text(encoding="utf-8")
        try:
            meta = parse_json(text)
            ((sharding, codec),) = [(codec["configuration"], codec["name"]) for codec in meta["codecs"]]
            names, index = ([part["name"] for part in sharding[key]] for key in ("codecs", "index_codecs"))
            orders = [sharding[key][0].get("configuration", {}).get("endian") for key in ("codecs", "index_codecs")]
            shape, chunk = _lengths(meta["shape"]), _lengths(sharding["chunk_shape"])
            step = [min(chunk[1], shape[1])] if shape[1:] else []  # rows of a chunk; none if an item is a single number
            rows = [-(-n // height) * height for n, height in zip(shape[1:2], step, strict=True)]
            name, zstd = str(meta["data_type"]), names == _ZSTD
            dtype = np.dtype(name if _DTYPE.fullmatch(name) else object)  # NumPy would read some other texts as code
            found = {
                "data_type": meta["data_type"],
                "shard": meta["chunk_grid"]["configuration"]["chunk_shape"],
                "chunk": chunk,
                "codecs": [codec, names, index, sharding["index_location"], *orders],
                "keys": meta["chunk_key_encoding"],
            }
            expected = {
                "data_type": "bool, int or float" if dtype.hasobject else dtype.name,
                "shard": [shape[0], *rows, *shape[2:]],
                "chunk": (1, *step, *shape[2:]),
                "codecs": ["sharding_indexed", _ZSTD if zstd else _CODECS, _CODECS, "end", *_orders(dtype)],
                "keys": {"name": "default", "configuration": {"separator": "/"}},
            }
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder}: not the metadata of an array ({type(error).__name__}: {error})") from None
        if differences := differing(expected, found):
            raise ValueError(f"{folder}: not the layout of a feature store's array (expected, found: {differences})")
        if zstd and math.prod(shape[1:]) * dtype.itemsize > LIMIT:
            raise ValueError(f"{folder}: expected items of at most {LIMIT} bytes, found {shape[1:]} {dtype}")
        return cls(shape, dtype.newbyteorder("<"), chunk[1:], rows[0] // step[0] if rows else 1, zstd)


def _orders(dtype: np.dtype) -> list[str | None]:
    """The byte order that Zarr notes of the chunks, none for single bytes, and of the index."""
    return ["little" if dtype.itemsize > 1 else None, "little"]


def _lengths(value: Any) -> tuple[int, ...]:
    """A shape from JSON. Raises ValueError unless it has at least one axis and all are integers of at least 1."""
    if not isinstance(value, list) or not value or not all(type(n) is int and n > 0 for n in value):
        raise ValueError(f"expected a shape, found {value}")
    return tuple(value)


class ShardArray:
    """One array, (keys, *item shape), of one shard. Holds a memory map of its file; must not be pickled.

    Raises OSError or ValueError if the files are missing, damaged or in a different layout.
    """

    def __init__(self, folder: AnyPath) -> None:
        self._layout = layout = Layout.read(folder)
        self.shape: tuple[int, ...] = layout.shape
        with regular(folder.joinpath("c", *["0"] * len(layout.shape))).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if not layout.zstd and math.prod(self.shape) * layout.dtype.itemsize > len(self._map):
            raise ValueError(f"{folder}: {self.shape} {layout.dtype} does not fit in {len(self._map)} bytes")
        size = self.shape[0] * layout.per_key * 2 * _PLACE.itemsize
        index = self._checked(len(self._map) - size - _CRC.itemsize, size + _CRC.itemsize, "index")
        self._places = [(int(o), int(n)) for o, n in np.frombuffer(index, _PLACE).reshape(-1, 2)]  # offset, size

    def _checked(self, offset: int, size: int, what: str) -> bytes:
        """The bytes at an offset, without the crc32c at their end; ValueError if the crc32c does not match."""
        if offset < 0 or size < _CRC.itemsize or offset + size > len(self._map):
            raise ValueError(f"{what} ({size} bytes at {offset}) is outside the file of {len(self._map)} bytes")
        data = self._map[offset : offset + size - _CRC.itemsize]
        (expected,) = np.frombuffer(self._map, _CRC, 1, offset + len(data))
        if google_crc32c.value(data) != expected:
            raise ValueError(f"{what} at {offset}: checksum mismatch")
        return data

    def _read_chunk(self, number: int) -> np.ndarray:
        data = self._checked(*self._places[number], f"chunk {number}")
        shape, dtype = self._layout.chunk, self._layout.dtype
        if self._layout.zstd:
            size = math.prod(shape) * dtype.itemsize
            if _content_size(data) != size:
                raise ValueError(f"chunk {number}: expected a zstd frame of {size} bytes, found {_content_size(data)}")
            try:
                data = Zstd().decode(data)
            except RuntimeError as error:
                raise ValueError(f"chunk {number}: {error}") from None
        return np.frombuffer(data, dtype).reshape(shape)

    def read(self, key: int, rows: slice | None = None) -> np.ndarray:
        """A copy of item number `key`, or of a contiguous range of its rows along axis 0; reads only their chunks."""
        shape = self.shape[1:]
        if not shape:
            return self._read_chunk(key).copy()
        start, stop, step = (rows or slice(None)).indices(shape[0])
        if step != 1:
            raise ValueError(f"expected a row slice without a step, found {rows}")
        stop, height = max(start, stop), self._layout.chunk[0]
        out = np.empty((stop - start, *shape[1:]), self._layout.dtype)
        for number in range(start // height, -(-stop // height) if stop > start else 0):
            first, last = max(start, number * height), min(stop, (number + 1) * height)
            chunk = self._read_chunk(key * self._layout.per_key + number)
            out[first - start : last - start] = chunk[first - number * height : last - number * height]
        return out


def _content_size(frame: bytes) -> int | None:
    """The bytes that a zstd frame says it holds; None if it does not say, or is no frame (RFC 8878, section 3.1.1)."""
    if frame[:4] != b"\x28\xb5\x2f\xfd" or len(frame) < 5:
        return None
    single, dictionary = frame[4] >> 5 & 1, (0, 1, 2, 4)[frame[4] & 3]
    length = (single, 2, 4, 8)[frame[4] >> 6]
    start = 5 + (not single) + dictionary
    size = int.from_bytes(frame[start : start + length], "little")
    return size + (256 if length == 2 else 0) if length else None
