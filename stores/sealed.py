"""HDF5 files: one that contains a checksum of its own bytes, the check of a file from elsewhere, and a handle.

The file begins with HDF5's user block, which HDF5 itself does not use. The block holds a JSON line with the size of
the whole file and the crc32c of everything after the block, then zeros.

An HDF5 file can refer to other files, load plugins, and claim any size. `open_checked` accepts only what this package
writes: a tree of groups and of datasets of numbers or texts, each stored in the file itself, at its full size.
"""

import faulthandler
import os
import resource
import signal
import warnings
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import h5py
import psutil
from h5py import h5d, h5g, h5l, h5o, h5t, h5z

from stores.fingerprint import canonical_json, parse_json
from stores.manifest import crc32c_file, identity, refuse_replaced

USER_BLOCK = 512  # bytes, the smallest that HDF5 allows
# The exceptions that h5py raises, depending on the place, if bytes are damaged.
BROKEN = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, MemoryError)
DAMAGED = "its bytes do not match its checksum"
MAGIC = b"\x89HDF\r\n\x1a\n"  # the signature that follows the user block
DEFLATED = "/bins"  # the one dataset that may be compressed: PredictionReader inflates it itself, up to a bound
CHECK_SECONDS = 600  # of computing; a check takes 0.1 ms per object
CHECK_MEMORY = 1 << 28  # bytes, besides those of the file; opening a file of 8 KB can take gigabytes
_TEXT_REFERENCE = 16  # bytes that a dataset stores for each text of variable length; the text itself is elsewhere
_CHECKSUM = 4  # bytes at the end of a chunk
_DEPTH = 16  # groups within groups; an exported store has 4


def create(path: Path) -> h5py.File:
    """A new file with room for its seal; overwrites a file that a killed run left."""
    # No lock, here and on reading: some file systems have none, and no file is written under its final name.
    return h5py.File(path, "w", userblock_size=USER_BLOCK, locking=False)


def open_checked(path: Path) -> h5py.File:
    """Open a file for reading, after a check of every object in it.

    Raises ValueError if it is not HDF5, is damaged, or holds anything that this package does not write: links other
    than the one to each object, external or virtual storage, other types than bool, int, float and text, filters, or
    datasets larger than their bytes in the file.
    """
    if fault := _fault_in_child(path):
        raise ValueError(fault)
    return h5py.File(path, "r", locking=False)


def _fault_in_child(path: Path) -> str:
    """As `_fault`, in a child process: on a damaged file, the HDF5 library can crash, or run forever."""
    results, child_end = os.pipe()
    with warnings.catch_warnings():  # the child needs no lock but that of h5py, which h5py holds during a fork
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            faulthandler.disable()  # the parent reports a crash
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            _limit(resource.RLIMIT_CPU, CHECK_SECONDS)
            _limit(resource.RLIMIT_AS, psutil.Process().memory_info().vms + CHECK_MEMORY + path.stat().st_size)
            os.write(child_end, _fault(path)[:1000].encode(errors="replace"))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(child_end)
    with open(results, "rb") as pipe:
        fault = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"the HDF5 library cannot read it: {signal.strsignal(os.WTERMSIG(status))}"
    return fault or ("the check of its structure failed" if status else "")


def _limit(what: int, value: int) -> None:
    _, most = resource.getrlimit(what)
    with suppress(ValueError, OSError):  # not every system limits the address space
        resource.setrlimit(what, (min(value, most % 2**63), most))  # -1 stands for no limit


