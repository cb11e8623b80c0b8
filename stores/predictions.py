"""Predicted masks of one split in one HDF5 file: probabilities as uint8 bins between given edges.

    row_ids     (n,) utf-8 text of fixed length
    bins        (n,T,H,W) uint8; one chunk per row, with gzip and a checksum (fletcher32)
    edges       (E,) float32; bin b holds the probabilities p (sigmoids of mask logits) with edges[b-1] <= p < edges[b]
    header      (bytes,) uint8: a JSON text {schema, attrs}; attrs describes what the file was made from

No pickles. The file is sealed (see stores.sealed).
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from samlove.errors import RequestError, SamloveError, absence
from stores.chunks import LIMIT
from stores.fingerprint import canonical_json, parse_json
from stores.sealed import BROKEN, Handle, create, seal

SCHEMA = 2  # schema 1 had texts of variable length, which the HDF5 library does not read safely
REMEDY = "run: dvc repro infer, or: dvc pull"


class PredictionWriter:
    """Context manager that appends rows; the file appears under its name when the block ends without error.

    frames: T. size: H = W. edges: (E,) float32, E <= 255, increasing.
    attrs: a JSON dict that describes what the file is made from.
    """

    def __init__(
        self, path: str | Path, frames: int, size: int, edges: np.ndarray, attrs: Mapping[str, Any] | None = None
    ) -> None:
        self.path = Path(path)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._shape = (frames, size, size)
        if math.prod(self._shape) > LIMIT:
            raise RequestError(f"{path}: expected rows of at most {LIMIT} bytes, found {frames} x {size} x {size}")
        self._ids: dict[str, bytes] = {}  # in order, also as UTF-8
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = create(self._partial)
        header = canonical_json({"schema": SCHEMA, "attrs": attrs or {}})
        self._file.create_dataset("header", data=np.frombuffer(header.encode(), np.uint8))
        self._file.create_dataset("edges", data=np.asarray(edges, np.float32))
        self._file.create_dataset(
            "bins",
            (0, *self._shape),
            np.uint8,
            maxshape=(None, *self._shape),
            chunks=(1, *self._shape),
            compression="gzip",
            compression_opts=4,
            fletcher32=True,
        )

    def __enter__(self) -> "PredictionWriter":
        return self

    def write(self, row_ids: Sequence[str], bins: np.ndarray) -> None:
        """Append rows: bins (n,T,H,W) uint8, n = len(row_ids).

        Raises SamloveError if the shape or dtype is wrong, a row is repeated, or an id contains a null character.
        """
        if bins.shape != (len(row_ids), *self._shape) or bins.dtype != np.uint8:
            raise SamloveError(
                f"{self.path}: expected bins {(len(row_ids), *self._shape)} uint8, found {bins.shape} {bins.dtype}"
            )
        if invalid := [row_id for row_id in row_ids if "\0" in row_id]:
            raise SamloveError(f"{self.path}: expected ids without null characters, found {invalid[0]!r}")
        repeated = self._ids.keys() & set(row_ids)
        if repeated or len(set(row_ids)) != len(row_ids):
            raise SamloveError(f"{self.path}: expected each row once, found a repeated one in {sorted(row_ids)[:5]}")
        self._ids |= {row_id: row_id.encode() for row_id in row_ids}
        start, stop = len(self._ids) - len(row_ids), len(self._ids)
        self._file["bins"].resize((stop, *self._shape))
        self._file["bins"][start:stop] = bins

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            length = max([1, *map(len, self._ids.values())])
            self._file["row_ids"] = np.array([*self._ids.values()], h5py.string_dtype("utf-8", length))
        self._file.close()
        if kind is None:
            seal(self._partial)
            self._partial.replace(self.path)
        else:
            self._partial.unlink()


class PredictionReader:
    """A predictions file, read only; each process opens its own handle.

    remedy: what to do about a file that is missing or damaged, for the messages.
    Raises RequestError if the file does not exist, SamloveError if it is incomplete or has a different schema.
    """

    def __init__(self, path: str | Path, remedy: str = REMEDY) -> None:
        self.path = Path(path)
        self._remedy = remedy
        if not self.path.is_file():
            raise RequestError(f"{self.path}: {absence(self.path)}; {remedy}")
        self._handle = Handle(self.path)
        try:
            file = self._handle.open()
            if "header" not in file:
                raise ValueError("another kind of file, or written by an older version")
            header = parse_json(file["header"][()].tobytes())
            if header["schema"] != SCHEMA:
                raise ValueError(f"expected schema {SCHEMA}, found {header['schema']}")
            self.attrs: dict[str, Any] = header["attrs"]
            if file["row_ids"].dtype.kind != "S":
                raise ValueError(f"expected row_ids of fixed length, found {file['row_ids'].dtype}")
            self.row_ids: list[str] = [row_id.decode() for row_id in file["row_ids"][:].tolist()]
            self.edges: np.ndarray = file["edges"][:]  # (E,) float32
            self.shape: tuple[int, int, int] = _check(file["bins"], self.edges, self.attrs, self.row_ids)
        except BROKEN as error:
            raise SamloveError(f"{self.path}: not a complete predictions file ({error}); {remedy}") from None
        self._index = {row_id: i for i, row_id in enumerate(self.row_ids)}

    def __len__(self) -> int:
        return len(self.row_ids)

    def __contains__(self, row_id: object) -> bool:
        return row_id in self._index

    def read(self, row_id: str) -> np.ndarray:
        """One row's bins (T,H,W) uint8. Raises SamloveError if the file has no such row or its bytes are damaged."""
        if row_id not in self._index:
            raise SamloveError(f"{self.path}: no row {row_id!r} among its {len(self)}; {self._remedy}")
        try:
            skipped, stored = self._handle.open()["bins"].id.read_direct_chunk((self._index[row_id], 0, 0, 0))
            if skipped:
                raise ValueError("expected compressed bins with a checksum")
            return np.frombuffer(_inflate(stored, math.prod(self.shape)), np.uint8).reshape(self.shape).copy()
        except BROKEN as error:
            raise SamloveError(f"{self.path}: row {row_id!r} cannot be read ({error}); {self._remedy}") from None


