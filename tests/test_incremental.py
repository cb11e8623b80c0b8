"""Extraction after files were added, changed, removed or fixed: what is computed, and what stays as it was."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samlove.errors import SamloveError
from samlove.features.extract import extract
from samlove.features.lock import only_run
from stores import FeatureStore, FeatureStoreWriter
from stores.earlier import layout
from stores.verify import verify
from tests.store_kinds import to_schema_1
from tests.test_extract import Numbers, Stopped, job

SIZE = 100  # items per shard


def make_sources(folder: Path, numbers: range) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    sources = {f"k{n:03}": folder / f"{n}" for n in numbers}
    for n, path in zip(numbers, sources.values(), strict=True):
        path.write_text(str(n))
    return sources


def inodes(store: FeatureStore, shard: int) -> set[int]:
    """The inodes of a shard's files."""
    return {path.stat().st_ino for path in (store.path / f"shard-{shard:05d}.zarr").rglob("*") if path.is_file()}


class Project:
    """A store of 250 numbers in three shards, which `run` updates after its sources changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sources = make_sources(root / "in", range(250))
        self.run()

    def run(self) -> FeatureStore:
        self.encoder = Numbers()
        self.report = extract(job(self.encoder, self.sources, self.root))
        return self.store

    @property
    def store(self) -> FeatureStore:
        return FeatureStore.open(self.root / "numbers")

    def assert_holds(self, values: Mapping[str, int]) -> None:
        store = self.store
        assert {key: store.read(key)["x"][0] for key in store.keys()} == values

    def dvc_removes_the_output(self) -> None:
        """As `dvc repro` does before it runs the stage."""
        shutil.rmtree(self.root / "numbers")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.mark.parametrize("removed", [False, True])
def test_added_items_go_into_new_shards(project: Project, removed: bool) -> None:
    before = [inodes(project.store, n) for n in range(3)]
    if removed:
        project.dvc_removes_the_output()
    # Added in front of the others, as in an index sorted by name.
    project.sources = {**make_sources(project.root / "new", range(900, 930)), **project.sources}
    store = project.run()
    assert project.encoder.computed == list(range(900, 930))
    assert [inodes(store, n) for n in range(3)] == before
    assert [*store.shards.values()] == [100, 100, 50, 30]
    assert (project.report.shards, project.report.spent.shards_written) == (4, 1)
    assert "30 of 280 items computed" in str(project.report)
    assert "3 of 4 shards reused" in str(project.report)
    project.assert_holds({**{f"k{n:03}": n for n in range(250)}, **{f"k{n:03}": n for n in range(900, 930)}})


def test_changed_items_are_recomputed_and_their_shard_keeps_its_other_rows(project: Project) -> None:
    before = [inodes(project.store, n) for n in range(3)]
    project.sources["k120"].write_text("7")
    store = project.run()
    assert project.encoder.computed == [7]
    assert [inodes(store, n) == before[n] for n in range(3)] == [True, False, True]
    project.assert_holds({f"k{n:03}": 7 if n == 120 else n for n in range(250)})


def test_removed_items_are_left_out_and_nothing_is_computed(project: Project) -> None:
    before = [inodes(project.store, n) for n in range(3)]
    for n in (3, *range(100, 200)):  # one row of shard 0, all of shard 1
        del project.sources[f"k{n:03}"]
    store = project.run()
    assert project.encoder.computed == []
    assert inodes(store, 2) == before[2]
    assert [*store.shards] == ["shard-00000.zarr", "shard-00002.zarr"]
    project.assert_holds({f"k{n:03}": n for n in range(250) if n != 3 and not 100 <= n < 200})


def test_only_failed_items_are_retried(project: Project) -> None:
    project.sources["k007"].unlink()
    assert [failure.key for failure in project.run().failures] == ["k007"]
    assert project.encoder.computed == []
    before = [inodes(project.store, n) for n in range(3)]
    assert [failure.key for failure in project.run().failures] == ["k007"]  # still
    assert [inodes(project.store, n) for n in range(3)] == before
    project.sources["k007"].write_text("7")
    assert project.run().failures == []
    assert project.encoder.computed == [7]
    project.assert_holds({f"k{n:03}": n for n in range(250)})


def test_moved_files_are_not_recomputed(project: Project) -> None:
    (project.root / "in").rename(project.root / "moved")
    project.sources = {key: project.root / "moved" / path.name for key, path in project.sources.items()}
    project.run()
    assert project.encoder.computed == []
    assert "nothing to compute; 3 of 3 shards reused" in str(project.report)


def test_rows_with_different_code_fingerprint_layout_or_ids_are_not_reused(project: Project) -> None:
    def todo(**changes: object) -> int:
        made = project.store.manifest
        shutil.rmtree(project.root / "elsewhere", ignore_errors=True)
        values = {
            "path": project.root / "other",
            "scratch": project.root / "elsewhere",
            "fingerprint": made["fingerprint"],
            "keys": project.store.keys(),
            "shard_size": SIZE,
            "ids": {key: project.store.id_of(key) for key in project.store.keys()},
            "code": made["code"],
            "previous": [project.root / "nowhere", project.root / "numbers"],
        }
        return len(FeatureStoreWriter(**{**values, **changes}).todo())  # type: ignore[arg-type]

    assert todo() == 0
    assert todo(code="other") == todo(fingerprint={}) == todo(chunk_rows=1) == todo(ids={}) == todo(previous=()) == 3


def test_a_store_of_an_earlier_version_is_reused(project: Project) -> None:
    before = [inodes(project.store, n) for n in range(3)]
    shutil.rmtree(project.root / "scratch")
    to_schema_1(project.root / "numbers")
    project.sources["k120"].write_text("7")
    store = project.run()
    assert project.encoder.computed == [7]
    assert store.manifest["schema"] == 2
    assert [inodes(store, n) == before[n] for n in range(3)] == [True, False, True]
    assert verify(store.path, deep=True) == []


@pytest.mark.parametrize("name", ["index.arrow", "files.arrow", "manifest.json", "shard-00001.zarr/zarr.json"])
def test_a_damaged_store_is_recomputed_where_it_must_be(project: Project, name: str) -> None:
    shutil.rmtree(project.root / "scratch")
    path = project.root / "numbers" / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    project.run()
    lost = {"index.arrow": [], "shard-00001.zarr/zarr.json": range(100, 200)}.get(name, range(250))
    assert sorted(project.encoder.computed) == [*lost]
    project.assert_holds({f"k{n:03}": n for n in range(250)})
    assert verify(project.root / "numbers", deep=True) == []


def test_nothing_that_a_store_does_not_list_is_reused(project: Project) -> None:
    shutil.rmtree(project.root / "scratch")
    (project.root / "private").mkdir()
    (project.root / "private" / "secret").write_text("x")
    (project.root / "numbers" / "shard-00000.zarr" / "link").symlink_to(project.root / "private")
    (project.root / "numbers" / "shard-00001.zarr" / "file").write_text("x")
    store = project.run()
    assert sorted(project.encoder.computed) == list(range(100, 200))
    assert not [path for path in store.path.rglob("*") if path.name in ("link", "file", "secret")]
    assert verify(store.path, deep=True) == []


def test_shards_that_an_interrupted_run_only_linked_do_not_hide_better_ones(project: Project) -> None:
    values = {key: n + 1 for n, key in enumerate(project.sources)} | {"k249": 249}
    for key, value in values.items():
        project.sources[key].write_text(f"{value}")
    other = project.root / "other"
    extract(job(Numbers(), project.sources, other))
    with pytest.raises(RuntimeError, match="stopped"):  # its last shard is a link to rows of which one is up to date
        extract(job(Stopped(), project.sources, project.root))
    encoder = Numbers()
    extract(replace(job(encoder, project.sources, project.root), elsewhere=[other / "numbers"]))
    assert encoder.computed == []
    project.assert_holds(values)


def test_unchanged_files_are_not_hashed_again(project: Project) -> None:
    def run(rehash: bool = False) -> list[float]:
        encoder = Numbers()
        made = replace(job(encoder, project.sources, project.root), hashes=project.root / "hashes.sqlite")
        extract(made, rehash=rehash)
        return encoder.computed

    for path in project.sources.values():
        os.utime(path, (0, 0))
    assert run() == []
    for key in ("k003", "k004"):  # nobody could see it without reading the file
        project.sources[key].write_text(key[-1].replace("3", "5").replace("4", "6"))
        os.utime(project.sources[key], (0, 0))
    os.utime(project.sources["k004"], (1, 1))
    assert run() == [6]
    assert run(rehash=True) == [5]
    assert run() == []


def test_linked_files_are_never_edited(project: Project) -> None:
    """DVC may have replaced the store's files by links to its cache."""
    cache = project.root / "cache"
    shutil.copytree(project.root / "numbers", cache)
    for path in (project.root / "numbers").rglob("*"):
        if path.is_file():
            path.unlink()
            path.symlink_to(cache / path.relative_to(project.root / "numbers"))
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    project.sources["k120"].write_text("7")
    del project.sources["k001"]
    project.run()
    assert project.encoder.computed == [7]
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before
    assert not any(path.is_symlink() for path in (project.root / "numbers").rglob("*"))


