"""Fingerprints: they describe what an artefact was made from, and artefacts with a different one are refused.

A fingerprint is a flat dict of JSON scalars or lists of them: encoder name, sha256 of the weights,
every preprocessing setting, dtype, library versions. Two stores with equal fingerprints are interchangeable.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from samlove.errors import RequestError, SamloveError, absence
from stores.remote import AnyPath, regular

DEPTH = 64  # of JSON from elsewhere
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)  # of a JSON text, or one without an end
MISSING = "missing"  # shown for a field that only the other fingerprint has


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes. Raises RequestError if the file cannot be read."""
    try:
        with open(regular(Path(path)), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        found = error.strerror or absence(Path(path))
        raise RequestError(f"{path}: expected a readable file, found: {found}") from None


def sha256_tree(folder: str | Path) -> str:
    """Hex sha256 over the relative names and bytes of all files below a folder, except hidden files.

    Raises RequestError if there are none.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [p.relative_to(folder).as_posix() for p in files]
    visible = [(n, p) for n, p in zip(names, files, strict=True) if not any(part[0] == "." for part in n.split("/"))]
    if not visible:
        raise RequestError(f"{folder}: expected a folder with files, found none")
    digest = hashlib.sha256()
    for name, path in visible:
        digest.update(f"{name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def canonical_json(value: Mapping[str, Any]) -> str:
    """A dict as canonical JSON: keys are sorted, so equal dicts give equal bytes.

    Raises SamloveError if a value cannot be stored as JSON; this includes NaN and infinity.
    """
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SamloveError(f"a fingerprint or manifest may contain only JSON values: {error}") from None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text from elsewhere.

    Raises ValueError if it is not JSON, repeats a name in an object, has NaN or infinity (also as 1e999), half of a
    surrogate pair, which UTF-8 cannot encode, or is nested more than DEPTH levels deep: Python fails to read, write or
    compare values that are nested deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError(f"an object with a repeated name among {[name for name, _ in pairs][:5]}")
        return found

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    def finite(number: str) -> float:
        return float(number) if math.isfinite(float(number)) else refuse(number)

    text = text if isinstance(text, str) else text.decode()
    steps = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[][{}]", _STRING.sub("", text)))
    if max(accumulate(steps), default=0) > DEPTH:
        raise ValueError(f"nested more than {DEPTH} levels deep")
    value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def fingerprint_id(fingerprint: Mapping[str, Any]) -> str:
    """12 hex digits that identify a fingerprint and can be used as a folder name."""
    return hashlib.sha256(canonical_json(fingerprint).encode()).hexdigest()[:12]


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields whose values differ, with both values; MISSING stands for the value of a missing field."""
    pairs = {name: (a.get(name, MISSING), b.get(name, MISSING)) for name in sorted({*a, *b})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A fingerprint with its nested fields flattened to part.field."""
    fields: dict[str, Any] = {}
    for name, part in value.items():
        fields |= flat(part, f"{prefix}{name}.") if isinstance(part, Mapping) else {prefix + name: part}
    return fields


def check_fingerprint(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str | AnyPath, remedy: str) -> None:
    """Raise SamloveError if the fingerprints differ, with each field, both values and the command that fixes it."""
    found, wanted = json.loads(canonical_json(found)), json.loads(canonical_json(wanted))  # so that tuples equal lists
    if differences := differing(wanted, found):
        faults = "; ".join(f"{k}: expected {one!r}, found {other!r}" for k, (one, other) in differences.items())
        raise SamloveError(f"{where}: fingerprint mismatch ({faults}); to fix it, run: {remedy}")
