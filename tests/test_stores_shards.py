"""Training shards: exchange with webdataset in both directions, views without copies, and what a reader must refuse."""

import io
import json
import mmap
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from samlove.errors import SamloveError
from stores import ShardReader, ShardWriter, listing
from stores.manifest import NAME, seal, write_json
from stores.shard_index import COLUMNS, INDEX, Member
from stores.table import TableWriter
from tests.small_disk import small_disk

SAMPLES = {
    "--clip.1": {
        "embed": np.arange(96, dtype=np.float16).reshape(2, 6, 8),
        "mask": np.array([True, False]),
        "rows": [{"row_id": "ü", "text": 0}],
    },
    "a long, long sentence; with marks. " * 9: {"embed": np.zeros((1, 2, 3), np.float16), "rows": {}},
    "_c": {"none": np.zeros((0, 3), np.uint8), "one": np.array(5, np.int64), "text": "plain"},
}


def write(root: Path, samples: dict, per_shard: int = 2) -> ShardReader:
    with ShardWriter(root, per_shard, {"made": "here"}) as writer:
        for key, sample in samples.items():
            writer.write(key, sample)
    return ShardReader(root)


def assert_sample(found: dict, key: str, sample: dict) -> None:
    assert found["__key__"] == key and list(found) == ["__key__", *sample]
    for name, value in sample.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype and found[name].shape == value.shape
            np.testing.assert_array_equal(found[name], value)
        else:
            assert found[name] == value


def make_tar(root: Path, members: list[tuple[str, bytes]], **changes) -> None:
    root.mkdir(exist_ok=True)
    with tarfile.open(root / "made.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in changes.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))


def npy(value: np.ndarray, allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, value, allow_pickle=allow_pickle)
    return stream.getvalue()


def keep_only_tars(root: Path) -> None:
    for name in (NAME, INDEX, "files.arrow"):
        (root / name).unlink()


@pytest.mark.parametrize("with_index", [True, False])
def test_round_trip_with_and_without_index(tmp_path, with_index):
    reader = write(tmp_path / "s", SAMPLES)
    assert reader.manifest["fingerprint"] == {"made": "here"} and reader.manifest["keys"] == 3
    if not with_index:
        keep_only_tars(tmp_path / "s")
    before = sorted(p.name for p in (tmp_path / "s").iterdir())
    reader = ShardReader(tmp_path / "s")
    assert len(reader) == 3
    for i, (key, sample) in enumerate(SAMPLES.items()):
        assert_sample(reader[i], key, sample)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == before  # nothing is added to a published folder
    with pytest.raises(IndexError):
        reader[3]


def test_the_rebuilt_index_equals_the_one_on_disk(tmp_path):
    written = write(tmp_path / "s", SAMPLES)
    assert pa.ipc.open_file(tmp_path / "s" / INDEX).read_all().num_rows == 3  # any Arrow reader reads it
    keep_only_tars(tmp_path / "s")
    rebuilt = ShardReader(tmp_path / "s")
    assert_same_index(rebuilt, written)


def assert_same_index(found: ShardReader, expected: ShardReader) -> None:
    def content(reader: ShardReader, i: int) -> tuple[str, int, list, list[Member]]:
        index = reader.index
        return index.key(i), index.shard(i), index.rows(i), index.members(i)

    assert [content(found, i) for i in range(len(found))] == [content(expected, i) for i in range(len(expected))]
    assert found.index.row_ends.tolist() == expected.index.row_ends.tolist()


def test_a_shard_set_of_schema_1_still_opens(tmp_path):
    """Its index was a JSON text, and its manifest listed all files."""
    written = write(tmp_path / "s", SAMPLES)
    files = {path.name: {"bytes": path.stat().st_size, "crc32c": "00000000"} for path in (tmp_path / "s").glob("*.tar")}
    shutil.copytree(tmp_path / "s", tmp_path / "old")
    for name in (INDEX, "files.arrow"):
        (tmp_path / "old" / name).unlink()
    (tmp_path / "old" / "index.json").write_text("{}")
    write_json(tmp_path / "old" / NAME, seal({"schema": 1, "fingerprint": {"made": "here"}, "keys": 3, "files": files}))
    old = ShardReader(tmp_path / "old")
    assert old.manifest["fingerprint"] == {"made": "here"}
    assert_same_index(old, written)
    assert_same_index(pickle.loads(pickle.dumps(old)), written)
    (tmp_path / "old" / "shard-00001.tar").unlink()
    with pytest.raises(SamloveError, match=r"shard-00001\.tar.*found no such file"):
        ShardReader(tmp_path / "old")


def test_opening_reads_no_shard(tmp_path):
    write(tmp_path / "s", SAMPLES)
    for path in (tmp_path / "s").glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    reader = ShardReader(tmp_path / "s")
    assert reader.keys() == list(SAMPLES) and reader.index.rows(0) == [{"row_id": "ü", "text": 0}]
    assert [reader.index.find(key) for key in (*SAMPLES, "none")] == [0, 1, 2, None]


def test_the_number_of_open_files_is_bounded(tmp_path):
    """Reading in random order, with samples held, and with no more than 64 open files allowed."""
    samples = {str(i): {"x": np.full(3, i)} for i in range(200)}
    write(tmp_path / "s", samples, per_shard=1)
    code = (
        "import resource, sys; from stores import ShardReader;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64));"
        "reader = ShardReader(sys.argv[1]);"
        "assert all(reader[i * 77 % 200]['x'].tolist() == [i * 77 % 200] * 3 for i in range(1000))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], check=True)


def test_arrays_are_aligned_read_only_views_of_the_file(tmp_path):
    reader = write(tmp_path / "s", SAMPLES)
    array = reader[0]["embed"]
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap.mmap)
    assert array.ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


dtypes = st.one_of(hnp.boolean_dtypes(), hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.floating_dtypes())
arrays = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sample=st.dictionaries(st.from_regex(r"[a-z0-9][a-z0-9_]{0,9}", fullmatch=True), arrays, min_size=1, max_size=4))
def test_any_array_comes_back(tmp_path, sample):
    reader = write(tmp_path / "s", {"k": sample})
    assert list(reader[0]) == ["__key__", *sample]
    for name, value in sample.items():
        assert reader[0][name].dtype == value.dtype
        np.testing.assert_array_equal(reader[0][name], value)