def _fault(path: Path) -> str:
    """What is wrong with the structure of a file; empty if nothing is."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            _check_objects(file, path.stat().st_size)
    except BROKEN as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _check_objects(file: h5py.File, size: int) -> None:
    """Walk the tree by its links, none of which is followed before it is checked."""
    root = h5g.open(file.id, b"/")
    room, seen, groups = size, {h5o.get_info(root).addr}, [("", root)]
    while groups:
        where, group = groups.pop()
        for name in group:
            place = f"{where}/{name.decode(errors='backslashreplace')}"
            if b"/" in name or name in (b".", b"..") or place.count("/") > _DEPTH:  # HDF5 would read it as a path
                raise ValueError(f"{place!r}: expected a plain name, at most {_DEPTH} groups deep")
            if group.links.get_info(name).type != h5l.TYPE_HARD:
                raise ValueError(f"{place}: a link by path; it may point outside the file")
            item = h5o.open(group, name)
            if (address := h5o.get_info(item).addr) in seen:
                raise ValueError(f"{place}: linked more than once")
            seen.add(address)
            if isinstance(item, h5g.GroupID):
                groups.append((place, item))
            elif isinstance(item, h5d.DatasetID):
                room -= _stored_bytes(place, item, size)
            else:
                raise ValueError(f"{place}: neither a group nor a dataset")
    if room < 0:
        raise ValueError(f"its datasets claim {size - room} bytes, the file has {size}")


def _stored_bytes(place: str, dataset: h5d.DatasetID, size: int) -> int:
    """The bytes of a dataset in its file of `size` bytes, after a check of its type, layout and size."""
    kind = dataset.get_type()
    known = kind.get_class() in (h5t.INTEGER, h5t.FLOAT, h5t.STRING)
    boolean = kind.get_class() == h5t.ENUM and kind.get_nmembers() == 2
    if not (known or boolean) or kind.committed():
        raise ValueError(f"{place}: expected bool, int, float or text")
    layout = dataset.get_create_plist()
    filters = tuple(layout.get_filter(i)[0] for i in range(layout.get_nfilters()))
    deflated = filters == (h5z.FILTER_DEFLATE, h5z.FILTER_FLETCHER32) and place == DEFLATED
    if filters not in ((), (h5z.FILTER_FLETCHER32,)) and not deflated:
        raise ValueError(f"{place}: expected no filter but a checksum, found filters {filters}")
    if layout.get_external_count() or layout.get_layout() not in (h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED):
        raise ValueError(f"{place}: its values are outside the file or in another dataset")
    text = isinstance(kind, h5t.TypeStringID) and kind.is_variable_str()
    itemsize = _TEXT_REFERENCE if text else kind.get_size()
    if layout.get_layout() != h5d.CHUNKED:
        stored = dataset.get_storage_size()
        if stored != prod(dataset.shape) * itemsize or (dataset.get_offset() or 0) + stored > size:
            raise ValueError(f"{place}: expected {dataset.shape} values within {size} bytes, found {stored} bytes")
        return stored
    chunk = layout.get_chunk()
    count = prod(-(-length // part) for length, part in zip(dataset.shape, chunk, strict=True))
    content = prod(chunk) * itemsize
    if count * (1 if deflated else content) > size:
        raise ValueError(f"{place}: {dataset.shape} in chunks of {chunk} do not fit in {size} bytes")
    expected = content + _CHECKSUM * (h5z.FILTER_FLETCHER32 in filters)
    number = stored = 0

    def check(found: h5d.StoreInfo) -> None:
        nonlocal number, stored
        fits = found.size >= _CHECKSUM if deflated else found.size == expected
        if not fits or found.filter_mask or found.byte_offset + found.size > size:
            raise ValueError(f"{place}: expected chunks of {expected} bytes, found {found}")
        number, stored = number + 1, stored + found.size

    dataset.chunk_iter(check)
    if number != count:
        raise ValueError(f"{place}: expected {count} chunks, found {number}")
    return stored


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
        size = parse_json(block.rstrip(b"\0"))["bytes"]
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
        self._checked = False  # once for all processes: the file may not change
        self._file: h5py.File | None = None
        self._owner = -1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_owner": -1}

    def open(self) -> h5py.File:
        """The open file. Raises one of BROKEN if `open_checked` does, SamloveError if the file was replaced."""
        if self._owner != os.getpid() or self._file is None:
            file = h5py.File(self.path, "r", locking=False) if self._checked else open_checked(self.path)
            refuse_replaced(self.path, self._identity)
            self._file, self._owner, self._checked = file, os.getpid(), True
        return self._file
