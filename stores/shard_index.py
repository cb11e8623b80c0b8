"""The index of a shard set: the keys of the samples, where their arrays are, and their rows.

    index.arrow     a table (stores.table) with one row per sample: key, shard, layout, place, rows, end

`shard` is a number in the order of files.arrow. A layout is a list of members, [name, dtype, order, dimensions] for an
array and [name] for a JSON text. Samples share few layouts; the table's metadata holds them. `place` holds
little-endian int64 numbers, for each member in turn: offset and shape of an array, offset and size of a text. A sample
may have a JSON list called `rows`; the index has a copy of its text, and `end`, the number of rows of all samples up to
and including this one.
"""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from samlove.errors import SamloveError
from stores.remote import AnyPath
from stores.table import BYTES, TEXT, Table, TableWriter
from stores.tar import KINDS, scan_tar

INDEX = "index.arrow"
COLUMNS = {"key": TEXT, "shard": "int32", "layout": "int32", "place": BYTES, "rows": BYTES, "end": "int64"}
ROWS = "rows"
_DTYPE = re.compile(r"[<>|]?[biuf]\d+")  # NumPy would read some other texts as code


# Name, dtype, shape, offset and order of an array. A JSON text has dtype None, and its length in bytes as shape.
Member = tuple[str, np.dtype | None, tuple[int, ...], int, Literal["C", "F"]]


class ShardIndexWriter:
    """Collects the index of a shard set. folder: where to keep it meanwhile, see TableWriter."""

    def __init__(self, folder: Path | None = None) -> None:
        self._table = TableWriter(COLUMNS, sorted_by="key", folder=folder)
        self._layouts: dict[str, int] = {}  # JSON text -> number
        self._rows = 0

    def add(self, key: str, shard: int, places: Mapping[str, Mapping[str, Any]], rows: bytes) -> None:
        """Add a sample. places: as in stores.tar.scan_tar. rows: the text of its member `rows`, or b""."""
        layout: list[list[str | int]] = []
        numbers: list[int] = []
        for name, place in places.items():
            if "size" in place:
                layout.append([name])
                numbers += [place["offset"], place["size"]]
            else:
                layout.append([name, place["dtype"], place["order"], len(place["shape"])])
                numbers += [place["offset"], *place["shape"]]
        found = json.loads(rows) if rows else None
        if isinstance(found, list):
            self._rows += len(found)
        self._table.add(
            key=key,
            shard=shard,
            layout=self._layouts.setdefault(json.dumps(layout), len(self._layouts)),
            place=struct.pack(f"<{len(numbers)}q", *numbers),
            rows=rows if isinstance(found, list) else b"",
            end=self._rows,
        )

    def write(self, path: Path) -> None:
        self._table.write(path, self._metadata())

    def to_bytes(self) -> bytes:
        """The bytes that `write` would write."""
        return self._table.to_bytes(self._metadata())

    def _metadata(self) -> dict[str, Any]:
        return {"layouts": [json.loads(layout) for layout in self._layouts]}


def scan_shards(shards: list[AnyPath]) -> bytes:
    """The index of tar files without one, from the headers of their members.

    Raises SamloveError if a tar is incomplete, holds a member that must not be read, or shares a key with another.
    """
    writer, seen = ShardIndexWriter(), set()
    for number, path in enumerate(shards):
        samples = scan_tar(path)
        with path.open("rb") as file:
            for sample in samples:
                key, places = sample["key"], sample["members"]
                if key in seen:
                    raise SamloveError(f"{path}: key {key!r} is also in another shard")
                seen.add(key)
                place = places.get(ROWS, {})
                file.seek(place.get("offset", 0))
                rows = file.read(place["size"]) if "size" in place else b""
                try:
                    writer.add(key, number, places, rows)
                except (ValueError, RecursionError, struct.error) as error:
                    raise SamloveError(f"{path}: {key!r}: invalid {ROWS} or shape ({error})") from None
    return writer.to_bytes()


class ShardIndex:
    """An index, read only. source: the file, or its bytes. Can be pickled.

    Raises SamloveError if it is damaged; what is read later is checked later, and raises SamloveError, too.
    """

    def __init__(self, source: AnyPath | bytes, remedy: str) -> None:
        self._table = Table(source, COLUMNS, remedy, sorted_by="key")
        self.layouts: list[list[tuple[str, np.dtype | None, Literal["C", "F"], int]]] = []
        try:
            for layout in self._table.metadata["layouts"]:
                self.layouts.append([_member_kind(*member) for member in layout])
        except (KeyError, TypeError, ValueError) as error:
            raise self._table.damaged(f"layouts: {error}") from None
        ends, most = self.row_ends[-1:].tolist(), self._table.size("rows")  # a row has at least a byte of text
        if ends and not 0 <= ends[0] <= most:
            raise self._table.damaged(f"expected at most {most} rows, found {ends[0]}")

    def __len__(self) -> int:
        return len(self._table)

    def keys(self) -> list[str]:
        """All keys, in the order of writing."""
        return list(self._table.texts("key"))

    def key(self, i: int) -> str:
        return self._table.text("key", i)

    def find(self, key: str) -> int | None:
        """The number of the sample with this key; None if there is none."""
        return self._table.find(key)

    def shard(self, i: int) -> int:
        """The number of the shard that holds sample i."""
        return int(self._table.numbers("shard")[i])

    @property
    def row_ends(self) -> np.ndarray:
        """For each sample, the number of rows of all samples up to and including it: int64 (samples,)."""
        return self._table.numbers("end")

    def rows(self, i: int) -> list[Any] | None:
        """The rows of sample i; None if it has none."""
        text = self._table.bytes_at("rows", i)
        try:
            return list(json.loads(text)) if text else None
        except (ValueError, TypeError, RecursionError) as error:
            raise self._table.damaged(f"rows of {self.key(i)!r}: {error}") from None

    def members(self, i: int) -> list[Member]:
        """The members of sample i. Their offsets and shapes are as found in the file, unchecked."""
        place, layout = self._table.bytes_at("place", i), int(self._table.numbers("layout")[i])
        members: list[Member] = []
        start = 0
        try:
            if not 0 <= layout < len(self.layouts):
                raise ValueError(f"layout {layout} of {len(self.layouts)}")
            numbers = struct.unpack(f"<{len(place) // 8}q", place)
            for name, dtype, order, dims in self.layouts[layout]:
                end = start + 1 + dims
                if end > len(numbers):
                    raise ValueError(f"expected at least {end} numbers, found {len(numbers)}")
                members.append((name, dtype, numbers[start + 1 : end], numbers[start], order))
                start = end
        except (ValueError, struct.error) as error:
            raise self._table.damaged(f"place of {self.key(i)!r}: {error}") from None
        return members


def _member_kind(
    name: object, dtype: object = None, order: object = "C", dims: object = 1
) -> tuple[str, np.dtype | None, Literal["C", "F"], int]:
    """A member of a layout. Raises TypeError or ValueError if it is not one."""
    if not isinstance(name, str) or name == "__key__" or order not in ("C", "F") or type(dims) is not int or dims < 0:
        raise ValueError(f"expected a member, found {[name, dtype, order, dims]}")
    if dtype is None:
        return name, None, "C", 1
    kind = np.dtype(dtype if isinstance(dtype, str) and _DTYPE.fullmatch(dtype) else object)
    if kind.kind not in KINDS or kind.hasobject:
        raise ValueError(f"{name}: expected bool, int or float numbers, found dtype {dtype!r}")
    return name, kind, "F" if order == "F" else "C", dims
