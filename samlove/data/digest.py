"""One line that stands for the content of a folder, of what an item of a feature store is computed from, of rows of the
index, or of code.

The index stage writes one for the data set's media and one for its masks, and later stages depend on these lines:
DVC then walks the folder, a hundred thousand files in Ref-AVS, for one stage and not for a dozen.
"""

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

ROW = {"row_id": str, "media_id": str, "fid": int, "exp": str, "null": bool}  # what is asked for in a row of the index
IDLE_MODULES = ("samlove.config", "samlove.device", "samlove.errors")


def folder_digest(folder: Path) -> str:
    """SHA-256, as hex, over the relative paths and the contents of all files below `folder`, in order of path.

    A folder that is not there has the digest of an empty one; `folder` itself may be a link.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    whole = hashlib.sha256()
    with ThreadPoolExecutor() as pool:  # hashing and reading leave other threads their turn
        for path, content in zip(paths, pool.map(_file_digest, paths), strict=True):
            whole.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return whole.hexdigest()


def source_ids(sources: Mapping[str, Any]) -> dict[str, str]:
    """32 hex digits for each source, a text, a path or a list of paths, that change with the text or the files' bytes.

    Names and times do not matter. Empty where a file cannot be read: nothing is known of it then.
    """
    with ThreadPoolExecutor() as pool:
        return dict(zip(sources, pool.map(_source_id, sources.values()), strict=True))


def _source_id(source: Any) -> str:
    whole = hashlib.sha256()
    digests: dict[Path, str] = {}
    for part in source if isinstance(source, list) else [source]:
        if isinstance(part, str):
            whole.update(part.encode(errors="surrogatepass"))
        else:
            try:
                digests[part] = digests.get(part) or _file_digest(part)  # a short clip repeats its last frame
            except OSError:
                return ""
            whole.update(digests[part].encode())
    return whole.hexdigest()[:32]


def rows_digest(rows: pd.DataFrame) -> str:
    """SHA-256, as hex, of what rows of expressions.parquet ask for; their order does not matter."""
    lines = [json.dumps([kind(row[name]) for name, kind in ROW.items()]) for row in rows[list(ROW)].to_dict("records")]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def code_digest(cls: type) -> str:
    """32 hex digits that change with the source of the module of `cls` and of all samlove's modules that it imports.

    But for those that no computed value comes from.
    """
    digests: dict[str, str] = {}
    todo = [cls.__module__]
    while todo:
        name = todo.pop()
        spec = find_spec(name)
        if name in digests or spec is None or spec.origin is None:
            continue
        source = Path(spec.origin).read_bytes()
        digests[name] = hashlib.sha256(source).hexdigest()
        todo += (n for n in _imported(source) if n.startswith("samlove.") and n not in IDLE_MODULES)
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()[:32]


def _imported(source: bytes) -> Iterator[str]:
    """Names that may be modules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
