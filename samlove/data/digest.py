"""Digests: of a folder, of the sources of a feature store's items, of rows of the index, and of code.

The index stage writes one digest of the dataset's media and one of its masks, and later stages depend on these files.
DVC therefore walks the dataset (a hundred thousand files in Ref-AVS) for one stage and not for a dozen.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

ROW = {"row_id": str, "media_id": str, "fid": int, "exp": str, "null": bool}  # the columns that say what a row asks for
IDLE_MODULES = ("samlove.config", "samlove.device", "samlove.errors")  # no computed value depends on these


def folder_digest(folder: Path) -> str:
    """SHA-256 (hex) of the relative paths and contents of all files below `folder`, sorted by path.

    A missing folder has the digest of an empty one; `folder` itself may be a link.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    whole = hashlib.sha256()
    with ThreadPoolExecutor() as pool:  # hashing and reading release the GIL
        for path, content in zip(paths, pool.map(_file_digest, paths), strict=True):
            whole.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return whole.hexdigest()


def source_ids(sources: Mapping[str, Any]) -> dict[str, str]:
    """For each source (a text, a path or a list of paths), 32 hex digits that change with the text or the files' bytes.

    File names and times do not matter. An empty string if a file cannot be read.
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
                digests[part] = digests.get(part) or _file_digest(part)  # a short video repeats its last frame
            except OSError:
                return ""
            whole.update(digests[part].encode())
    return whole.hexdigest()[:32]


def rows_digest(rows: pd.DataFrame) -> str:
    """SHA-256 (hex) of what rows of expressions.parquet ask for (the columns in ROW); their order does not matter."""
    lines = [json.dumps([kind(row[name]) for name, kind in ROW.items()]) for row in rows[list(ROW)].to_dict("records")]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


@cache  # of the code that this process has imported, whatever becomes of the files
def code_digest(cls: type) -> str:
    """32 hex digits that change with the source of the module of `cls` and of the samlove modules that it imports.

    IDLE_MODULES do not count.
    """
    modules: set[str] = set()
    todo = [cls.__module__]
    while todo:
        name = todo.pop()
        if name not in modules:
            modules.add(name)
            todo += (n for n in _imported(_source(name)) if n.startswith("samlove.") and n not in IDLE_MODULES)
    return hashlib.sha256(repr(sorted(source_digests(modules).items())).encode()).hexdigest()[:32]


def source_digests(modules: Iterable[str]) -> dict[str, str]:
    """SHA-256, as hex, of the source of each module, by the module's name."""
    return {name: hashlib.sha256(_source(name)).hexdigest() for name in modules}


def _source(module: str) -> bytes:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin).read_bytes()


def _imported(source: bytes) -> Iterator[str]:
    """Imported names; not all of them are modules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
