"""Predicted masks of one split in one HDF5 file: probabilities as uint8 bins between given edges.

    row_ids     (n,) utf-8
    bins        (n,T,H,W) uint8; one chunk per row, with gzip and a checksum (fletcher32)
    edges       (E,) float32; bin b holds the probabilities p (sigmoids of mask logits) with edges[b-1] <= p < edges[b]
    attrs       attribute: a JSON text that describes what the file was made from

No pickles. The file is sealed (see stores.sealed).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from samlove.errors import RequestError, SamloveError
from stores.fingerprint import canonical_json
from stores.manifest import SCHEMA
from stores.sealed import BROKEN, Handle, create, seal

REMEDY = "delete the file and run: dvc repro infer"


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
        self._ids: set[str] = set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = create(self._partial)
        self._file.attrs["attrs"] = canonical_json(attrs or {})
        self._file.attrs["schema"] = SCHEMA
        self._file.create_dataset("edges", data=np.asarray(edges, np.float32))
        self._file.create_dataset("row_ids", (0,), h5py.string_dtype(), maxshape=(None,), chunks=(1024,))
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

        Raises SamloveError if the shape or dtype is wrong or a row is repeated.
        """
        if bins.shape != (len(row_ids), *self._shape) or bins.dtype != np.uint8:
            raise SamloveError(
                f"{self.path}: expected bins {(len(row_ids), *self._shape)} uint8, found {bins.shape} {bins.dtype}"
            )
        repeated = self._ids.intersection(row_ids)
        if repeated or len(set(row_ids)) != len(row_ids):
            raise SamloveError(f"{self.path}: expected each row once, found a repeated one in {sorted(row_ids)[:5]}")
        self._ids.update(row_ids)
        start, stop = len(self._ids) - len(row_ids), len(self._ids)
        self._file["row_ids"].resize((stop,))
        self._file["row_ids"][start:stop] = np.array(row_ids, dtype=object)
        self._file["bins"].resize((stop, *self._shape))
        self._file["bins"][start:stop] = bins

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            seal(self._partial)
            self._partial.replace(self.path)
        else:
            self._partial.unlink()


class PredictionReader:
    """A predictions file, read only; each process opens its own handle.

    Raises RequestError if the file does not exist, SamloveError if it is incomplete or has a different schema.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise RequestError(f"{self.path}: no such file; run: dvc repro infer, or: dvc pull")
        self._handle = Handle(self.path)
        try:
            file = self._handle.open()
            self.row_ids: list[str] = [str(row) for row in file["row_ids"].asstr()[:]]
            self.edges: np.ndarray = file["edges"][:]  # (E,) float32
            self.attrs: dict[str, Any] = json.loads(file.attrs["attrs"])
            found = int(file.attrs["schema"])
            self.shape: tuple[int, int, int] = file["bins"].shape[1:]  # T, H, W
        except BROKEN as error:
            raise SamloveError(f"{self.path}: not a complete predictions file ({error}); {REMEDY}") from None
        if found != SCHEMA:
            raise SamloveError(f"{self.path}: expected schema {SCHEMA}, found {found}; {REMEDY}")
        self._index = {row_id: i for i, row_id in enumerate(self.row_ids)}

    def __len__(self) -> int:
        return len(self.row_ids)

    def __contains__(self, row_id: object) -> bool:
        return row_id in self._index

    def read(self, row_id: str) -> np.ndarray:
        """One row's bins (T,H,W) uint8. Raises SamloveError if the file has no such row or its bytes are damaged."""
        if row_id not in self._index:
            raise SamloveError(f"{self.path}: no row {row_id!r} among its {len(self)}; {REMEDY}")
        try:
            return self._handle.open()["bins"][self._index[row_id]]
        except BROKEN as error:
            raise SamloveError(f"{self.path}: row {row_id!r} cannot be read ({error}); {REMEDY}") from None
