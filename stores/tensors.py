"""Tensors by name in one safetensors file. Its header, a JSON object, describes the file and holds its checksum.

safetensors metadata hold only strings, so the header is stored as one JSON text under HEADER_KEY. The text begins with
{"crc32c": "XXXXXXXX": the checksum of the whole file with zeros in place of these eight digits.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from safetensors import SafetensorError, safe_open

from samlove.errors import SamloveError
from stores.fingerprint import parse_json
from stores.manifest import BLOCK, identity, refuse_replaced

HEADER_KEY = "samlove"
_PLACEHOLDER = "0" * 8
_MARK = rb"{\"crc32c\": \""  # precedes the digits: JSON text inside a JSON string
_START = b'{"__metadata__":{"'
_LENGTH = 8  # bytes at the start of the file that hold the length of the safetensors header


def to_metadata(header: Mapping[str, Any]) -> dict[str, str]:
    """safetensors metadata that hold `header`, with a placeholder for the checksum, which `seal` fills in."""
    return {HEADER_KEY: json.dumps({"crc32c": _PLACEHOLDER, **header}, ensure_ascii=False)}


def from_metadata(metadata: Mapping[str, str] | None, path: Path) -> dict[str, Any]:
    """The header, without its checksum, in the safetensors metadata of the file at `path`.

    Raises SamloveError if there is none, or if it is not a JSON object.
    """
    text = (metadata or {}).get(HEADER_KEY)
    if text is None:
        raise SamloveError(f"{path}: expected a checkpoint of samlove, found a safetensors file without its header")
    try:
        header = parse_json(text)
        if not isinstance(header, dict):
            raise ValueError(f"found {type(header).__name__}")
    except ValueError as error:
        raise SamloveError(f"{path}: expected a JSON object as its header ({error}); regenerate the file") from None
    header.pop("crc32c", None)
    return header


def seal(path: Path) -> None:
    """Write the checksum into a file that is otherwise complete, and closed."""
    with open(path, "r+b") as file:
        header = _header_bytes(file)
        place = header.index(_MARK) + len(_MARK)
        file.seek(place)
        file.write(_checksum(path, place).encode())


def _header_bytes(file: Any) -> bytes:
    """The file up to the end of its safetensors header. Raises ValueError if the file is shorter than that."""
    start = file.read(_LENGTH)
    length = int.from_bytes(start, "little")
    size = file.seek(0, 2)
    if len(start) < _LENGTH or length > size - _LENGTH:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    file.seek(0)
    return file.read(_LENGTH + length)


def _checksum(path: Path, place: int) -> str:
    """crc32c, as 8 hex digits, of a file's bytes with _PLACEHOLDER at `place`."""
    with open(path, "rb") as file:
        crc = google_crc32c.value(file.read(place) + _PLACEHOLDER.encode())
        file.seek(place + len(_PLACEHOLDER))
        while block := file.read(BLOCK):
            crc = google_crc32c.extend(crc, block)
    return f"{crc:08x}"


def is_tensors(path: Path) -> bool:
    """Whether a file is in this format; also true for most damaged ones."""
    with open(path, "rb") as file:
        start = file.read(64)
    return start[_LENGTH:].startswith(_START) or HEADER_KEY.encode() in start


def is_sealed(path: Path) -> bool:
    """Whether the file has a checksum; files of older versions have none."""
    with open(path, "rb") as file:
        try:
            return _MARK in _header_bytes(file)
        except ValueError:
            return False


def damage(path: Path, deep: bool) -> str:
    """What is wrong with the bytes of a file, judged by its size or, if `deep`, its checksum; empty if nothing is."""
    with open(path, "rb") as file:
        try:
            header = _header_bytes(file)
            entries = parse_json(header[_LENGTH:])
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            size = len(header) + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            return f"truncated or damaged: its header cannot be read ({error})"
    if (found := path.stat().st_size) != size:
        return f"expected {size} bytes, found {found}"
    if deep and (place := header.find(_MARK)) >= 0:
        place += len(_MARK)
        stored = header[place : place + len(_PLACEHOLDER)].decode(errors="replace")
        if (crc := _checksum(path, place)) != stored:
            return f"expected crc32c {stored}, found {crc}"
    return ""


class TensorReader:
    """The tensors of a file as arrays, read only. Can be pickled: each process opens the file for itself.

    `header`: the header as a dict. Raises SamloveError if the file is damaged or has no such header.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._identity = identity(self.path)
        self._file: Any = None
        file = self._open()
        self.header = from_metadata(file.metadata(), self.path)
        self._keys: list[str] = list(file.keys())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def _open(self) -> Any:
        if self._file is None:
            try:
                file = safe_open(self.path, framework="np")
            except (SafetensorError, OSError) as error:
                raise SamloveError(
                    f"{self.path}: not a complete safetensors file ({error}); regenerate the file"
                ) from None
            refuse_replaced(self.path, self._identity)
            self._file = file
        return self._file

    def keys(self) -> list[str]:
        """The names of all tensors."""
        return list(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, key: str) -> np.ndarray:
        """One tensor. Raises SamloveError if none has this name, or if NumPy has no such dtype or shape."""
        try:
            return self._open().get_tensor(key)
        except (SafetensorError, TypeError, AttributeError, ValueError, MemoryError) as error:
            raise SamloveError(f"{self.path}: no tensor {key!r} that can be read ({error})") from None
