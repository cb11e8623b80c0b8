"""The small JSON file beside every artefact that says what it is and what made it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samlove.errors import RequestError, SamloveError
from stores.fingerprint import canonical_json
from stores.remote import AnyPath

SCHEMA = 1  # version of the layouts in this package
NAME = "manifest.json"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a dict readably, with sorted keys: equal dicts give equal bytes."""
    text = json.dumps(json.loads(canonical_json(value)), indent=1, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: AnyPath, remedy: str) -> dict[str, Any]:
    """The manifest of the artefact in `folder`.

    Raises RequestError where there is none, SamloveError where it is torn or of another schema.
    """
    path = folder / NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:
        raise SamloveError(f"{path}: cannot be read ({error}); {remedy}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise SamloveError(f"{path}: expected schema {SCHEMA}, found {found}; {remedy}")
    return manifest


def replace_folder(new: Path, path: Path) -> None:
    """Rename `new` to `path`; a folder already there is renamed away first and then removed, never edited."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = new.with_name(new.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)