def test_damage_in_scratch_is_found_and_recomputed(tmp_path: Path) -> None:
    sources = make_sources(tmp_path / "in", range(250))
    with pytest.raises(RuntimeError, match="stopped"):
        extract(job(Stopped(), sources, tmp_path))
    (data,) = tmp_path.glob("scratch/*/shard-00001.zarr/x/c/0/0")
    damaged = bytearray(data.read_bytes())
    damaged[50] ^= 1
    data.write_bytes(damaged)
    encoder = Numbers()
    extract(job(encoder, sources, tmp_path))
    assert sorted(encoder.computed) == list(range(100, 250))


some_keys = st.lists(st.integers(0, 30).map(str), unique=True)


@given(some_keys, st.lists(some_keys, max_size=4), st.integers(1, 5))
def test_every_key_is_in_one_shard_and_stays_there(wanted: list[str], history: list[list[str]], size: int) -> None:
    def place(keys: list[str], standing: dict[int, list[str]]) -> dict[int, list[str]]:
        return dict(layout(dict(zip(keys, keys, strict=True)), sorted(standing.items()), size))

    standing: dict[int, list[str]] = {}
    for keys in [*history, wanted]:
        placed = place(keys, standing)
        assert sorted(key for shard in placed.values() for key in shard) == sorted(keys)
        assert all(0 < len(shard) <= size for shard in placed.values())
        where = {key: number for number, shard in placed.items() for key in shard}
        assert all(where[key] == number for number, shard in standing.items() for key in shard if key in where)
        # Whichever of these shards an interrupted run finished, all keys keep their places.
        for finished in ({}, {n: placed[n] for n in list(placed)[::2]}, {n: placed[n] for n in list(placed)[1::2]}):
            assert place(keys, {**standing, **finished}) == placed
        standing = placed


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, int]]:
    """Consecutive runs, each as {key: version}; keys are added, changed and removed."""
    run = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 2), min_size=1)
    return draw(st.lists(run, min_size=1, max_size=4))


