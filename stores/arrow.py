"""Reads the Arrow IPC files that stores.table writes: one schema, then one uncompressed record batch without nulls.

pyarrow maps such files too, but version 26 crashes on some damaged ones. Their headers are flatbuffers: a table is a
list of places of its fields, relative to itself. Here every place is checked before it is used.
See https://arrow.apache.org/docs/format/Columnar.html and Message.fbs and Schema.fbs in Arrow's repository.
"""

from typing import NamedTuple

MAGIC = b"ARROW1\0\0"
_CONTINUES = 0xFFFFFFFF  # precedes the length of each message
_SCHEMA, _BATCH = 1, 3  # kinds of messages
_INT, _BUFFERS = 2, {2: 2, 19: 3, 20: 3}  # number of buffers by the kind of a column: int, large binary, large text
_MOST = 1 << 10  # elements of a vector
_KINDS = {19: "bytes", 20: "text"}


class Column(NamedTuple):
    """kind: such as "int32" or "uint32", or "text" or "bytes". numbers: of a text column, where its texts end."""

    kind: str
    numbers: memoryview
    texts: memoryview


class Batch(NamedTuple):
    rows: int
    metadata: dict[bytes, bytes]
    columns: dict[str, Column]


def read_batch(file: memoryview) -> Batch:
    """The only record batch of a file; its buffers are views of `file`.

    Raises ValueError if the file is damaged or of another form. A buffer may be shorter than its column.
    """
    if bytes(file[: len(MAGIC)]) != MAGIC:
        raise ValueError("not an Arrow IPC file")
    schema, _, end = _message(file, len(MAGIC), _SCHEMA)
    batch, body, end = _message(file, end, _BATCH)
    if (_number(file, end, 4), _number(file, end + 4, 4)) != (_CONTINUES, 0):
        raise ValueError("expected one record batch, found more")
    if schema.has(0) or batch.has(3):
        raise ValueError("expected little-endian numbers and no compression")
    nodes, buffers = batch.structs(1), batch.structs(2)
    rows, columns = batch.number(0, 8), {}
    for field in schema.tables(1):
        kind = field.number(2, 1)
        count = _BUFFERS.get(kind)
        if count is None or field.has(4) or len(nodes) == 0 or len(buffers) < count:
            raise ValueError(f"a column of kind {kind}")
        if nodes.pop(0) != (rows, 0):
            raise ValueError(f"a column of other than {rows} rows, or with nulls")
        if kind == _INT:
            bits, signed = field.table(3).number(0, 4), field.table(3).number(1, 1)
        name = field.text(0).decode()
        parts = [_part(body, *buffers.pop(0)) for _ in range(count)]
        columns[name] = Column(
            _KINDS.get(kind) or f"{'' if signed else 'u'}int{bits}", parts[1], parts[2] if count == 3 else parts[1][:0]
        )
    if nodes or buffers:
        raise ValueError("more values than columns")
    metadata = {pair.text(0): pair.text(1) for pair in schema.tables(2)}
    return Batch(rows, metadata, columns)


def _message(file: memoryview, at: int, kind: int) -> tuple["_Table", memoryview, int]:
    """The header and the body of the message at a place, and its end."""
    size = _number(file, at + 4, 4)
    if _number(file, at, 4) != _CONTINUES:
        raise ValueError(f"no message at byte {at}")
    flat = _part(file, at + 8, size)
    message = _Table(flat, _number(flat, 0, 4))
    if message.number(1, 1) != kind:
        raise ValueError(f"expected a message of kind {kind}, found {message.number(1, 1)}")
    start, length = at + 8 + size, message.number(3, 8)
    return message.table(2), _part(file, start, length), start + length


def _part(data: memoryview, start: int, size: int) -> memoryview:
    if not 0 <= start <= start + size <= len(data):
        raise ValueError(f"bytes {start} to {start + size} of {len(data)}")
    return data[start : start + size]


def _number(data: memoryview, start: int, size: int) -> int:
    """An unsigned number; signed ones of the format are never negative in a valid file."""
    return int.from_bytes(_part(data, start, size), "little")


class _Table:
    """A table of a flatbuffer. Fields are numbered as in the format's schema; a missing number is 0."""

    def __init__(self, data: memoryview, start: int) -> None:
        self._data, self._start = data, start
        self._fields = start - int.from_bytes(_part(data, start, 4), "little", signed=True)
        self._end = _number(data, self._fields, 2)  # of the list of fields

    def _place(self, field: int) -> int:
        entry = 4 + 2 * field
        offset = _number(self._data, self._fields + entry, 2) if entry < self._end else 0
        return self._start + offset if offset else 0

    def has(self, field: int) -> bool:
        return bool(self._place(field))

    def number(self, field: int, size: int) -> int:
        place = self._place(field)
        return _number(self._data, place, size) if place else 0

    def _target(self, field: int) -> int:
        """The place to which a field refers."""
        if not (place := self._place(field)):
            raise ValueError(f"field {field} of a header is missing")
        return place + _number(self._data, place, 4)

    def table(self, field: int) -> "_Table":
        return _Table(self._data, self._target(field))

    def text(self, field: int) -> bytes:
        start = self._target(field)
        return bytes(_part(self._data, start + 4, _number(self._data, start, 4)))

    def _vector(self, field: int, size: int) -> list[int]:
        """The places of the elements of a vector; [] if it is missing."""
        if not self.has(field):
            return []
        start = self._target(field)
        count = _number(self._data, start, 4)
        if count > _MOST:
            raise ValueError(f"{count} parts of a header")
        _part(self._data, start + 4, count * size)
        return [start + 4 + i * size for i in range(count)]

    def tables(self, field: int) -> list["_Table"]:
        return [_Table(self._data, place + _number(self._data, place, 4)) for place in self._vector(field, 4)]

    def structs(self, field: int) -> list[tuple[int, int]]:
        """The elements of a vector of pairs of 64-bit numbers."""
        return [(_number(self._data, p, 8), _number(self._data, p + 8, 8)) for p in self._vector(field, 16)]
