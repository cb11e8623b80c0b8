"""Tar members of WebDataset shards: their names, and the location of their arrays' bytes.

A member is `{key}.{name}.npy` or `{key}.{name}.json`; for webdataset, the key ends at the first dot. `escape_key`
percent-encodes keys, so that any text can be a key; a comment in the tar's global header marks such files.
Reading trusts nothing: it refuses pickles, object arrays, names outside the folder and sizes that do not fit.
"""

import io
import math
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any
from urllib.parse import quote, unquote

import numpy as np

from samlove.errors import SamloveError
from stores.remote import AnyPath

ESCAPED = "percent-encoded keys"  # comment in tar files whose keys `escape_key` encoded
BLOCK = 512  # bytes; tar's unit: the data of every member is aligned to it
KINDS = "biuf"  # numpy kinds that can be stored: bool, int, uint, float
_HEADERS = 64  # entries in the extended headers of one member
_DIMENSIONS = 32  # the limit of NumPy 1
_NPY_HEADER = 1 << 14  # bytes of an npy file to parse as its header; NumPy refuses more than 10,000
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # key, extension: split as in webdataset
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


def escape_key(key: str) -> str:
    """A key as ASCII without dots, slashes, spaces or control characters; `unquote` restores it exactly.

    Raises SamloveError if the key is empty or cannot be encoded as UTF-8.
    """
    try:
        escaped = quote(key, safe="").replace(".", "%2E")
    except UnicodeEncodeError:
        raise SamloveError(f"key {key!r}: expected text that can be encoded as UTF-8") from None
    if not escaped:
        raise SamloveError("expected a key, found an empty string")
    return escaped


def check_name(name: str) -> str:
    """Returns an array's name unchanged; SamloveError if webdataset would change it (it lowercases, splits at dots)."""
    if not _NAME.fullmatch(name):
        raise SamloveError(f"array name {name!r}: expected lower-case letters, digits and _, and no _ at the start")
    return name


def scan_tar(path: AnyPath) -> list[dict[str, Any]]:
    """The samples of one tar, in order: {"key": str, "members": {name: place}}.

    A place says where a member's data is: {"offset", "dtype", "shape", "order"} for an array, {"offset", "size"} for a
    JSON text. Raises SamloveError, naming tar and member, if there is anything that a shard must not contain.
    """
    samples: list[dict[str, Any]] = []
    seen: set[str] = set()
    if not path.is_file():  # opening a pipe would wait for a writer
        raise SamloveError(f"{path}: expected a tar file, found none")
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - BLOCK))
        if size < 2 * BLOCK or size % BLOCK or any(file.read()):
            raise SamloveError(f"{path}: truncated: expected a tar to end in two empty blocks, found {size} bytes")
        for member, escaped in _members(path, file, size):
            key, name, kind = _split(path, member, size)
            key = unquote(key) if escaped else key
            if not samples or samples[-1]["key"] != key:
                if key in seen:
                    raise SamloveError(f"{path}: the members of {key!r} are not contiguous")
                seen.add(key)
                samples.append({"key": key, "members": {}})
            if name in samples[-1]["members"]:
                raise SamloveError(f"{path}: {member.name!r} occurs twice")
            where = f"{path}: {member.name!r}"
            samples[-1]["members"][name] = (
                {"offset": member.offset_data, "size": member.size} if kind == "json" else _npy(file, member, where)
            )
    return samples


