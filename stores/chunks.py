"""Reads one array of a feature store's shard: maps the file, reads the requested chunks and checks each one.

Zarr's general reader takes 1 to 3 ms per array, because it runs an event loop and re-reads the shard's index. This
reader takes about 20 us. It reads only the layouts that FeatureStoreWriter writes (Zarr v3, one sharding_indexed shard
of little-endian chunks, uncompressed or zstd, with crc32c, index at the end) and refuses any other. Tests compare it
with zarr itself.
"""

import json
import math
import mmap
from typing import Any, Literal

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd
from zarr.codecs import Crc32cCodec, ZstdCodec

from stores.remote import AnyPath

Compression = Literal["none", "zstd"]
_CODECS = ["bytes", "crc32c"]  # of the index and of uncompressed chunks
_ZSTD = ["bytes", "zstd", "crc32c"]
_LEVEL = 3  # zstd's default
_CRC = np.dtype("<u4")
_PLACE = np.dtype("<u8")  # an index entry is two of these: a chunk's offset and its number of bytes


def compressors(compression: Compression) -> list[Any]:
    """Zarr's codecs for a chunk's bytes; the checksum covers the bytes on disk."""
    return [*([ZstdCodec(level=_LEVEL)] if compression == "zstd" else []), Crc32cCodec()]


class ShardArray:
    """One array, (keys, *item shape), of one shard. Holds a memory map of its file; must not be pickled.

    Raises OSError, ValueError, KeyError or TypeError if the files are missing, damaged or in a different layout.
    """

    def __init__(self, folder: AnyPath) -> None:
        meta = json.loads((folder / "zarr.json").read_text())
        (codec,) = meta["codecs"]
        sharding = codec["configuration"]
        names = [[inner["name"] for inner in sharding[part]] for part in ("codecs", "index_codecs")]
        chunk, shard = sharding["chunk_shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
        self.shape: tuple[int, ...] = tuple(meta["shape"])
        dtype = np.dtype(meta["data_type"])
        grid = shard[0] == self.shape[0] and chunk[0] == 1 and chunk[2:] == shard[2:] == list(self.shape[2:])
        if names[0] not in (_CODECS, _ZSTD) or names[1] != _CODECS or sharding["index_location"] != "end" or not grid:
            raise ValueError(f"{folder}: expected the layout of a feature store's array, found a different one")
        self._dtype = dtype.newbyteorder("<")
        self._chunk = tuple(chunk[1:])
        self._zstd = Zstd() if names[0] == _ZSTD else None
        self._per_key = shard[1] // chunk[1] if len(shard) > 1 else 1
        with folder.joinpath("c", *["0"] * len(shard)).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if not self._zstd and math.prod(self.shape) * dtype.itemsize > len(self._map):
            raise ValueError(f"{folder}: {self.shape} {dtype} does not fit in a file of {len(self._map)} bytes")
        size = shard[0] * self._per_key * 2 * _PLACE.itemsize
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
        if self._zstd:
            try:
                data = self._zstd.decode(data)
            except RuntimeError as error:
                raise ValueError(f"chunk {number}: {error}") from None
        return np.frombuffer(data, self._dtype).reshape(self._chunk)

    def read(self, key: int, rows: slice | None = None) -> np.ndarray:
        """A copy of item number `key`, or of a contiguous range of its rows along axis 0; reads only their chunks."""
        shape = self.shape[1:]
        if not shape:
            return self._read_chunk(key).copy()
        start, stop, step = (rows or slice(None)).indices(shape[0])
        if step != 1:
            raise ValueError(f"expected a row slice without a step, found {rows}")
        stop, height = max(start, stop), self._chunk[0]
        out = np.empty((stop - start, *shape[1:]), self._dtype)
        for number in range(start // height, -(-stop // height) if stop > start else 0):
            first, last = max(start, number * height), min(stop, (number + 1) * height)
            chunk = self._read_chunk(key * self._per_key + number)
            out[first - start : last - start] = chunk[first - number * height : last - number * height]
        return out