@settings(max_examples=15, deadline=None)
@given(histories(), st.integers(1, 4), st.booleans())
def test_after_any_changes_the_store_is_as_if_made_from_scratch(
    history: list[dict[str, int]], size: int, stopped: bool
) -> None:
    """And nothing that the previous store has is recomputed. stopped: each run is stopped once before it publishes."""
    with TemporaryDirectory() as name:
        root, before = Path(name), {}
        for versions in history:
            computed: dict[str, int] = {}
            for last in [False, True][not stopped :]:
                writer = FeatureStoreWriter(
                    root / "store", root / "scratch", {"encoder": "x"}, list(versions), size,
                    ids={key: str(version) for key, version in versions.items()}, previous=[root / "store"],
                )  # fmt: skip
                for number, missing in writer.todo()[: None if last else 1]:
                    items = {key: {"x": np.array([versions[key], ord(key)], np.int32)} for key in missing}
                    assert not computed.keys() & items.keys()
                    computed |= {key: versions[key] for key in missing}
                    writer.write_shard(number, items)
            writer.publish()
            assert computed == {key: v for key, v in versions.items() if before.get(key) != v}
            store = FeatureStore.open(root / "store")
            assert {key: store.read(key)["x"].tolist() for key in store.keys()} == {
                key: [version, ord(key)] for key, version in versions.items()
            }
            assert verify(root / "store", deep=True) == []
            before = versions


# --- two runs ----------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from samlove.features.lock import only_run
with only_run(Path(sys.argv[1]), "x"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_at_the_same_time_is_refused_and_changes_nothing(project: Project) -> None:
    before = {path: path.read_bytes() for path in project.root.rglob("*") if path.is_file()}
    lock = project.root / "scratch" / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(SamloveError, match=rf"numbers: in use by another run \(process {holder.pid} on "):
        project.run()
    assert project.encoder.computed == []
    after = {path: path.read_bytes() for path in project.root.rglob("*") if path.is_file()}
    assert {path for path in {*before, *after} if before.get(path) != after.get(path)} == {lock}
    os.kill(holder.pid, signal.SIGKILL)  # the kernel releases the lock, whatever the lock file says
    holder.wait()
    project.run()


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stopped"), only_run(tmp_path / "lock", "x"):
            raise RuntimeError("stopped")