def _check(bins: h5py.Dataset, edges: np.ndarray, attrs: object, row_ids: Sequence[str]) -> tuple[int, int, int]:
    """T, H, W. Raises ValueError unless the parts of a predictions file fit together."""
    if not isinstance(attrs, dict) or len(set(row_ids)) != len(row_ids):
        raise ValueError("expected a JSON object that describes it, and each row once")
    if edges.ndim != 1 or edges.dtype != np.float32 or len(edges) > 255 or not (edges[1:] >= edges[:-1]).all():
        raise ValueError(f"expected at most 255 increasing edges, found {edges.dtype} {edges.shape}")
    (rows, *shape), chunks = bins.shape, bins.chunks
    if (rows, bins.dtype) != (len(row_ids), np.uint8) or chunks != (1, *shape) or len(shape) != 3 or 0 in shape:
        raise ValueError(f"expected bins ({len(row_ids)},T,H,W) in chunks of one row, found {bins.shape} by {chunks}")
    if bins.compression != "gzip" or not bins.fletcher32 or math.prod(shape) > LIMIT:
        raise ValueError(f"expected compressed rows with a checksum, of at most {LIMIT} bytes, found {bins.shape}")
    return shape[0], shape[1], shape[2]


def _inflate(stored: bytes, size: int) -> bytes:
    """The content of a chunk. Raises ValueError if its checksum does not match or it is not of `size` bytes.

    The HDF5 library would inflate any chunk to its end, however large; its checksum is that of the compressed bytes.
    """
    data, checksum = stored[:-4], stored[-4:]
    if _fletcher32(data) != tuple(int(n) % 65535 for n in np.frombuffer(checksum, "<u2")):
        raise ValueError("checksum mismatch")
    inflate = zlib.decompressobj()
    try:
        content = inflate.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(content) != size or not inflate.eof:
        raise ValueError(f"expected {size} bytes, found {'more' if len(content) > size else len(content)}")
    return content


def _fletcher32(data: bytes) -> tuple[int, int]:
    """HDF5's Fletcher-32: the sum of the 16-bit words, and the sum of all sums on the way, modulo 65535."""
    words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2").astype(np.uint64)
    sums = np.cumsum(words) % 65535
    return int(sums[-1]) if len(sums) else 0, int(sums.sum() % 65535)
