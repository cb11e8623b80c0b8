"""Tar members of WebDataset shards: their names, and where the bytes of their arrays lie.

A member is `{key}.{name}.npy` or `{key}.{name}.json`; webdataset ends the key at the first dot. Keys are
percent-encoded by `escape_key` so that any text is a key; a comment in the tar's global header says so.
Reading trusts nothing: pickles, object arrays, names that leave the folder and sizes that do not fit are refused.
"""

import re
import tarfile
import tokenize
from pathlib import PurePosixPath
from typing import IO, Any
from urllib.parse import quote, unquote

import numpy as np

from samlove.errors import SamloveError
from stores.remote import AnyPath

ESCAPED = "percent-encoded keys"  # comment of tar files whose keys `escape_key` wrote
BLOCK = 512  # bytes; a tar's unit, so that every member's data is aligned to it
KINDS = "biuf"  # numpy kinds that are read: bool, int, uint, float
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # as webdataset splits: key, extension
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


def escape_key(key: str) -> str:
    """A key as ASCII without dots, slashes, spaces or control characters; `unquote` gives it back exactly."""
    try:
        escaped = quote(key, safe="").replace(".", "%2E")
    except UnicodeEncodeError:
        raise SamloveError(f"key {key!r}: expected text that UTF-8 can hold") from None
    if not escaped:
        raise SamloveError("expected a key, found an empty text")
    return escaped


def check_name(name: str) -> str:
    """The array's name, if it is one that webdataset keeps as it is (it lowers case and splits at dots)."""
    if not _NAME.fullmatch(name):
        raise SamloveError(f"array name {name!r}: expected lower-case letters, digits and _, not _ first")
    return name


def scan_tar(path: AnyPath) -> list[dict[str, Any]]:
    """The samples of one tar, in order: {"key": str, "members": {name: place}}.

    A place is {"offset", "dtype", "shape", "order"} of an array's first byte or {"offset", "size"} of a JSON text.
    Raises SamloveError, naming tar and member, on anything a shard must not hold.
    """
    samples: list[dict[str, Any]] = []
    seen: set[str] = set()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - BLOCK))
        if size < 2 * BLOCK or size % BLOCK or any(file.read()):
            raise SamloveError(f"{path}: torn: a tar ends in two empty blocks, this one of {size} bytes does not")
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = tar.getmembers()
                escaped = tar.pax_headers.get("comment") == ESCAPED
        except (tarfile.TarError, ValueError) as error:
            raise SamloveError(f"{path}: not a whole uncompressed tar ({error})") from None
        for member in members:
            key, name, kind = _split(path, member, size)
            key = unquote(key) if escaped else key
            if not samples or samples[-1]["key"] != key:
                if key in seen:
                    raise SamloveError(f"{path}: the members of {key!r} do not lie together")
                seen.add(key)
                samples.append({"key": key, "members": {}})
            if name in samples[-1]["members"]:
                raise SamloveError(f"{path}: {member.name!r} is there twice")
            where = f"{path}: {member.name!r}"
            samples[-1]["members"][name] = (
                {"offset": member.offset_data, "size": member.size} if kind == "json" else _npy(file, member, where)
            )
    return samples


def _split(path: AnyPath, member: tarfile.TarInfo, size: int) -> tuple[str, str, str]:
    """Key, name and extension of a member that may be read."""
    parts = PurePosixPath(member.name)
    match = _MEMBER.fullmatch(member.name)
    if parts.is_absolute() or ".." in parts.parts or not match:
        raise SamloveError(f"{path}: {member.name!r}: expected KEY.NAME.npy or .json inside the folder")
    if not member.isreg() or member.issparse():
        raise SamloveError(f"{path}: {member.name!r}: expected a plain file, found another kind of member")
    if member.offset_data + member.size > size:
        raise SamloveError(f"{path}: torn: {member.name!r} ends at {member.offset_data + member.size}, file at {size}")
    key, extension = match.groups()
    name, _, kind = extension.rpartition(".")
    if kind not in ("npy", "json"):
        raise SamloveError(f"{path}: {member.name!r}: expected .npy or .json; nothing else is read (pickles never)")
    return key, name or kind, kind


def _npy(file: IO[Any], member: tarfile.TarInfo, where: str) -> dict[str, Any]:
    """Where an npy member's array lies; its header is parsed as a literal, never evaluated."""
    file.seek(member.offset_data)
    try:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"npy version {version}")
        shape, fortran, dtype = readers[version](file)
    except (ValueError, SyntaxError, TypeError, RecursionError, tokenize.TokenError) as error:
        raise SamloveError(f"{where}: not an npy array ({' '.join(str(error).split())})") from None
    place: dict[str, Any] = {
        "offset": file.tell(),
        "dtype": dtype.str,
        "shape": list(shape),
        "order": "F" if fortran else "C",
    }
    check_place(place, member.offset_data + member.size, where)
    end = place["offset"] + _bytes(shape, dtype)
    if end != member.offset_data + member.size:
        raise SamloveError(f"{where}: expected {end - member.offset_data} bytes by its header, found {member.size}")
    return place


def _bytes(shape: tuple[int, ...] | list[int], dtype: np.dtype) -> int:
    count = dtype.itemsize
    for length in shape:
        count *= length  # Python's integers do not overflow, as those of np.prod would
    return count


def check_place(place: dict[str, Any], limit: int, where: str) -> None:
    """Raise SamloveError unless the place is a plain array (or text) that ends within `limit` bytes."""
    try:
        if "size" in place:
            end, lengths = place["offset"] + place["size"], [place["offset"], place["size"]]
        else:
            dtype = np.dtype(place["dtype"])
            if dtype.kind not in KINDS or dtype.hasobject or place["order"] not in ("C", "F"):
                raise SamloveError(f"{where}: expected bool, int or float numbers, found dtype {dtype.str!r}")
            end, lengths = place["offset"] + _bytes(place["shape"], dtype), [place["offset"], *place["shape"]]
        fits = all(type(n) is int and n >= 0 for n in lengths) and end <= limit
    except (KeyError, TypeError) as error:
        raise SamloveError(f"{where}: not the place of an array ({type(error).__name__}: {error})") from None
    if not fits:
        raise SamloveError(f"{where}: expected an array within {limit} bytes, found {place}")
