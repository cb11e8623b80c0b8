"""Tables in one Arrow IPC file each, memory-mapped: opening a table takes as long for a million rows as for ten.

A table is a single uncompressed record batch without nulls, so each column is one contiguous array in the file, and all
processes share its pages. Any Arrow reader reads it: `pyarrow.ipc.open_file(path).read_pandas()`.

`Table` reads only files in this form and refuses any other. It trusts none of the numbers in the file: it checks every
position before it uses it.
"""

import json
import mmap
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samlove.errors import SamloveError
from stores.arrow import Column, read_batch
from stores.fingerprint import parse_json
from stores.manifest import identity, refuse_replaced
from stores.remote import AnyPath, regular

INTEGERS = {"int32": "i", "int64": "q", "uint32": "I"}  # column type -> its typecode in `array`
TEXT, BYTES = "text", "bytes"  # the other column types
_TYPES = {TEXT: pa.large_string(), BYTES: pa.large_binary(), **{name: pa.type_for_alias(name) for name in INTEGERS}}
ORDER = "order"  # the column that `sorted_by` adds
_METADATA = b"samlove"  # key of the table's metadata in the schema
_FLUSH = 1 << 16  # rows that a writer holds in memory
_BROKEN = (OSError, ValueError, KeyError, TypeError)  # for a damaged file


