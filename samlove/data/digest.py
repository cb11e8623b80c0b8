"""Digests: of a folder, of the sources of a feature store's items, of rows of the index, and of code.

The index stage writes one digest of the dataset's media and one of its masks, and later stages depend on these files.
DVC therefore walks the dataset (a hundred thousand files in Ref-AVS) for one stage and not for a dozen.
"""

import ast
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from tqdm import tqdm

from samlove.data.hashes import FileHashes

ROW = {"row_id": str, "media_id": str, "fid": int, "exp": str, "null": bool}  # the columns that say what a row asks for
IDLE_MODULES = ("samlove.config", "samlove.device", "samlove.errors")  # no computed value depends on these
CHUNK, AHEAD = 16, 64  # files or sources that a thread hashes at a time; such parts at a time
DELAY_S = 2.0  # no progress bar for less
Part = TypeVar("Part")
Result = TypeVar("Result")


class Ids(Mapping[str, str]):
    """{key: 32 hex digits, or an empty text}, read only; takes 16 bytes per key besides the dict of keys."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._ids = {key: bytes.fromhex(value) for key, value in pairs}

    def __getitem__(self, key: str) -> str:
        return self._ids[key].hex()

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


def folder_digest(folder: Path, hashes: FileHashes | None = None, title: str = "") -> str:
    """SHA-256 (hex) of the relative paths and contents of all files below `folder`, sorted by path.

    Follows links, but not one that leads back to a folder above it. A file or folder that cannot be read counts as one
    without content. A missing folder has the digest of an empty one. title: of the progress bar; no bar if empty.
    """
    hashes, whole = hashes or FileHashes(), hashlib.sha256()

    def digests(paths: list[Path]) -> list[tuple[Path, str]]:
        found = hashes.of(paths)
        return [(path, found.get(path, "")) for path in paths]

    paths = _files(folder) if folder.is_dir() else iter(())
    with tqdm(desc=title, unit="file", disable=not title, delay=DELAY_S, mininterval=2) as bar:
        for part in _in_threads(digests, iter(lambda: list(islice(paths, CHUNK)), [])):
            for path, digest in part:
                whole.update(os.fsencode(path.relative_to(folder)) + f"\0{digest}\n".encode())
            bar.update(len(part))
    return whole.hexdigest()


def _files(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """All files below a folder, and the folders that cannot be listed, sorted by path. above: (device, inode) each."""
    try:
        stat, entries = folder.stat(), sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        yield folder
        return
    here = (stat.st_dev, stat.st_ino)
    for entry in entries if here not in above else ():
        path = folder / entry.name
        if path.is_dir() if entry.is_symlink() else entry.is_dir():
            yield from _files(path, (*above, here))
        elif path.is_file():
            yield path


def source_ids(sources: Mapping[str, Any], hashes: FileHashes | None = None, title: str = "") -> Ids:
    """For each source (a text, a path or a list of paths), 32 hex digits that change with the text or the files' bytes.

    File names and times do not matter. An empty text if a file cannot be read. title: of the progress bar; no bar if
    empty.
    """
    hashes = hashes or FileHashes()
    keys = iter(sources)

    def pairs() -> Iterator[tuple[str, str]]:
        with tqdm(total=len(sources), desc=title, unit="item", disable=not title, delay=DELAY_S, mininterval=2) as bar:
            for part in _in_threads(ids, iter(lambda: list(islice(keys, CHUNK)), [])):
                yield from part
                bar.update(len(part))

    def ids(some: list[str]) -> list[tuple[str, str]]:
        parts = {key: source if isinstance(source := sources[key], list) else [source] for key in some}
        found = hashes.of(part for source in parts.values() for part in source if not isinstance(part, str))
        return [(key, _source_id(source, found)) for key, source in parts.items()]

    return Ids(pairs())


def _source_id(source: list[Any], found: Mapping[Path, str]) -> str:
    whole = hashlib.sha256()
    for part in source:
        text = part if isinstance(part, str) else found.get(part)
        if text is None:
            return ""
        whole.update(text.encode(errors="surrogatepass"))
    return whole.hexdigest()[:32]


def _in_threads(function: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[Result]:
    """The results in order. Takes only a few parts before their results are taken."""
    with ThreadPoolExecutor() as pool:  # reading and hashing release the GIL
        waiting: deque[Future[Result]] = deque()
        try:
            for part in parts:
                waiting.append(pool.submit(function, part))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # if the run is stopped, the parts that have not begun are not needed
            pool.shutdown(cancel_futures=True)


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
