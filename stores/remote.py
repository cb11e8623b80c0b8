"""Reads stores behind a URL (s3://, gs://, file:// and whatever fsspec supports) through a bounded download cache.

    CACHE/<hash>            one complete remote file; the hash covers its URL, size and version, so that a changed file
                            gets a new name
    CACHE/<hash>.partial    a file being fetched; its full size is reserved from the start
    CACHE/*.lock            let one process at a time free space, and one at a time fetch a file

Any number of processes can share a cache. A reader holds a shared lock on each file that it has open or mapped. The
cache drops the least recently used files first, and only if it can lock them exclusively, so never a file in use. The
locks belong to the kernel: a killed process leaves none, and its partial file can be dropped like any other.

The cache folder is $STORES_CACHE (default ~/.cache/stores), its limit $STORES_CACHE_GB (default 50) GB. The fsspec
implementation of a service defines how to configure it (credentials, endpoint) and does the retries; for s3:// see
docs/sharing.md. A path without :// is read in place and never cached.
"""

import errno
import fcntl
import io
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, TypeVar

from samlove.errors import NO_LOCKS, RequestError, SamloveError, absence

_VERSIONS = ("ETag", "etag", "md5", "mtime", "LastModified", "last_modified")  # services give a version in one of these
_BLOCK = 1 << 23  # bytes per read
_CHECK = "check the URL, the credentials and the endpoint (docs/sharing.md)"


class _Remote(NamedTuple):
    st_size: int  # named as in os.stat_result
    version: str


def _remote(info: dict[str, Any]) -> _Remote:
    if info.get("size") is None:
        raise ValueError(f"the server does not state the size of {info.get('name')}; use one that does")
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    return _Remote(info["size"], version.strip('"'))  # some services quote it in one call, not in another


@dataclass(frozen=True)
class Cache:
    """A folder of downloaded files, at most `limit` bytes in total."""

    folder: Path
    limit: int

    @classmethod
    def of_environment(cls) -> "Cache":
        gigabytes = os.environ.get("STORES_CACHE_GB", "50")
        try:
            folder = Path(os.environ.get("STORES_CACHE") or "~/.cache/stores").expanduser()
        except RuntimeError:
            raise RequestError("~/.cache/stores: the home folder is unknown; set STORES_CACHE or HOME") from None
        try:
            return cls(folder, int(float(gigabytes) * 1e9))
        except (ValueError, OverflowError):
            raise RequestError(f"STORES_CACHE_GB: expected a number, found {gigabytes!r}") from None

    def open(self, url: str, remote: _Remote) -> BinaryIO:
        """Open the cached file, fetching it if needed. It is not dropped while it, or a map of it, is open.

        Raises SamloveError if the file cannot be fetched or files in use leave no room for it; RequestError if the
        cache folder cannot be created.
        """
        path = self.folder / sha256(f"{url}\0{remote.st_size}\0{remote.version}".encode()).hexdigest()[:40]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(
                f"{self.folder}: cannot create the download cache ({error}); set STORES_CACHE to another folder"
            ) from None
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
            partial.unlink(missing_ok=True)  # left by a killed process: we hold this file's fetch lock
            self._make_room(url, remote.st_size)
            file = partial.open("wb")
            _lock(file, fcntl.LOCK_EX)
            file.truncate(remote.st_size)
        try:
            with file:
                _download(url, remote, file)
                os.fsync(file.fileno())  # otherwise a power failure may leave zeros under the final name
                with self._locked("room"):
                    partial.rename(path)
        except BaseException:
            with self._locked("room"):
                partial.unlink(missing_ok=True)
            raise

    def _make_room(self, url: str, size: int) -> None:
        """Drop the least recently used files until `size` more bytes fit; the caller holds the "room" lock."""
        found = [(p.stat(), p) for p in self.folder.iterdir() if p.suffix != ".lock"]
        used = sum(stat.st_size for stat, _ in found)
        for stat, path in sorted(found, key=lambda entry: entry[0].st_mtime_ns):
            if used + size <= self.limit:
                break
            used -= stat.st_size if _drop(path) else 0
        if used + size > self.limit:
            raise SamloveError(
                f"{self.folder}: no room for {url} ({size} bytes): the download cache is limited to {self.limit} "
                f"bytes, and {used} are in use; increase STORES_CACHE_GB"
            )

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self.folder / f"{name}.lock", "wb") as file:
            _lock(file, fcntl.LOCK_EX)
            yield


def _lock(file: IO[Any], kind: int) -> None:
    """flock. Raises RequestError if the file system has no locks."""
    try:
        fcntl.flock(file, kind)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        folder = Path(file.name).parent
        raise RequestError(
            f"{folder}: a file system without file locks ({error.strerror}), which the download cache needs; "
            "set STORES_CACHE to a folder on a local disk"
        ) from None


