"""What made an artefact: hashes of its inputs, and the refusal of one that was made otherwise.

A fingerprint is a flat dict of JSON scalars or lists of them: encoder name, sha256 of the weights,
every preprocessing value, dtype, library versions. Two stores are interchangeable when theirs are equal.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samlove.errors import RequestError, SamloveError
from stores.remote import AnyPath

ABSENT = "absent"  # how a field that one side lacks is shown


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes; RequestError where there is no such file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RequestError(f"{path}: expected a readable file, found: {error.strerror}") from None


def sha256_tree(folder: str | Path) -> str:
    """Hex sha256 over the relative names and bytes of all files below a folder; hidden files are left out."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [p.relative_to(folder).as_posix() for p in files]
    seen = [(n, p) for n, p in zip(names, files, strict=True) if not any(part[0] == "." for part in n.split("/"))]
    if not seen:
        raise RequestError(f"{folder}: expected a folder with files, found none")
    digest = hashlib.sha256()
    for name, path in seen:
        digest.update(f"{name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def canonical_json(value: Mapping[str, Any]) -> str:
    """The one JSON text of a dict: sorted keys, so that equal dicts give equal bytes.

    Raises SamloveError where a value has no JSON form, or NaN or infinity.
    """
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SamloveError(f"a fingerprint or manifest must hold JSON values only: {error}") from None


def fingerprint_id(fingerprint: Mapping[str, Any]) -> str:
    """12 hex digits that stand for a fingerprint, fit for a folder's name."""
    return hashlib.sha256(canonical_json(fingerprint).encode()).hexdigest()[:12]


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields whose values differ, with both; `absent` for one that lacks."""
    pairs = {name: (a.get(name, ABSENT), b.get(name, ABSENT)) for name in sorted({*a, *b})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A fingerprint with the fields of its parts as part.field."""
    fields: dict[str, Any] = {}
    for name, part in value.items():
        fields |= flat(part, f"{prefix}{name}.") if isinstance(part, Mapping) else {prefix + name: part}
    return fields


def check_fingerprint(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str | AnyPath, remedy: str) -> None:
    """Raise SamloveError naming every field that differs, both values, and the command that mends it."""
    found, wanted = json.loads(canonical_json(found)), json.loads(canonical_json(wanted))  # tuples compare as lists
    if faulty := differing(wanted, found):
        faults = "; ".join(f"{k}: expected {expected!r}, found {there!r}" for k, (expected, there) in faulty.items())
        raise SamloveError(f"{where}: made otherwise than asked for ({faults}); to mend it: {remedy}")
