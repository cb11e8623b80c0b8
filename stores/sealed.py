"""An HDF5 file that contains a checksum of its own bytes, and a handle that each process opens for itself.

The file begins with HDF5's user block, which HDF5 itself does not use. The block holds a JSON line with the size of
the whole file and the crc32c of everything after the block, then zeros.
"""

import json
import os
from pathlib import Path
from typing import Any

import h5py

from stores.fingerprint import canonical_json
from stores.manifest import crc32c_file, identity, refuse_replaced

USER_BLOCK = 512  # bytes, the smallest that HDF5 allows
# The exceptions that h5py raises, depending on the place, if bytes are damaged.
BROKEN = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, MemoryError)
DAMAGED = "its bytes do not match its checksum"
MAGIC = b"\x89HDF\r\n\x1a\n"  # the signature that follows the user block


def create(path: Path) -> h5py.File:
    """A new file with room for its seal; overwrites a file that a killed run left."""
    return h5py.File(path, "w", userblock_size=USER_BLOCK)


def seal(path: Path) -> None:
    """Write the checksum of a file that is otherwise complete and closed."""
    block = _expected_seal(path)
    with open(path, "r+b") as file:
        file.write(block)


def _expected_seal(path: Path) -> bytes:
    line = canonical_json({"bytes": path.stat().st_size, "crc32c": crc32c_file(path, start=USER_BLOCK)})
    return f"{line}\n".encode().ljust(USER_BLOCK, b"\0")


def is_hdf5(path: Path) -> bool:
    """Whether a file is HDF5, sealed or not, or was HDF5 before it was damaged."""
    with open(path, "rb") as file:
        block, magic = file.read(USER_BLOCK), file.read(len(MAGIC))
    return block.startswith(MAGIC) or magic == MAGIC or _size(block) is not None


def _size(block: bytes) -> int | None:
    """The size of the whole file according to its seal; None if the block is not a seal."""
    try:
        size = json.loads(block.rstrip(b"\0"))["bytes"]
    except (ValueError, KeyError, TypeError):
        return None
    return size if type(size) is int else None


def damage(path: Path, deep: bool) -> str:
    """What is wrong with an HDF5 file, by its size and, if `deep`, its checksum; empty if nothing is."""
    with open(path, "rb") as file:
        block = file.read(USER_BLOCK)
    if block.startswith(MAGIC):
        return "has no checksum (written by an older version); regenerate it to add one"
    if (size := _size(block)) is None:
        return f"damaged: expected its checksum in the first {USER_BLOCK} bytes, found none"
    if (found := path.stat().st_size) != size:
        return f"expected {size} bytes, found {found}"
    return DAMAGED if deep and _expected_seal(path) != block else ""


class Handle:
    """A read-only file that each process opens for itself, because HDF5 handles do not survive a fork or pickling."""

    def __init__(self, path: Path) -> None:
        self.path, self._identity = path, identity(path)
        self._file: h5py.File | None = None
        self._owner = -1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_owner": -1}

    def open(self) -> h5py.File:
        """The open file. Raises OSError if it cannot be opened, SamloveError if it was replaced."""
        if self._owner != os.getpid() or self._file is None:
            file = h5py.File(self.path, "r")
            refuse_replaced(self.path, self._identity)
            self._file, self._owner = file, os.getpid()
        return self._file