def test_non_contiguous_arrays_come_back(tmp_path):
    value = np.arange(24.0).reshape(2, 3, 4)
    reader = write(tmp_path / "s", {"k": {"f": np.asfortranarray(value), "t": value.transpose(2, 0, 1)[::-1]}})
    np.testing.assert_array_equal(reader[0]["f"], value)
    np.testing.assert_array_equal(reader[0]["t"], value.transpose(2, 0, 1)[::-1])


def test_webdataset_reads_what_shard_writer_wrote(tmp_path):
    write(tmp_path / "s", SAMPLES)
    tars = sorted(str(p) for p in (tmp_path / "s").glob("*.tar"))
    found = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode())
    assert len(found) == 3
    for sample, (key, expected) in zip(found, SAMPLES.items(), strict=True):
        assert "." not in sample["__key__"] and webdataset_key(sample["__key__"]) == key
        for name, value in expected.items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(sample[f"{name}.npy"], value)
            else:
                assert sample[f"{name}.json"] == value


def webdataset_key(key: str) -> str:
    from urllib.parse import unquote

    return unquote(key)


def test_shard_reader_reads_what_webdataset_wrote(tmp_path):
    samples = {
        "folder/50%2E-a": {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "rows": [1, "ü"]},
        "b": {"x": np.asfortranarray(np.arange(6.0).reshape(2, 3))},
    }
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for key, sample in samples.items():
            encoded = {f"{n}.{'npy' if isinstance(v, np.ndarray) else 'json'}": v for n, v in sample.items()}
            writer.write({"__key__": key, **encoded})
    with webdataset.TarWriter(str(tmp_path / "1.tar")) as writer:
        writer.write({"__key__": "c", "npy": np.ones(3, np.uint8), "json": {"a": 1}})
    reader = ShardReader(tmp_path)
    assert reader.manifest == {} and reader.keys() == ["folder/50%2E-a", "b", "c"]
    for i, sample in enumerate(samples.values()):
        for name, value in sample.items():
            np.testing.assert_array_equal(reader[i][name], value)
    assert reader[2]["npy"].tolist() == [1, 1, 1] and reader[2]["json"] == {"a": 1}


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("a.x.pkl", pickle.dumps(1))], "pickles never"),
        ([("a.x.pth", b"x")], "pickles never"),
        ([("a.x.npz", b"x")], "pickles never"),
        ([("a.x.npy", npy(np.array([{}]), allow_pickle=True))], "dtype"),
        ([("a.x.npy", npy(np.array([(1, 2.0)], "i4,f8")))], "dtype"),
        ([("a.x.npy", npy(np.array(["text"])))], "dtype"),
        ([("a.x.npy", b"\x93NUMPY\x01\x00")], "not an npy array"),
        ([("a.x.npy", b"no array at all")], "not an npy array"),
        ([("a.x.npy", npy(np.zeros(9)) + b"more")], "expected 200 bytes by its header, found 204"),
        ([("a.x.npy", npy(np.zeros(9))[:-8])], "expected an array within"),
        ([("a.x.npy", npy(np.zeros(9)).replace(b"(9,)", b"(-9,)").replace(b" \n", b"\n", 1))], "expected an array"),
        ([("a.x.npy", npy(np.zeros(9)).replace(b"(9,), }       ", b"(99999999999,)}"))], "expected an array within"),
        ([("/etc/a.x.npy", npy(np.zeros(1)))], "inside the folder"),
        ([("../a.x.npy", npy(np.zeros(1)))], "inside the folder"),
        ([("b/../../a.x.npy", npy(np.zeros(1)))], "inside the folder"),
        ([("README", b"text")], "expected KEY.NAME"),
        ([("a.x.json", b"1"), ("b.x.json", b"1"), ("a.y.json", b"1")], "are not contiguous"),
        ([("a.x.json", b"1"), ("a.x.json", b"1")], "occurs twice"),
    ],
)
def test_invalid_members_are_refused_and_the_tar_is_named(tmp_path, members, match):
    make_tar(tmp_path / "s", members)
    with pytest.raises(SamloveError, match=match) as error:
        ShardReader(tmp_path / "s")
    assert "made.tar" in str(error.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_members_that_are_not_files_are_refused(tmp_path, kind):
    make_tar(tmp_path / "s", [("a.x.npy", b"")], type=kind, linkname="/etc/passwd")
    with pytest.raises(SamloveError, match="expected a plain file"):
        ShardReader(tmp_path / "s")


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("size", [0, 100, 512, 1536, 5000])
def test_a_truncated_shard_is_named(tmp_path, with_index, size):
    write(tmp_path / "s", SAMPLES)
    if not with_index:
        keep_only_tars(tmp_path / "s")
    path = tmp_path / "s" / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(SamloveError, match=r"shard-00001\.tar.*truncated"):
        ShardReader(tmp_path / "s")


def test_missing_and_extra_shards_are_named(tmp_path):
    write(tmp_path / "s", SAMPLES)
    (tmp_path / "s" / "shard-00001.tar").rename(tmp_path / "away.tar")
    with pytest.raises(SamloveError, match=r"shard-00001\.tar.*found no such file"):
        ShardReader(tmp_path / "s")
    (tmp_path / "away.tar").rename(tmp_path / "s" / "shard-00001.tar")
    make_tar(tmp_path / "s", [("a.x.json", b"1")])
    with pytest.raises(SamloveError, match=r"made\.tar.*expected no such file"):
        ShardReader(tmp_path / "s")


def change_index(root: Path, metadata: dict | None = None, **changes) -> None:
    """Change the first row of the index, and its metadata. Without the manifest, its size may differ."""
    (root / NAME).unlink()
    found = pa.ipc.open_file(root / INDEX).read_all().to_pylist()
    known = json.loads(pa.ipc.open_file(root / INDEX).schema.metadata[b"samlove"])
    writer = TableWriter(COLUMNS, sorted_by="key")
    for number, row in enumerate(found):
        writer.add(**{name: row[name] for name in COLUMNS} | (changes if number == 0 else {}))
    (root / INDEX).unlink()
    writer.write(root / INDEX, known if metadata is None else metadata)


def numbers(*values: int) -> bytes:
    return np.array(values, "<i8").tobytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"place": numbers(10**9, 2, 6, 8)},
        {"place": numbers(-64, 2, 6, 8)},
        {"place": numbers(512, -1, 2, 8)},
        {"place": numbers(512, 10**12, 10**12, 10**12)},
        {"place": numbers(512, 2)},
        {"place": b"12345"},
        {"place": b""},
        {"layout": 9},
        {"layout": -1},
        {"shard": 2},
        {"shard": -1},
    ],
)
def test_an_index_with_a_wrong_entry_is_refused_when_the_sample_is_read(tmp_path, changes):
    write(tmp_path / "s", SAMPLES)
    change_index(tmp_path / "s", **changes)
    reader = ShardReader(tmp_path / "s")
    with pytest.raises(SamloveError, match=r"index\.arrow"):
        reader[0]
    assert reader[2]["text"] == "plain"