class _Forward:
    """The part of a file's interface that tarfile reads with. Never reads more than there is, nor goes back.

    The size of a member can be any number, also a negative one, with which tarfile goes round in circles.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        return self._file.read(max(0, min(size, self._size - self._file.tell())))

    def seek(self, offset: int) -> None:
        if not self._file.tell() <= offset <= self._size:
            raise ValueError(f"a member that ends at byte {offset} of {self._size}")
        self._file.seek(offset)


def _members(path: AnyPath, file: IO[bytes], size: int) -> Iterator[tuple[tarfile.TarInfo, bool]]:
    """The members of a tar of `size` bytes, each with whether its key is escaped.

    Raises SamloveError if the tar is damaged, or goes on after its end: tarfile ends at the first invalid header.
    """
    file.seek(0)
    source = _Forward(file, size)
    try:
        tar = tarfile.TarFile(fileobj=source)  # type: ignore[arg-type]
        while member := tar.next():
            if len(member.pax_headers) > _HEADERS:  # each member has a copy of those of the whole tar
                raise ValueError(f"{len(member.pax_headers)} extended headers for {member.name!r}")
            tar.members.clear()  # type: ignore[attr-defined]  # so that they do not add up
            place = file.tell()
            yield member, tar.pax_headers.get("comment") == ESCAPED
            file.seek(place)
        file.seek(tar.offset)
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise ValueError(f"no member and not the end at byte {tar.offset}")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise SamloveError(f"{path}: not a complete uncompressed tar ({error})") from None


def _split(path: AnyPath, member: tarfile.TarInfo, size: int) -> tuple[str, str, str]:
    """Key, name and extension of a member. Raises SamloveError if it must not be read."""
    parts = PurePosixPath(member.name)
    match = _MEMBER.fullmatch(member.name)
    if parts.is_absolute() or ".." in parts.parts or not match or not _is_utf8(member.name):
        raise SamloveError(f"{path}: {member.name!r}: expected KEY.NAME.npy or .json inside the folder, in UTF-8")
    if not member.isreg() or member.issparse():
        raise SamloveError(f"{path}: {member.name!r}: expected a plain file, found a link, folder or special file")
    if member.size < 0:
        raise SamloveError(f"{path}: {member.name!r}: expected a size, found {member.size}")
    if member.offset_data + member.size > size:
        end = member.offset_data + member.size
        raise SamloveError(f"{path}: truncated: {member.name!r} ends at byte {end}, the file at {size}")
    key, extension = match.groups()
    name, _, kind = extension.rpartition(".")
    if kind not in ("npy", "json"):
        raise SamloveError(f"{path}: {member.name!r}: expected .npy or .json; nothing else is read, pickles never")
    return key, name or kind, kind


def _is_utf8(name: str) -> bool:
    """Whether the bytes of a name that tarfile decoded are UTF-8; it makes surrogates of those that are not."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _npy(file: IO[Any], member: tarfile.TarInfo, where: str) -> dict[str, Any]:
    """The place of an npy member's array; its header is parsed as a literal, never evaluated."""
    file.seek(member.offset_data)
    header = io.BytesIO(file.read(min(member.size, _NPY_HEADER)))
    try:
        version = np.lib.format.read_magic(header)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"npy version {version}")
        shape, fortran, dtype = readers[version](header)
    except Exception as error:  # of a dozen unrelated types: NumPy passes the text on to Python's parser
        raise SamloveError(f"{where}: not an npy array ({' '.join(str(error).split())})") from None
    if dtype.kind not in KINDS:
        raise SamloveError(f"{where}: expected bool, int or float numbers, found dtype {dtype.str!r}")
    offset, limit = member.offset_data + header.tell(), member.offset_data + member.size
    end = offset + math.prod(shape) * dtype.itemsize
    # An empty array may have any other lengths, but NumPy refuses those whose product overflows.
    fits = math.prod(max(length, 1) for length in shape) * dtype.itemsize <= sys.maxsize and len(shape) <= _DIMENSIONS
    if min(shape, default=0) < 0 or end > limit or not fits:
        raise SamloveError(f"{where}: expected an array within {member.size} bytes, found {dtype.str} {shape}")
    if end != limit:
        raise SamloveError(f"{where}: expected {end - member.offset_data} bytes by its header, found {member.size}")
    return {"offset": offset, "dtype": dtype.str, "shape": list(shape), "order": "F" if fortran else "C"}
