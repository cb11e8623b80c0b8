"""Stores behind a URL (s3://, gs://, file:// and all that fsspec knows), read through a local cache of bounded size.

    CACHE/<hash>            one remote file, whole; named by its URL, size and version, so that a changed one is another
    CACHE/<hash>.partial    being fetched, its full size taken up from the start
    CACHE/*.lock            one process at a time makes room; one at a time fetches a file

Any number of processes share a cache. A reader holds a shared lock on what it has open or mapped, and only what can
be locked exclusively is dropped: the least recently used first, never a file in use. The locks are the kernel's, so a
killed process leaves none, and its half-fetched file is dropped like any other.

The cache is $STORES_CACHE (else ~/.cache/stores) of $STORES_CACHE_GB (else 50) GB. What a service needs (credentials,
endpoint) is configured as its fsspec implementation says; for s3:// see docs/sharing.md. Retrying is the
implementation's too. A path without :// is read in place and never cached.
"""

import errno
import fcntl
import io
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from samlove.errors import RequestError, SamloveError

_VERSIONS = ("ETag", "etag", "md5", "mtime", "LastModified", "last_modified")  # how services tell one from the next
_BLOCK = 1 << 23  # bytes fetched at a time
_CHECK = "check the URL, the credentials and the endpoint (docs/sharing.md)"


class _Remote(NamedTuple):
    st_size: int  # named as in os.stat_result
    version: str


def _remote(info: dict[str, Any]) -> _Remote:
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    return _Remote(info["size"], version.strip('"'))  # quoted by some services when asked one way, not the other