def _open_shared(path: Path) -> BinaryIO | None:
    """The cached file, with a shared lock that lasts as long as the file, or a map of it, is open; None if missing."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    _lock(file, fcntl.LOCK_SH)
    if not os.fstat(file.fileno()).st_nlink:  # it was dropped between open and lock
        file.close()
        return None
    now = time.time_ns()  # finer than the file system's clock
    os.utime(file.fileno(), ns=(now, now))
    return file


def _drop(path: Path) -> bool:
    """Remove a file unless it is in use; returns whether it was removed."""
    # NFS grants an exclusive lock only on a file that is open for writing.
    with path.open("r+b" if os.access(path, os.W_OK) else "rb") as file:
        try:
            _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
        return True


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Turn any failure of any service into a one-line error that names the URL."""
    try:
        yield
    except ImportError as error:
        remedy = '; run: pip install -e ".[s3]"' if url.startswith(("s3:", "s3a:")) else ""
        raise RequestError(f"{url}: needs a package that is not installed: {error}{remedy}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise SamloveError(f"{url}: the download cache's disk is full; free space or set STORES_CACHE") from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SamloveError(f"{url}: cannot be fetched ({reason}); {_CHECK}") from error


def _download(url: str, listed: _Remote, file: BinaryIO) -> None:
    """Fetch a complete file. Raises SamloveError if it is no longer the file that was listed."""
    import fsspec

    with _named(url):
        system, name = fsspec.core.url_to_fs(url)
        system.invalidate_cache()  # otherwise info() answers from the earlier listing
        found = _remote(system.info(name))
        if found == listed:
            with system.open(name, "rb") as source:
                shutil.copyfileobj(source, file, _BLOCK)
            found = found._replace(st_size=file.tell())
    if found != listed:
        (size, version), (new_size, new_version) = listed, found
        raise SamloveError(
            f"{url}: expected {size} bytes as listed (version {version or 'unknown'}), "
            f"found {new_size} ({new_version or 'unknown'}); run the same command again"
        )


class RemoteFolder:
    """All files below a URL, listed once; RemotePath reads them. Holds no connection: safe in any worker."""

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
            for name, info in listed.items():  # plain HTTP lists only names
                listed[name] = info if info.get("size") is not None else system.info(name)
            return {name[len(root) :].lstrip("/"): _remote(info) for name, info in listed.items()}


@dataclass(frozen=True)
class RemotePath:
    """A file or folder below a URL, with the part of pathlib.Path's interface that reading a store needs."""

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
        """The files directly in this folder whose names match."""
        start = f"{self.inside}/" if self.inside else ""
        for name in self.folder.files:
            rest = name.removeprefix(start)
            if name.startswith(start) and "/" not in rest and fnmatch(rest, pattern):
                yield self.joinpath(rest)

    def open(self, mode: str = "rb", newline: str | None = None, encoding: str | None = None) -> IO[Any]:
        """Open the cached local copy of the file, read only."""
        file = self.folder.cache.open(str(self), self.stat())
        return file if "b" in mode else io.TextIOWrapper(file, encoding, newline=newline)

    def read_text(self, encoding: str = "utf-8") -> str:
        with self.open("r", encoding=encoding) as file:
            return file.read()


AnyPath = Path | RemotePath
P = TypeVar("P", bound=AnyPath)
MOST_OPEN = 1024  # files that one reader keeps open, whatever the system allows
REMOTE_OPEN = 4  # shards that one reader of a remote store keeps open; the cache may drop any others


def as_path(root: str | AnyPath, cache: Cache | None = None) -> AnyPath:
    """A store's location: a RemotePath if `root` is a URL, else a Path. cache: None for `Cache.of_environment()`."""
    if isinstance(root, str) and "://" in root:
        return RemotePath(RemoteFolder(root, cache or Cache.of_environment()))
    return Path(root) if isinstance(root, str) else root


def regular(path: P) -> P:
    """The path, unchanged. Call it before opening a file from elsewhere.

    Raises FileNotFoundError if there is no file, OSError if there is something else in its place: opening a pipe would
    wait for a writer, and a device has no end.
    """
    if not path.is_file():
        if isinstance(path, Path) and path.exists():
            raise OSError(f"{path}: expected a file, found {absence(path)}")
        raise FileNotFoundError(f"{path}: expected a file, found none")
    return path


def keep_open(opened: dict, root: AnyPath, files: int = 1) -> None:
    """Make room in `opened` for one more shard, which takes `files` open files, by closing the one opened first.

    A reader keeps at most a sixteenth of the open files that the system allows to a process, because several readers
    share it. Arrays that are views of a closed shard stay valid and keep its file open.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    usable = MOST_OPEN if allowed == resource.RLIM_INFINITY else min(allowed // 16, MOST_OPEN)
    limit = REMOTE_OPEN if isinstance(root, RemotePath) else max(1, usable // max(files, 1))
    for name in list(opened)[: max(0, len(opened) - limit + 1)]:
        opened.pop(name, None)  # unless another thread has closed it