@pytest.mark.parametrize(
    "layouts",
    [
        None,
        [1],
        [[["x", "|O", "C", 1]]],
        [[["x", "<U8", "C", 1]]],
        [[["x", "nothing", "C", 1]]],
        [[["x", "(2,", "C", 1]]],
        [[["x", ["<f4"], "C", 1]]],
        [[["x", "<f4", "X", 1]]],
        [[["x", "<f4", "C", -1]]],
        [[["x", "<f4", "C", 1.0]]],
        [[["__key__"]]],
        [[[1]]],
        [[[]]],
    ],
)
def test_an_index_with_a_wrong_layout_is_refused(tmp_path, layouts):
    write(tmp_path / "s", SAMPLES)
    change_index(tmp_path / "s", metadata={"layouts": layouts} if layouts else {})
    with pytest.raises(SamloveError, match=r"index\.arrow: not a complete table \(layouts"):
        ShardReader(tmp_path / "s")


@pytest.mark.parametrize("name", ["../away.tar", "/etc/passwd", "sub/shard.tar"])
def test_a_list_of_files_that_points_outside_the_folder_is_refused(tmp_path, name):
    write(tmp_path / "s", SAMPLES)
    shutil.copy(tmp_path / "s" / "shard-00001.tar", tmp_path / "away.tar")
    writer = TableWriter(listing.COLUMNS)
    for path in ("shard-00000.tar", name):
        writer.add(path=path, bytes=(tmp_path / "s" / "shard-00001.tar").stat().st_size, crc32c=0)
    writer.write(tmp_path / "s" / "files.arrow")
    (tmp_path / "s" / NAME).unlink()
    with pytest.raises(SamloveError, match="truncated, missing or not in the index"):
        ShardReader(tmp_path / "s")


