"""Tar members of WebDataset shards: their names, and the location of their arrays' bytes.

A member is `{key}.{name}.npy` or `{key}.{name}.json`; for webdataset, the key ends at the first dot. `escape_key`
percent-encodes keys, so that any text can be a key; a comment in the tar's global header marks such files.
Reading trusts nothing: it refuses pickles, object arrays, names outside the folder and sizes that do not fit.
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

ESCAPED = "percent-encoded keys"  # comment in tar files whose keys `escape_key` encoded
BLOCK = 512  # bytes; tar's unit: the data of every member is aligned to it
KINDS = "biuf"  # numpy kinds that can be stored: bool, int, uint, float
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
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - BLOCK))
        if size < 2 * BLOCK or size % BLOCK or any(file.read()):
            raise SamloveError(f"{path}: truncated: expected a tar to end in two empty blocks, found {size} bytes")
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = tar.getmembers()
                escaped = tar.pax_headers.get("comment") == ESCAPED
        except (tarfile.TarError, ValueError) as error:
            raise SamloveError(f"{path}: not a complete uncompressed tar ({error})") from None
        for member in members:
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


def _split(path: AnyPath, member: tarfile.TarInfo, size: int) -> tuple[str, str, str]:
    """Key, name and extension of a member. Raises SamloveError if it must not be read."""
    parts = PurePosixPath(member.name)
    match = _MEMBER.fullmatch(member.name)
    if parts.is_absolute() or ".." in parts.parts or not match:
        raise SamloveError(f"{path}: {member.name!r}: expected KEY.NAME.npy or .json inside the folder")
    if not member.isreg() or member.issparse():
        raise SamloveError(f"{path}: {member.name!r}: expected a plain file, found a link, folder or special file")
    if member.offset_data + member.size > size:
        end = member.offset_data + member.size
        raise SamloveError(f"{path}: truncated: {member.name!r} ends at byte {end}, the file at {size}")
    key, extension = match.groups()
    name, _, kind = extension.rpartition(".")
    if kind not in ("npy", "json"):
        raise SamloveError(f"{path}: {member.name!r}: expected .npy or .json; nothing else is read, pickles never")
    return key, name or kind, kind


def _npy(file: IO[Any], member: tarfile.TarInfo, where: str) -> dict[str, Any]:
    """The place of an npy member's array; its header is parsed as a literal, never evaluated."""
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
        count *= length  # Python integers do not overflow, unlike np.prod
    return count


def check_place(place: dict[str, Any], limit: int, where: str) -> None:
    """Raise SamloveError unless `place` is that of a numeric array or a text and ends within `limit` bytes."""
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
        raise SamloveError(f"{where}: not a valid place of an array ({type(error).__name__}: {error})") from None
    if not fits:
        raise SamloveError(f"{where}: expected an array within {limit} bytes, found {place}")