@dataclass(frozen=True)
class Cache:
    """A folder of remote files, at most `limit` bytes of them."""

    folder: Path
    limit: int

    @classmethod
    def of_environment(cls) -> "Cache":
        folder = os.environ.get("STORES_CACHE") or Path.home() / ".cache" / "stores"
        gigabytes = os.environ.get("STORES_CACHE_GB", "50")
        try:
            return cls(Path(folder), int(float(gigabytes) * 1e9))
        except ValueError:
            raise RequestError(f"STORES_CACHE_GB: expected a number, found {gigabytes!r}") from None

    def open(self, url: str, remote: _Remote) -> BinaryIO:
        """The file's bytes, fetched if need be. Neither it nor a map of it is dropped before it is closed.

        Raises SamloveError where it cannot be fetched, or all the room is taken by files in use; RequestError where
        the cache's folder cannot be made.
        """
        path = self.folder / sha256(f"{url}\0{remote.st_size}\0{remote.version}".encode()).hexdigest()[:40]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"{self.folder}: no place for a cache ({error}); set STORES_CACHE to a folder") from None
        while True:
            file = _open_shared(path)
            if file:
                return file
            with self._locked(f"fetch-{path.name[0]}"):
                if not path.exists():
                    self._fetch(url, remote, path)

    def _fetch(self, url: str, remote: _Remote, path: Path) -> None:
        partial = path.with_suffix(".partial")
        with self._locked("room"):
            partial.unlink(missing_ok=True)  # left by a killed process: whoever fetches this file holds the lock for it
            self._make_room(url, remote.st_size)
            file = partial.open("wb")
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(remote.st_size)
        try:
            with file:
                _download(url, remote, file)
                os.fsync(file.fileno())  # else a loss of power may leave zeros under the final name
                with self._locked("room"):
                    partial.rename(path)
        except BaseException:
            with self._locked("room"):
                partial.unlink(missing_ok=True)
            raise

    def _make_room(self, url: str, size: int) -> None:
        """Drop the least recently used files until `size` more bytes fit; the room is locked."""
        found = [(p.stat(), p) for p in self.folder.iterdir() if p.suffix != ".lock"]
        taken = sum(stat.st_size for stat, _ in found)
        for stat, path in sorted(found, key=lambda entry: entry[0].st_mtime_ns):
            if taken + size <= self.limit:
                break
            taken -= stat.st_size if _drop(path) else 0
        if taken + size > self.limit:
            raise SamloveError(
                f"{self.folder}: {url} of {size} bytes does not fit: expected room in a cache of {self.limit} bytes, "
                f"found {taken} in use; set STORES_CACHE_GB higher"
            )

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self.folder / f"{name}.lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _open_shared(path: Path) -> BinaryIO | None:
    """The cached file, locked against dropping: the lock lasts as long as the file, or a map of it, is open."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    if not os.fstat(file.fileno()).st_nlink:  # dropped after it was opened, before it was locked
        file.close()
        return None
    now = time.time_ns()  # finer than the file system's own clock
    os.utime(file.fileno(), ns=(now, now))
    return file


def _drop(path: Path) -> bool:
    """Remove a file that nobody uses; whether it was one."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
        return True


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Any failure of any service as one error, of one line, that names the URL."""
    try:
        yield
    except ImportError as error:
        remedy = "; pip install 'samlove[s3]'" if url.startswith(("s3:", "s3a:")) else ""
        raise RequestError(f"{url}: cannot be read without another package: {error}{remedy}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise SamloveError(f"{url}: the cache's disk has no room for it; make room, or set STORES_CACHE") from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SamloveError(f"{url}: cannot be fetched ({reason}); {_CHECK}") from error


def _download(url: str, listed: _Remote, file: BinaryIO) -> None:
    """Fetch a file whole; SamloveError where it is no longer the one that was listed."""
    import fsspec

    with _named(url):
        system, name = fsspec.core.url_to_fs(url)
        system.invalidate_cache()  # what it remembers is the list
        found = _remote(system.info(name))
        if found == listed:
            with system.open(name, "rb") as source:
                shutil.copyfileobj(source, file, _BLOCK)
            found = found._replace(st_size=file.tell())
    if found != listed:
        (size, version), (new_size, new_version) = listed, found
        raise SamloveError(
            f"{url}: expected {size} bytes as listed (version {version or 'unknown'}), "
            f"found {new_size} ({new_version or 'unknown'}); open the store anew"
        )


class RemoteFolder:
    """All files below a URL as listed once; `path` is the way to them. Holds no connection: safe in any worker."""

    def __init__(self, url: str, cache: Cache) -> None:
        self.url, self.cache = url.rstrip("/"), cache

    @cached_property
    def files(self) -> dict[str, _Remote]:
        """{name relative to the URL: size and version}."""
        import fsspec

        with _named(self.url):
            system, root = fsspec.core.url_to_fs(self.url)
            system.invalidate_cache()
            listed: dict[str, dict[str, Any]] = system.find(root, detail=True)
            for name, info in listed.items():  # plain HTTP lists names alone
                listed[name] = info if info.get("size") is not None else system.info(name)
        return {name[len(root) :].lstrip("/"): _remote(info) for name, info in listed.items()}


@dataclass(frozen=True)
class RemotePath:
    """A file or folder below a URL: as much of pathlib.Path as reading a store takes."""

    folder: RemoteFolder
    inside: str = ""

    def __str__(self) -> str:
        return f"{self.folder.url}/{self.inside}".rstrip("/")

    @property
    def name(self) -> str:
        return str(self).rpartition("/")[2]

    def joinpath(self, *parts: str) -> "RemotePath":
        return RemotePath(self.folder, "/".join([*filter(None, [self.inside]), *parts]))

    def __truediv__(self, part: str) -> "RemotePath":
        return self.joinpath(part)

    def is_file(self) -> bool:
        return self.inside in self.folder.files

    def stat(self) -> _Remote:
        try:
            return self.folder.files[self.inside]
        except KeyError:
            raise FileNotFoundError(f"{self}: no such file") from None

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """The files right below whose names match."""
        start = f"{self.inside}/" if self.inside else ""
        for name in self.folder.files:
            rest = name.removeprefix(start)
            if name.startswith(start) and "/" not in rest and fnmatch(rest, pattern):
                yield self.joinpath(rest)

    def open(self, mode: str = "rb", newline: str | None = None, encoding: str | None = None) -> IO[Any]:
        """The file, read only, as the local file that it is in the cache."""
        file = self.folder.cache.open(str(self), self.stat())
        return file if "b" in mode else io.TextIOWrapper(file, encoding, newline=newline)

    def read_text(self, encoding: str = "utf-8") -> str:
        with self.open("r", encoding=encoding) as file:
            return file.read()


AnyPath = Path | RemotePath
OPEN = 4  # shards that a reader of a remote store keeps open; any others the cache may drop


def as_path(root: str | AnyPath, cache: Cache | None = None) -> AnyPath:
    """A store's place: a RemotePath where `root` is a URL, else a Path. cache: None for that of the environment."""
    if isinstance(root, str) and "://" in root:
        return RemotePath(RemoteFolder(root, cache or Cache.of_environment()))
    return Path(root) if isinstance(root, str) else root


def keep_open(opened: dict, root: AnyPath) -> None:
    """Forget the shard opened first, where more than OPEN of a remote store are; views of it keep it open still."""
    if isinstance(root, RemotePath) and len(opened) > OPEN:
        del opened[next(iter(opened))]
