"""Hashes of files, and a cache of them: a file is hashed again only if its size, modification time or inode changed.

The cache is one SQLite file, which several stages can use at once. It can be deleted at any time: that costs only the
time to hash the files again. If the cache cannot be used, files are hashed, and nothing fails.
"""

import fcntl
import hashlib
import os
import sqlite3
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from tempfile import TemporaryFile
from threading import Lock

# Another change within the resolution of a file system's clock (FAT: 2 s) leaves the modification time as it is, so the
# hash of a file that was modified so recently is not kept.
RECENT_NS = 2 * 10**9
LIMIT = 4 * 10**9  # bytes: room for about 40 million files; a larger cache starts over
WAIT_S = 10.0  # for another process that is writing
_NAME, _TAG = 16, 8  # bytes
_BATCH = 500  # files per query and per transaction; SQLite may limit the values in a query to 999
_ERRORS = (sqlite3.Error, UnicodeError)  # UnicodeError: SQLite quotes damaged text in its message
_DAMAGED = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class FileHashes:
    """SHA-256 of files; a context manager, and safe in threads.

    cache: the SQLite file, created if missing; None: hash every file. rehash: hash every file, and update the cache.
    """

    def __init__(self, cache: Path | None = None, rehash: bool = False) -> None:
        self._cache, self._rehash, self._lock = cache, rehash, Lock()
        self._connection: sqlite3.Connection | None = None
        self._new: list[tuple[bytes, bytes]] = []  # rows that are not in the cache yet

    def __enter__(self) -> "FileHashes":
        if self._cache:
            try:
                self._connection = _connect(self._cache)
            except OSError:
                pass  # no cache, then
            except _ERRORS as error:
                self._give_up(error)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._write()
            self._close()

    def of(self, paths: Iterable[Path]) -> dict[Path, str]:
        """{path: SHA-256 as hex}, without what cannot be read or is not a file. Follows links."""
        stats = {path: stat for path in dict.fromkeys(paths) if (stat := _stat(path))}
        names = {path: _name(path) for path in stats}
        known = {} if self._rehash else self._look_up([*names.values()])
        found: dict[Path, str] = {}
        for path, stat in stats.items():
            value = known.get(names[path], b"")
            digest = value[:-_TAG]
            if value != digest + _tag(path, stat, digest):
                try:
                    digest, state = _hash(path)
                except OSError:
                    continue
                if state:
                    self._keep(names[path], digest + _tag(path, state, digest))
            found[path] = digest.hex()
        return found

    def _look_up(self, names: list[bytes]) -> dict[bytes, bytes]:
        rows: list[tuple[bytes, bytes]] = []
        with self._lock:
            for start in range(0, len(names), _BATCH):
                part = names[start : start + _BATCH]
                if self._connection:
                    query = f"SELECT name, value FROM hashes WHERE name IN ({','.join('?' * len(part))})"
                    try:
                        rows += self._connection.execute(query, part)
                    except _ERRORS as error:
                        self._give_up(error)
        return {name: value for name, value in rows if isinstance(value, bytes)}

    def _keep(self, name: bytes, value: bytes) -> None:
        with self._lock:
            self._new.append((name, value))
            if len(self._new) >= _BATCH:
                self._write()

    def _write(self) -> None:
        new, self._new = self._new, []
        if self._connection and new:
            try:
                with self._connection:  # one transaction
                    self._connection.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?)", new)
            except _ERRORS as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Go on without the cache; delete it if it is damaged."""
        self._close()
        if self._cache and getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in _DAMAGED:
            _delete(self._cache)

    def _close(self) -> None:
        if self._connection:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None


def _connect(cache: Path) -> sqlite3.Connection:
    """Open the cache; without locks if the file system has none, because the tags reveal what that may damage."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    if cache.is_file() and cache.stat().st_size > LIMIT:
        _delete(cache)
    query = "" if _has_locks(cache.parent) else "?nolock=1"
    connection = sqlite3.connect(cache.absolute().as_uri() + query, WAIT_S, uri=True, check_same_thread=False)
    connection.text_factory = bytes  # a damaged value need not be UTF-8
    try:
        connection.execute("PRAGMA synchronous=OFF")  # what a power failure damages is noticed
        connection.execute("CREATE TABLE IF NOT EXISTS hashes (name BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
    except _ERRORS:
        connection.close()
        raise
    return connection


def _has_locks(folder: Path) -> bool:
    with TemporaryFile(dir=folder) as file:  # nobody else can hold a lock on it
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _delete(cache: Path) -> None:
    for path in (cache, cache.with_name(f"{cache.name}-journal")):
        with suppress(OSError):
            path.unlink()


def _name(path: Path) -> bytes:
    """What stands for a path in the cache."""
    return hashlib.blake2b(os.fsencode(path), digest_size=_NAME).digest()


def _tag(path: Path, stat: os.stat_result, digest: bytes) -> bytes:
    """Ends a value of the cache. It differs if the file has changed, and if the value is damaged."""
    state = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino} ".encode()
    return hashlib.blake2b(state + digest + os.fsencode(path), digest_size=_TAG).digest()


def _stat(path: Path) -> os.stat_result | None:
    """The state of a regular file; None for anything else: opening a pipe would wait for a writer."""
    try:
        stat = path.stat()
    except (OSError, ValueError):  # ValueError: a null character in the name
        return None
    return stat if S_ISREG(stat.st_mode) else None


def _hash(path: Path) -> tuple[bytes, os.stat_result | None]:
    """SHA-256 of a file, and its state if the hash may be kept for it."""
    with path.open("rb") as file:
        before, now = os.fstat(file.fileno()), time.time_ns()
        digest = hashlib.file_digest(file, "sha256").digest()
        after = os.fstat(file.fileno())
    same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    return digest, after if same and now - after.st_mtime_ns > RECENT_NS else None
