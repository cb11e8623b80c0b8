"""The cache of file hashes: files are read again only if they changed, and no state of the cache gives a wrong hash."""

import errno
import hashlib
import multiprocessing
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from samlove.data import hashes
from samlove.data.hashes import FileHashes

OLD = 10**18  # a modification time long ago, ns
FORK = multiprocessing.get_context("fork")


def write(path: Path, content: bytes, mtime: int = OLD) -> Path:
    """Write a file in place, with a modification time."""
    path.write_bytes(content)
    os.utime(path, ns=(mtime, mtime))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "scratch" / "hashes.sqlite"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """More files than one query looks up."""
    (tmp_path / "media").mkdir()
    return [write(tmp_path / "media" / f"{n}", f"content {n}".encode()) for n in range(600)]


def digests(cache: Path | None, paths: list[Path], rehash: bool = False) -> dict[Path, str]:
    with FileHashes(cache, rehash) as found:
        return found.of(paths)


def true_digests(paths: list[Path]) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def alter_unseen(path: Path) -> None:
    """Change the content, but not size, modification time and inode: only a file that is read again shows it."""
    stat = path.stat()
    write(path, path.read_bytes()[::-1], stat.st_mtime_ns)
    assert (path.stat().st_size, path.stat().st_ino) == (stat.st_size, stat.st_ino)


def is_cached(cache: Path, path: Path) -> bool:
    """Whether the hash of `path` comes from the cache."""
    before = digests(cache, [path])
    alter_unseen(path)
    return digests(cache, [path]) == before


def test_unchanged_files_are_not_read_again(cache: Path, files: list[Path]) -> None:
    before = digests(cache, files)
    assert before == true_digests(files)
    for path in files:
        alter_unseen(path)
    assert digests(cache, files) == before
    assert digests(None, files) == true_digests(files)
    assert digests(cache, files, rehash=True) == true_digests(files)
    assert digests(cache, files) == true_digests(files)  # the cache was updated


def test_recently_modified_files_are_read_again(cache: Path, files: list[Path]) -> None:
    path = files[0]
    path.write_bytes(b"new")
    assert not is_cached(cache, path)
    write(path, b"tomorrow", path.stat().st_mtime_ns + 10**14)
    assert not is_cached(cache, path)
    write(path, b"old")
    assert is_cached(cache, path)


def replace(path: Path) -> None:
    write(path.with_name("other"), path.read_bytes()[::-1]).replace(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: write(path, path.read_bytes() + b"x"),
        lambda path: write(path, path.read_bytes()[::-1], OLD + 1),
        lambda path: write(path, path.read_bytes()[::-1], OLD - 1),
        replace,
    ],
    ids=["size", "later", "earlier", "inode"],
)
def test_a_change_of_size_time_or_inode_is_noticed(
    cache: Path, files: list[Path], change: Callable[[Path], object]
) -> None:
    before = digests(cache, files)
    change(files[7])
    after = digests(cache, files)
    assert after == true_digests(files)
    assert after[files[7]] != before[files[7]]


def test_what_is_not_a_readable_file_is_left_out(cache: Path, tmp_path: Path, files: list[Path]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(files[0])
    (tmp_path / "dangling").symlink_to("nowhere")
    odd = [tmp_path / name for name in ("pipe", "dangling", "nowhere", "media", "a\0b")]
    for _ in range(2):
        found = digests(cache, [*odd, tmp_path / "link"])
        assert found == true_digests([tmp_path / "link"])


def make_other_table(cache: Path) -> None:
    cache.unlink()
    with sqlite3.connect(cache) as connection:
        connection.execute("CREATE TABLE hashes (a, b, c)")
    connection.close()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda cache: cache.write_bytes(b""),
    "text": lambda cache: cache.write_bytes(b"no database" * 1000),
    "truncated": lambda cache: cache.write_bytes(cache.read_bytes()[: cache.stat().st_size // 2]),
    "zeros": lambda cache: cache.write_bytes(cache.read_bytes()[:4096] + bytes(cache.stat().st_size - 4096)),
    "not_utf8": lambda cache: cache.write_bytes(
        cache.read_bytes().replace(b"tablehashes", b"table\xff\xff\xff\xff\xff\xff")
    ),
    "another_table": make_other_table,
    "too_large": lambda cache: os.truncate(cache, hashes.LIMIT + 1),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_starts_over(cache: Path, files: list[Path], damage: Callable[[Path], object]) -> None:
    digests(cache, files)
    damage(cache)
    assert digests(cache, files) == true_digests(files)
    digests(cache, files)
    assert is_cached(cache, files[0])


def test_no_flipped_bit_gives_a_wrong_hash(cache: Path, files: list[Path]) -> None:
    digests(cache, files)
    whole, expected = cache.read_bytes(), true_digests(files)
    rng = np.random.default_rng(0)
    for place in rng.integers(len(whole), size=100):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        cache.write_bytes(flipped)
        assert digests(cache, files) == expected, place


def test_values_of_other_types_are_not_used(cache: Path, files: list[Path]) -> None:
    digests(cache, files)
    for value in ("NULL", "3", "'text'", "1.5", "x''", "x'ffff'", "CAST(x'ffff' AS TEXT)"):
        with sqlite3.connect(cache) as connection:
            connection.execute(f"UPDATE hashes SET value = {value}")
        connection.close()
        assert digests(cache, files) == true_digests(files)


def test_a_place_where_no_cache_can_be(tmp_path: Path, files: list[Path]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for cache in (tmp_path / "folder", tmp_path / "file" / "hashes.sqlite", Path("/proc/hashes.sqlite")):
        assert digests(cache, files) == true_digests(files)
    assert (tmp_path / "folder").is_dir()


def test_a_cache_that_another_process_has_locked(
    cache: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "WAIT_S", 0.1)
    digests(cache, files[:-1])
    connection = sqlite3.connect(cache, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    assert digests(cache, files) == true_digests(files)
    connection.close()
    assert is_cached(cache, files[0])  # it was not deleted


def _hash_often(cache: Path, files: list[Path], without_locks: bool) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if without_locks:
        hashes.fcntl.lockf = no_locks  # type: ignore[attr-defined]  # only in this process
    for start in range(0, len(files), 20):
        assert digests(cache, files[start:] + files[:start], rehash=start % 40 == 0) == true_digests(files)


@pytest.mark.parametrize("without_locks", [False, True])
def test_several_processes_use_it_at_once(cache: Path, files: list[Path], without_locks: bool) -> None:
    processes = [FORK.Process(target=_hash_often, args=(cache, files, without_locks)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    digests(cache, files)
    digests(cache, files)
    assert is_cached(cache, files[0])


KILLED = """
import os, signal, sys
from pathlib import Path
from samlove.data.hashes import FileHashes
with FileHashes(Path(sys.argv[1])) as hashes:
    for path in sorted(Path(sys.argv[2]).iterdir()):
        hashes.of([path])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_keeps_most_of_what_it_has_hashed(cache: Path, files: list[Path]) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(cache), str(files[0].parent)])
    assert killed.returncode < 0
    first, *_ = sorted(files)
    alter_unseen(first)
    assert digests(cache, [first]) != true_digests([first])
