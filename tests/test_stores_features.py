"""The Zarr feature store: dtypes, partial reads, progress, the failure log, kills and damage."""

import json
import multiprocessing
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zarr

from samlove.errors import RequestError, SamloveError
from stores import Failure, FeatureStore, FeatureStoreWriter, ShardWriter
from stores.remote import Cache, as_path
from tests.store_kinds import Steps, to_schema_1, tree

KEYS = [f"media_{i}" for i in range(5)]


def make_item(key: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(KEYS.index(key))
    return {
        "embed": rng.standard_normal((10, 3, 4, 4)).astype(np.float16),
        "audio": rng.standard_normal((10, 6)).astype(np.float32),
        "audio_valid": rng.random(10) > 0.5,
    }


def make_writer(root: Path, fingerprint: dict | None = None, **changes) -> FeatureStoreWriter:
    values = {"keys": KEYS, "shard_size": 2, **changes}
    return FeatureStoreWriter(root / "store", root / "scratch", fingerprint or {"encoder": "a"}, **values)


def fill(writer: FeatureStoreWriter) -> FeatureStore:
    for number, keys in writer.todo():
        writer.write_shard(number, {key: make_item(key) for key in keys})
    writer.publish()
    return FeatureStore.open(writer.path)


@pytest.mark.parametrize("chunk_rows", [None, 1, 3, 10, 99])
def test_round_trip_and_partial_reads(tmp_path, chunk_rows):
    store = fill(make_writer(tmp_path, chunk_rows=chunk_rows))
    assert store.manifest["arrays"]["embed"] == {"shape": [10, 3, 4, 4], "dtype": "float16"}
    assert store.manifest["fingerprint"] == {"encoder": "a"}
    assert "media_3" in store and "media_9" not in store
    for key in KEYS:
        for rows in (None, slice(0, 1), slice(4, 9), slice(None)):
            found = store.read(key, rows)
            for name, value in make_item(key).items():
                assert found[name].dtype == value.dtype
                np.testing.assert_array_equal(found[name], value if rows is None else value[rows])


def test_one_file_per_feature_and_shard(tmp_path):
    store = fill(make_writer(tmp_path, chunk_rows=1))
    data = [p for p in store.path.rglob("*") if p.is_file() and p.name != "zarr.json"]
    assert len(data) == 3 * 3 + 4  # three shards of three features; manifest, two tables and the failure log


def test_a_scalar_feature(tmp_path):
    writer = make_writer(tmp_path)
    for number, keys in writer.todo():
        writer.write_shard(number, {key: {"x": np.array(KEYS.index(key), np.int64)} for key in keys})
    writer.publish()
    assert FeatureStore.open(writer.path).read("media_4")["x"] == 4


def test_a_flipped_bit_is_found_and_affects_only_its_frame(tmp_path):
    store = fill(make_writer(tmp_path, chunk_rows=1))
    path = next((store.path / "shard-00001.zarr" / "embed" / "c").rglob("0/0"))
    path = path if path.is_file() else next(p for p in path.rglob("*") if p.is_file())
    data = bytearray(path.read_bytes())
    frame = make_item("media_2")["embed"][7].tobytes()
    data[bytes(data).index(frame) + 5] ^= 4
    path.write_bytes(data)
    store = FeatureStore.open(store.path)
    np.testing.assert_array_equal(store.read("media_2", slice(0, 7))["embed"], make_item("media_2")["embed"][:7])
    with pytest.raises(SamloveError, match=r"shard-00001.*media_2"):
        store.read("media_2", slice(7, 8))
    with pytest.raises(SamloveError, match="media_2"):
        store.read("media_2")


def test_a_missing_data_file_is_not_read_as_zeros(tmp_path):
    store = fill(make_writer(tmp_path))
    for path in (store.path / "shard-00000.zarr" / "audio" / "c").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(SamloveError, match="media_0"):
        FeatureStore.open(store.path).read("media_0")


@pytest.mark.parametrize("schema", [1, 2])
def test_a_missing_shard_is_named(tmp_path, schema):
    store = fill(make_writer(tmp_path))
    if schema == 1:
        to_schema_1(store.path)
    (store.path / "shard-00001.zarr").rename(tmp_path / "away")
    with pytest.raises(SamloveError, match="shard-00001.zarr"):
        FeatureStore.open(store.path).read("media_2")


def test_a_store_of_schema_1_reads_the_same(tmp_path):
    store = fill(make_writer(tmp_path, ids={key: key.upper() for key in KEYS}))
    keys, shards, ids = store.keys(), store.shards, [store.id_of(key) for key in KEYS]
    to_schema_1(store.path)
    old = FeatureStore.open(store.path)
    assert old.manifest["schema"] == 1
    assert (old.keys(), old.shards, [old.id_of(key) for key in KEYS]) == (keys, shards, ids)
    for key in KEYS:
        for name, value in old.read(key).items():
            np.testing.assert_array_equal(value, make_item(key)[name])


def test_the_index_lists_every_item_in_order(tmp_path):
    store = fill(make_writer(tmp_path, ids={key: key.upper() for key in KEYS}))
    rows = pyarrow.ipc.open_file(store.path / "index.arrow").read_all().drop(["order"]).to_pylist()
    assert rows == [{"key": k, "id": k.upper(), "shard": n // 2, "row": n % 2} for n, k in enumerate(KEYS)]
    assert (store.manifest["schema"], store.manifest["keys"], store.manifest["shards"]) == (2, 5, 3)
    assert sorted(store.manifest["files"]) == ["failures.csv", "files.arrow", "index.arrow"]


def test_progress_is_kept_by_fingerprint_and_plan(tmp_path):
    writer = make_writer(tmp_path)
    assert [number for number, _ in writer.todo()] == [0, 1, 2]
    writer.write_shard(1, {key: make_item(key) for key in KEYS[2:4]})
    assert [number for number, _ in make_writer(tmp_path).todo()] == [0, 2]
    assert len(make_writer(tmp_path, {"encoder": "b"}).todo()) == 3
    moved = make_writer(tmp_path, keys=[*KEYS[1:], "new"])  # media_2 and media_3 stay where they are
    assert moved.todo() == [(0, ["media_1", "media_4"]), (2, ["new"])]
    assert len(make_writer(tmp_path, chunk_rows=1).todo()) == 3
    assert [number for number, _ in make_writer(tmp_path, keys=[*KEYS, "new"]).todo()] == [0, 2]


def test_failures_are_logged_and_retried(tmp_path):
    writer = make_writer(tmp_path)
    for number, keys in writer.todo():
        writer.write_shard(number, {key: make_item(key) for key in keys if key not in ("media_1", "media_4")})
    assert [number for number, _ in writer.todo()] == [0, 2]  # shard 2 held only media_4
    failures = [Failure("media_1", "sam2", "truncated, frame 3"), Failure("media_4", "sam2", "no\nfile")]
    with pytest.raises(SamloveError, match=r"shard 2: 1 items missing.*media_4"):
        writer.publish(failures[:1])
    writer.publish(failures)
    store = FeatureStore.open(writer.path)
    assert store.keys() == ["media_0", "media_2", "media_3"]
    assert store.failures == failures
    with pytest.raises(SamloveError, match="sam2 failed: truncated, frame 3"):
        store.read("media_1")
    with pytest.raises(SamloveError, match="not among its keys"):
        store.read("media_9")


def test_all_failed(tmp_path):
    writer = make_writer(tmp_path)
    for number, _ in writer.todo():
        writer.write_shard(number, {})
    writer.publish([Failure(key, "audio", "silent") for key in KEYS])
    store = FeatureStore.open(writer.path)
    assert len(store) == 0 and len(store.failures) == 5 and store.manifest["shards"] == 0


def test_an_unwritten_shard_is_not_published(tmp_path):
    writer = make_writer(tmp_path)
    writer.write_shard(0, {key: make_item(key) for key in KEYS[:2]})
    with pytest.raises(SamloveError, match="shard 1: 2 items missing"):
        writer.publish()
    assert not writer.path.exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"embed": np.full((10, 3, 4, 4), np.inf, np.float16)}, "media_1.*embed.*infinity"),
        ({"audio": np.full((10, 6), np.nan, np.float32)}, "media_1.*audio.*NaN"),
        ({"audio": np.zeros((9, 6), np.float32)}, "media_1.*expected arrays"),
        ({"audio": np.zeros((10, 6))}, "media_1.*expected arrays"),
        ({"extra": np.zeros(3, np.float32)}, "media_1.*expected arrays"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, change, match):
    writer = make_writer(tmp_path)
    with pytest.raises(SamloveError, match=match):
        writer.write_shard(0, {"media_0": make_item("media_0"), "media_1": {**make_item("media_1"), **change}})
    assert len(writer.todo()) == 3


@pytest.mark.parametrize("value", [np.array(["a"]), np.array([None]), np.zeros((0, 3), np.float32), np.zeros(2)])
def test_other_dtypes_and_empty_arrays_are_refused(tmp_path, value):
    with pytest.raises(SamloveError, match="expected a non-empty array"):
        make_writer(tmp_path).write_shard(0, {"media_0": {"x": value}})


def test_shards_with_different_shapes_are_not_published_together(tmp_path):
    writer = make_writer(tmp_path, keys=KEYS[:4])
    writer.write_shard(0, {key: make_item(key) for key in KEYS[:2]})
    writer.write_shard(1, {key: {"x": np.zeros(3, np.float32)} for key in KEYS[2:4]})
    with pytest.raises(SamloveError, match="shard 1 holds"):
        writer.publish()


@pytest.mark.parametrize(
    ("keys", "match"),
    [(["a", "b", "a"], r"expected each key once, found repeated keys: \['a'\]"), (["a", "\udcff"], "UTF-8")],
)
def test_keys_that_no_store_can_have_are_refused_at_once(tmp_path, keys, match):
    with pytest.raises(RequestError, match=match):
        make_writer(tmp_path, keys=keys)


def test_foreign_keys_and_bad_sizes_are_refused(tmp_path):
    with pytest.raises(SamloveError, match="not planned for shard 0"):
        make_writer(tmp_path).write_shard(0, {"media_4": make_item("media_4")})
    with pytest.raises(RequestError, match="at least 1"):
        make_writer(tmp_path, shard_size=0)


def test_a_manifest_that_contradicts_its_shards_is_refused(tmp_path):
    store = fill(make_writer(tmp_path))
    path = store.path / "manifest.json"
    path.write_text(json.dumps({**store.manifest, "keys": 7}))
    with pytest.raises(SamloveError, match="expected 7 keys"):
        FeatureStore.open(store.path)
    path.write_text(json.dumps({**store.manifest, "schema": 99}))
    with pytest.raises(SamloveError, match="expected schema 1 or 2, found 99"):
        FeatureStore.open(store.path)


@pytest.mark.parametrize("part", ["shards", "arrays"])
@pytest.mark.parametrize("name", ["..", ".", "", "../other/{}", "/etc/{}", "sub/../../other/{}", "{}/../{}", None, 3])
@pytest.mark.parametrize("by_url", [False, True])
def test_a_manifest_whose_names_point_outside_is_refused(tmp_path, part, name, by_url):
    store = fill(make_writer(tmp_path))
    if part == "shards":
        to_schema_1(store.path)  # schema 2 has only their number
    shutil.copytree(store.path, tmp_path / "other")  # what a name that points outside the store could reach
    manifest = FeatureStore.open(store.path).manifest
    if part == "shards":
        manifest["shards"][1]["name"] = name.replace("{}", "shard-00001.zarr") if isinstance(name, str) else name
    else:
        manifest["arrays"][name.replace("{}", "audio") if isinstance(name, str) else name] = manifest["arrays"]["audio"]
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    where = as_path(f"file://{store.path}", Cache(tmp_path / "cache", 10**9)) if by_url else store.path
    if part == "arrays" and not isinstance(name, str):  # JSON turns it into a string, and no array has that name
        with pytest.raises(SamloveError, match="media_0"):
            FeatureStore.open(where).read("media_0")
    else:
        with pytest.raises(SamloveError, match=r"manifest\.json: expected .*, found"):
            FeatureStore.open(where)


@pytest.mark.parametrize("name", ["..", "a/b", "/a", ""])
def test_an_array_is_not_written_under_a_name_that_points_outside(tmp_path, name):
    with pytest.raises(SamloveError, match="'media_0': expected the plain name"):
        make_writer(tmp_path).write_shard(0, {"media_0": {name: np.zeros(3, np.float32)}})


@pytest.mark.parametrize("change", [{"shards": None}, {"shards": [1]}, {"shards": [{}]}, {"arrays": None}, {"keys": 0}])
def test_a_manifest_of_something_else_is_refused(tmp_path, change):
    store = fill(make_writer(tmp_path))
    if "shards" in change:
        to_schema_1(store.path)
    manifest = FeatureStore.open(store.path).manifest
    (store.path / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(SamloveError, match="store"):
        FeatureStore.open(store.path)
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write("a", {"x": np.zeros(3)})
    with pytest.raises(SamloveError, match=r"manifest\.json: not a feature store's manifest"):
        FeatureStore.open(tmp_path / "shards")


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize(
    "shape", [[2, 10**9, 10**9], [2, 10**13, 6], [2, -1, 6], [10**12, 10, 6], [2, 10], [2.5, 10, 6], []]
)
def test_a_size_that_does_not_fit_is_refused(tmp_path, shape, compression):
    store = fill(make_writer(tmp_path, compression=compression))
    path = store.path / "shard-00000.zarr" / "audio" / "zarr.json"
    meta = json.loads(path.read_text())
    meta["shape"] = shape
    path.write_text(json.dumps(meta))
    with pytest.raises(SamloveError, match=r"shard-00000.*media_0"):
        FeatureStore.open(store.path).read("media_0")


@pytest.mark.parametrize("chunk_rows", [None, 1, 3])
def test_zarr_itself_reads_the_same(tmp_path, chunk_rows):
    store = fill(make_writer(tmp_path, chunk_rows=chunk_rows))
    for shard in store.shards:
        group = zarr.open_group(store.path / shard, mode="r")
        for row, key in enumerate(group.attrs["keys"]):
            for rows in (slice(None), slice(0, 1), slice(2, 7), slice(-3, None), slice(9, 99), slice(5, 2)):
                for name, value in store.read(key, rows).items():
                    expected = group[name][row, rows]
                    assert value.dtype == expected.dtype and value.flags.writeable
                    np.testing.assert_array_equal(value, expected)


def test_an_array_that_another_program_laid_out_is_refused(tmp_path):
    store = fill(make_writer(tmp_path))
    group = zarr.open_group(store.path / "shard-00000.zarr", mode="a")
    group.create_array("audio", data=np.zeros((2, 10, 6), np.float32), overwrite=True)
    with pytest.raises(SamloveError, match="media_0"):
        FeatureStore.open(store.path).read("media_0")


def test_a_truncated_data_file_is_named(tmp_path):
    store = fill(make_writer(tmp_path))
    path = store.path / "shard-00000.zarr" / "embed" / "c" / "0" / "0" / "0" / "0" / "0"
    data = path.read_bytes()
    for size in (0, 1, 30, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(SamloveError, match=r"shard-00000.*media_0"):
            FeatureStore.open(store.path).read("media_0")


def _run(root: Path, diary: Path, kill_at: int, report: Path) -> None:
    steps = Steps(kill_at)
    writer = make_writer(root)
    for number, keys in writer.todo():
        with open(diary, "a") as file:
            file.write(f"{number}\n")
        writer.write_shard(number, {key: make_item(key) for key in keys})
    writer.publish()
    total, steps.kill_at = steps.seen, -1
    report.write_text(str(total))


def test_killed_runs_resume_to_the_same_bytes(tmp_path):
    context, report = multiprocessing.get_context("fork"), tmp_path / "steps"

    def run(name: str, kill_at: int) -> int | None:
        process = context.Process(target=_run, args=(tmp_path / name, tmp_path / f"{name}_diary", kill_at, report))
        process.start()
        process.join(60)
        return process.exitcode

    assert run("whole", -1) == 0
    expected, steps = tree(tmp_path / "whole" / "store"), int(report.read_text())
    for attempt in range(4):  # each kill later in the run, of which less remains
        assert run("killed", steps * (attempt + 1) // 8) == -signal.SIGKILL
    assert run("killed", -1) == 0
    assert tree(tmp_path / "killed" / "store") == expected
    assert not any(p.is_file() for p in (tmp_path / "killed" / "scratch").rglob("*"))
    computed = (tmp_path / "killed_diary").read_text().split()
    assert set(computed) == {"0", "1", "2"} and len(computed) <= 3 + 4  # a kill costs only the shard being written