class TableWriter:
    """Collects the rows of a table in bounded memory, then writes them.

    columns: {name: "int32", "int64", "uint32", "text" or "bytes"}. sorted_by: a text column that `Table.find` searches.
    folder: where to keep rows until then, in unnamed files; None for the system's temporary folder.
    """

    def __init__(self, columns: Mapping[str, str], sorted_by: str | None = None, folder: Path | None = None) -> None:
        self._sorted_by = sorted_by
        self._rows = 0
        self._columns = {name: _Column(kind, folder) for name, kind in columns.items()}

    def __len__(self) -> int:
        return self._rows

    def add(self, **row: Any) -> None:
        """Append one row: an int, a str or bytes per column.

        Raises SamloveError if a text cannot be encoded as UTF-8, OverflowError if a number does not fit its column.
        """
        for name, column in self._columns.items():
            column.add(row[name])
        self._rows += 1
        if self._rows % _FLUSH == 0:
            for column in self._columns.values():
                column.flush()

    def write(self, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the file; no row can be added any more. metadata: a JSON dict, read back as `Table.metadata`."""
        with pa.OSFile(str(path), "wb") as file:
            self._write(file, metadata)

    def to_bytes(self, metadata: Mapping[str, Any] | None = None) -> bytes:
        """The bytes that `write` would write."""
        with pa.BufferOutputStream() as stream:
            self._write(stream, metadata)
            return stream.getvalue().to_pybytes()

    def _write(self, file: pa.NativeFile, metadata: Mapping[str, Any] | None) -> None:
        arrays = {name: column.finish(self._rows) for name, column in self._columns.items()}
        if self._sorted_by:
            arrays[ORDER] = pc.sort_indices(arrays[self._sorted_by]).cast(pa.int64())
        schema = pa.schema(
            [pa.field(name, values.type, nullable=False) for name, values in arrays.items()],
            {_METADATA: json.dumps(metadata or {}, ensure_ascii=False).encode()},
        )
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.record_batch(list(arrays.values()), schema=schema))


class _Column:
    """The values of one column: the last ones in memory, all others in unnamed temporary files."""

    def __init__(self, kind: str, folder: Path | None) -> None:
        self._kind, self._folder = kind, folder
        self._values = array(INTEGERS.get(kind, "q"), [] if kind in INTEGERS else [0])  # or the ends of the texts
        self._text = bytearray()
        self._end = 0  # of all texts so far
        self._files: list[Any] = []

    def add(self, value: Any) -> None:
        if self._kind == TEXT:
            try:
                value = value.encode()
            except UnicodeEncodeError:
                raise SamloveError(f"{value!r}: expected text that can be encoded as UTF-8") from None
        if self._kind in INTEGERS:
            self._values.append(value)
        else:
            self._text += value
            self._end += len(value)
            self._values.append(self._end)

    def flush(self) -> None:
        if not self._files:
            self._files = [TemporaryFile(dir=self._folder), TemporaryFile(dir=self._folder)]
        self._files[0].write(self._values)
        self._files[1].write(self._text)
        del self._values[:], self._text[:]

    def finish(self, rows: int) -> pa.Array:
        self.flush()
        numbers, text = (_map(file) for file in self._files)
        buffers = [None, numbers] if self._kind in INTEGERS else [None, numbers, text]
        return pa.Array.from_buffers(_TYPES[self._kind], rows, buffers)


def _map(file: Any) -> pa.Buffer:
    """The bytes of an open file."""
    file.flush()
    if not file.seek(0, 2):  # an empty file cannot be mapped
        return pa.py_buffer(b"")
    return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class Table:
    """A table, read only. Can be pickled: each process maps the file for itself.

    source: the file, or its bytes. columns, sorted_by: as in TableWriter; the file must have exactly these columns.
    Raises SamloveError if the file is missing, damaged or in a different form; `remedy` ends the message.
    """

    def __init__(
        self, source: AnyPath | bytes, columns: Mapping[str, str], remedy: str, sorted_by: str | None = None
    ) -> None:
        self._source, self._remedy, self._sorted_by = source, remedy, sorted_by
        self._types = {**columns, **({ORDER: "int64"} if sorted_by else {})}
        self._identity = None if isinstance(source, bytes) else identity(source)
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_numbers", "_texts")}

    def __getattr__(self, name: str) -> Any:
        if name not in ("_numbers", "_texts"):
            raise AttributeError(name)
        self._open()  # in the process that got a pickled table, at its first use
        return self.__dict__[name]

    def _open(self) -> None:
        numbers: dict[str, np.ndarray] = {}
        texts: dict[str, tuple[np.ndarray, memoryview]] = {}
        try:
            batch = read_batch(self._bytes())
            found = {name: column.kind for name, column in batch.columns.items()}
            if found != self._types:
                raise ValueError(f"expected columns {self._types}, found {found}")
            self._rows: int = batch.rows
            self.metadata: dict[str, Any] = dict(parse_json(batch.metadata[_METADATA]))
            for name, column in batch.columns.items():
                values = self._values(name, column)
                if column.kind in INTEGERS:
                    numbers[name] = values
                else:
                    texts[name] = values, column.texts
        except _BROKEN as error:
            raise self.damaged(f"{type(error).__name__}: {error}") from None
        self._numbers, self._texts = numbers, texts

    def _bytes(self) -> memoryview:
        if isinstance(self._source, bytes):
            return memoryview(self._source)
        with regular(self._source).open("rb") as file:
            mapped = _map(file)
        refuse_replaced(self._source, self._identity)
        return memoryview(mapped)

    def _values(self, name: str, column: Column) -> np.ndarray:
        """The numbers of a column, or the ends of its texts. Raises ValueError if there are fewer than rows."""
        dtype, count = (column.kind, self._rows) if column.kind in INTEGERS else ("int64", self._rows + 1)
        size = count * np.dtype(dtype).itemsize
        if len(column.numbers) < size:
            raise ValueError(f"column {name}: expected {size} bytes, found {len(column.numbers)}")
        return np.frombuffer(column.numbers[:size], dtype)

    def damaged(self, reason: str) -> SamloveError:
        """An error that names the file."""
        where = "the index" if isinstance(self._source, bytes) else self._source
        return SamloveError(f"{where}: not a complete table ({' '.join(reason.split())}); {self._remedy}")

    def __len__(self) -> int:
        return self._rows

    def numbers(self, name: str) -> np.ndarray:
        """An integer column: a read-only view (rows,). Its values are as found in the file, unchecked."""
        return self._numbers[name]

    def size(self, name: str) -> int:
        """The bytes of all values of a text or bytes column."""
        return len(self._texts[name][1])

    def bytes_at(self, name: str, row: int) -> bytes:
        """The value of a text or bytes column in one row. Raises SamloveError if it is not inside the file."""
        ends, data = self._texts[name]
        start, end = int(ends[row]), int(ends[row + 1])
        if not 0 <= start <= end <= len(data):
            raise self.damaged(f"column {name}, row {row}: bytes {start} to {end} of {len(data)}")
        return bytes(data[start:end])

    def text(self, name: str, row: int) -> str:
        """The value of a text column in one row. Raises SamloveError if it is not UTF-8 inside the file."""
        try:
            return self.bytes_at(name, row).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"column {name}, row {row}: {error}") from None

    def texts(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """The values of a text column, in order."""
        return (self.text(name, row) for row in range(start, len(self) if stop is None else stop))

    def find(self, value: str) -> int | None:
        """The row with this value in the column that the table is sorted by; None if there is none."""
        assert self._sorted_by
        try:
            wanted = value.encode()
        except UnicodeEncodeError:
            return None
        name, order = self._sorted_by, self._numbers[ORDER]
        place = bisect_left(range(len(order)), wanted, key=lambda i: self.bytes_at(name, self._row(order[i])))
        if place == len(order) or self.bytes_at(name, row := self._row(order[place])) != wanted:
            return None
        return row

    def _row(self, row: Any) -> int:
        if not 0 <= row < self._rows:
            raise self.damaged(f"column {ORDER}: row {row} of {self._rows}")
        return int(row)
