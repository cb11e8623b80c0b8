"""Stores behind a URL: the same arrays as from a folder; the cache keeps within its limit and keeps files in use."""

import multiprocessing
import os
import pickle
import random
import shutil
import signal
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from samlove.errors import RequestError, SamloveError
from stores import FeatureStore, FeatureStoreWriter, ShardReader, ShardWriter
from stores.remote import REMOTE_OPEN, Cache, RemotePath, as_path
from tests.small_disk import small_disk

VALUES = 4096  # per array: a shard is then a little larger than 16 kB
SHARDS = 12


def array(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(VALUES).astype(np.float32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """SHARDS tar files of one sample each."""
    root = tmp_path_factory.mktemp("bucket") / "shards"
    with ShardWriter(root, samples_per_shard=1, fingerprint={"made": "here"}) as writer:
        for number in range(SHARDS):
            writer.write(f"k.{number}", {"x": array(number), "rows": [number]})
    return root


@pytest.fixture(scope="module")
def size(shards) -> int:
    return (shards / "shard-00000.tar").stat().st_size


def remote(root: Path, cache: Path, limit: int = 10**9) -> RemotePath:
    path = as_path(f"file://{root}", Cache(cache, limit))
    assert isinstance(path, RemotePath)
    return path


def held(cache: Path) -> int:
    """Bytes in a cache."""
    return sum(path.stat().st_size for path in cache.iterdir())


def assert_all(reader: ShardReader, order=range(SHARDS)) -> None:
    for number in order:
        sample = reader[number]
        assert sample["__key__"] == f"k.{number}" and sample["rows"] == [number]
        np.testing.assert_array_equal(sample["x"], array(number))


@pytest.mark.parametrize("with_index", [True, False])
def test_a_shard_set_read_from_a_url_is_the_same(shards, tmp_path, with_index):
    root = shutil.copytree(shards, tmp_path / "copy")
    if not with_index:
        for name in ("manifest.json", "index.arrow", "files.arrow"):
            (root / name).unlink()
    reader = ShardReader(remote(root, tmp_path / "cache"))
    assert reader.manifest == ShardReader(root).manifest and reader.keys() == ShardReader(root).keys()
    assert_all(reader)
    reader.preload()


def test_a_cached_file_is_not_fetched_again(shards, tmp_path):
    root = shutil.copytree(shards, tmp_path / "copy")
    assert_all(ShardReader(remote(root, tmp_path / "cache")))
    path = remote(root, tmp_path / "cache")
    assert path.folder.files  # list the files while they still exist
    shutil.rmtree(root)
    assert_all(ShardReader(path))


def test_a_changed_file_is_fetched_again(shards, tmp_path):
    root = shutil.copytree(shards, tmp_path / "copy")
    ShardReader(remote(root, tmp_path / "cache"))
    shutil.rmtree(root)
    with ShardWriter(root) as writer:
        writer.write("new", {"x": np.zeros(3)})
    assert ShardReader(remote(root, tmp_path / "cache")).keys() == ["new"]


def test_a_feature_store_read_from_a_url_is_the_same(tmp_path):
    keys = [f"key {number}" for number in range(2 * (REMOTE_OPEN + 2))]
    writer = FeatureStoreWriter(tmp_path / "store", tmp_path / "scratch", {"made": "here"}, keys, 2, chunk_rows=2)
    for number, planned in writer.todo():
        writer.write_shard(number, {key: {"a": array(keys.index(key)).reshape(4, -1)} for key in planned})
    writer.publish()
    store = FeatureStore.open(remote(tmp_path / "store", tmp_path / "cache"))
    assert store.keys() == keys and store.failures == []
    for number, key in enumerate(keys):
        np.testing.assert_array_equal(store.read(key)["a"], array(number).reshape(4, -1))
        np.testing.assert_array_equal(store.read(key, slice(1, 2))["a"], array(number).reshape(4, -1)[1:2])
    assert len(store._opened) == REMOTE_OPEN


def test_forked_workers_read_over_http(shards, tmp_path):
    """HTTP connections use threads, which do not survive a fork."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(shards.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/shards"
        reader = ShardReader(as_path(url, Cache(tmp_path / "cache", 10**9)))
        assert_all(reader, [0, 1])
        context = multiprocessing.get_context("fork")
        others = [context.Process(target=assert_all, args=(reader,)) for _ in range(2)]
        for process in others:
            process.start()
        for process in others:
            process.join()
        assert [process.exitcode for process in others] == [0, 0]
        assert_all(reader)
        server.shutdown()


class NoLength(SimpleHTTPRequestHandler):
    """A server that sends files without their size, as those that compress on the fly do."""

    def send_header(self, name: str, value: str) -> None:
        if name != "Content-Length" or self.path.endswith("/"):
            super().send_header(name, value)

    def end_headers(self) -> None:
        self.close_connection = True
        super().end_headers()


def test_a_server_that_does_not_state_sizes_is_refused(shards, tmp_path):
    handler = partial(NoLength, directory=str(shards.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/shards"
        with pytest.raises(SamloveError, match="does not state the size of"):
            ShardReader(as_path(url, Cache(tmp_path / "cache", 10**9)))
        server.shutdown()


def test_the_cache_drops_the_least_recently_used_files_to_keep_its_limit(shards, size, tmp_path):
    root = shutil.copytree(shards, tmp_path / "copy")
    path = remote(root, tmp_path / "cache", 4 * size)
    for number in (0, 1, 2, 3, 0, 4, 5):
        path.joinpath(f"shard-0000{number}.tar").open().close()
        assert held(tmp_path / "cache") <= 4 * size
    shutil.rmtree(root)
    for number in (0, 3, 4, 5):
        path.joinpath(f"shard-0000{number}.tar").open().close()
    for number in (1, 2):
        with pytest.raises(SamloveError, match="cannot be fetched"):
            path.joinpath(f"shard-0000{number}.tar").open()


def test_a_file_in_use_is_not_dropped(shards, size, tmp_path):
    path = remote(shards, tmp_path / "cache", 2 * size)
    first, second = (path.joinpath(f"shard-0000{number}.tar").open() for number in range(2))
    with pytest.raises(SamloveError, match=f"{2 * size} are in use; increase STORES_CACHE_GB"):
        path.joinpath("shard-00002.tar").open()
    second.close()
    path.joinpath("shard-00002.tar").open().close()
    assert held(tmp_path / "cache") == 2 * size
    assert first.read() == (shards / "shard-00000.tar").read_bytes()


def test_views_keep_their_shard_in_the_cache(shards, tmp_path):
    """A view outlives the reader's memory map; its shard stays locked and readable after the source is deleted."""
    root = shutil.copytree(shards, tmp_path / "copy")
    files = {path.name: path.stat().st_size for path in root.iterdir()}
    room = sum(files[name] for name in files if not name.endswith(".tar")) + REMOTE_OPEN * files["shard-00000.tar"]
    reader = ShardReader(remote(root, tmp_path / "cache", room))
    view = reader[0]["x"]
    assert_all(reader, range(1, REMOTE_OPEN))
    with pytest.raises(SamloveError, match="in use"):
        reader[REMOTE_OPEN]
    np.testing.assert_array_equal(view, array(0))
    del view
    assert_all(reader)


def read_at_random(reader: ShardReader, seed: int) -> None:
    order = [number for _ in range(6) for number in range(SHARDS)]
    random.Random(seed).shuffle(order)
    for number in order:
        assert_all(reader, [number])
        reader._maps.clear()
        assert isinstance(reader.root, RemotePath)
        cache = reader.root.folder.cache
        with cache._locked("room"):  # otherwise files dropped during the count are counted too
            assert held(cache.folder) <= cache.limit


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_a_cache_smaller_than_the_shard_set(shards, size, tmp_path, method):
    context = multiprocessing.get_context(method)
    reader = ShardReader(remote(shards, tmp_path / "cache", 7 * size))
    assert_all(reader, [0])  # so that a file is open before a fork
    others = [context.Process(target=read_at_random, args=(reader, seed)) for seed in range(4)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0] * 4


def test_a_cache_works_within_its_limit_after_processes_are_killed(shards, size, tmp_path):
    context = multiprocessing.get_context("fork")
    reader = ShardReader(remote(shards, tmp_path / "cache", 6 * size))
    for seed in range(10):
        process = context.Process(target=read_at_random, args=(reader, seed))
        process.start()
        process.join(0.005 * (seed + 1))
        assert process.pid
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    read_at_random(reader, 99)


def test_a_partly_fetched_file_is_fetched_again(shards, size, tmp_path):
    reader = remote(shards, tmp_path / "cache").joinpath("shard-00000.tar")
    reader.open().close()
    (cached,) = (p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock")
    cached.rename(cached.with_suffix(".partial"))  # as a killed process leaves it
    cached.with_suffix(".partial").write_bytes(b"half")
    assert reader.open().read() == (shards / "shard-00000.tar").read_bytes()
    assert held(tmp_path / "cache") == size


def test_a_file_that_shrinks_or_disappears_is_named_and_leaves_nothing(shards, tmp_path):
    root = shutil.copytree(shards, tmp_path / "copy")
    path = remote(root, tmp_path / "cache")
    assert path.folder.files
    tar = root / "shard-00003.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(SamloveError, match=r"shard-00003\.tar: expected \d+ bytes as listed \(.*\), found \d+ \("):
        path.joinpath(tar.name).open()
    tar.unlink()
    with pytest.raises(SamloveError, match=r"shard-00003\.tar: cannot be fetched \(FileNotFoundError"):
        path.joinpath(tar.name).open()
    assert held(tmp_path / "cache") == 0


def test_a_file_larger_than_the_cache_is_refused(shards, size, tmp_path):
    with pytest.raises(SamloveError, match=f"the download cache is limited to {size - 1} bytes"):
        remote(shards, tmp_path / "cache", size - 1).joinpath("shard-00000.tar").open()


def test_a_full_disk_is_reported_and_leaves_nothing(shards, size, tmp_path):
    with small_disk(tmp_path / "disk", size // 4096 * 4) as disk:
        remote(shards, disk / "cache").joinpath("shard-00000.tar").open().close()
        with pytest.raises(SamloveError, match=r"shard-00001\.tar: the download cache's disk is full.* STORES_CACHE"):
            remote(shards, disk / "cache").joinpath("shard-00001.tar").open()
        assert held(disk / "cache") == size


def test_a_url_without_a_store_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"file://.*nothing: expected a folder with \.tar shards"):
        ShardReader(remote(tmp_path / "nothing", tmp_path / "cache"))
    with pytest.raises(RequestError, match="manifest.json: no such file"):
        FeatureStore.open(remote(tmp_path / "nothing", tmp_path / "cache"))
    with pytest.raises(SamloveError, match="nowhere://x: cannot be fetched"):
        ShardReader(as_path("nowhere://x", Cache(tmp_path, 1)))


def test_the_environment_sets_the_cache_folder_and_limit(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("STORES_CACHE", str(tmp_path / "named"))
    monkeypatch.setenv("STORES_CACHE_GB", "0.5")
    assert Cache.of_environment() == Cache(tmp_path / "named", 500_000_000)
    assert_all(ShardReader(f"file://{shards}"))
    assert held(tmp_path / "named") > 0
    (tmp_path / "file").touch()
    monkeypatch.setenv("STORES_CACHE", str(tmp_path / "file"))
    with pytest.raises(RequestError, match="file: cannot create the download cache .*; set STORES_CACHE"):
        ShardReader(f"file://{shards}")
    monkeypatch.setenv("STORES_CACHE_GB", "much")
    with pytest.raises(RequestError, match="expected a number, found 'much'"):
        ShardReader(f"file://{shards}")


def test_a_reader_can_be_sent_to_another_process(shards, tmp_path):
    reader = ShardReader(remote(shards, tmp_path / "cache"))
    assert_all(reader, [1])
    assert_all(pickle.loads(pickle.dumps(reader)))