@pytest.mark.parametrize("file", [INDEX, "files.arrow"])
@pytest.mark.parametrize("value", [b"", b"{}", b"ARROW1\0\0", b"ARROW1\0\0" + bytes(4096)])
def test_a_broken_index_or_list_of_files_is_refused(tmp_path, file, value):
    write(tmp_path / "s", SAMPLES)
    (tmp_path / "s" / file).unlink()
    (tmp_path / "s" / file).write_bytes(value)
    with pytest.raises(SamloveError, match=rf"{file}: expected \d+ bytes, found {len(value)}"):
        ShardReader(tmp_path / "s")
    (tmp_path / "s" / NAME).unlink()
    with pytest.raises(SamloveError, match=rf"{file}: not a complete table"):
        ShardReader(tmp_path / "s")


@pytest.mark.parametrize(
    ("key", "sample", "match"),
    [
        ("", {"x": np.zeros(1)}, "found an empty string"),
        ("\udcff", {"x": np.zeros(1)}, "UTF-8"),
        ("k", {}, "at least one"),
        ("k", {"X": np.zeros(1)}, "lower-case"),
        ("k", {"x.y": np.zeros(1)}, "lower-case"),
        ("k", {"__key__": np.zeros(1)}, "lower-case"),
        ("k", {"x": np.array([None])}, "found dtype object"),
        ("k", {"x": np.array(["a"])}, "found dtype"),
        ("k", {"x": {1, 2}}, "JSON"),
        ("k", {"x": float("nan")}, "JSON"),
    ],
)
def test_a_sample_that_cannot_be_stored_is_refused_and_not_partly_written(tmp_path, key, sample, match):
    with ShardWriter(tmp_path / "s") as writer:
        with pytest.raises(SamloveError, match=match):
            writer.write(key, sample)
        writer.write("valid", {"x": np.ones(2)})
    assert ShardReader(tmp_path / "s").keys() == ["valid"]


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """Whether the disk fills up while samples are written, or when buffered data is flushed after the last one."""
    for samples in (8, 1):
        with small_disk(tmp_path / f"disk{samples}", 64) as disk:
            with pytest.raises(OSError, match="No space left on device"):
                with ShardWriter(disk / "shards", samples_per_shard=1) as writer:
                    for number in range(samples):
                        writer.write(str(number), {"x": np.zeros(100_000 // samples, np.uint8)})
            assert [*disk.iterdir()] == []
