"""Files from strangers: what docs/security.md says is refused is refused, in one line, and nothing outside is read.

Here is one case of each kind; tests/test_fuzz.py changes files at random.
"""

import atexit
import fcntl
import io
import json
import os
import re
import shutil
import signal
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import google_crc32c
import h5py
import numpy as np
import pytest
import torch
from numcodecs.zstd import Zstd

from samlove.errors import RequestError, SamloveError
from samlove.features.audio_embed import import_audio_embed
from samlove.model.checkpoint import load_model, read_tensors, write_tensors
from samlove.model.sam2_build import instantiate_sam2
from samlove.model.weights import load_state_dict
from stores import (
    ExportReader,
    Failure,
    FeatureStore,
    FeatureStoreWriter,
    PredictionReader,
    PredictionWriter,
    ShardReader,
    ShardWriter,
    TensorReader,
    export_store,
    import_store,
    predictions,
    sealed,
)
from stores.chunks import LIMIT, Compression, ShardArray
from stores.codec import decode
from stores.fingerprint import DEPTH, parse_json
from stores.inspect import diff, open_artefact
from stores.manifest import render_json, seal
from stores.tar import scan_tar
from stores.tensors import damage
from stores.verify import verify
from tests.store_kinds import to_schema_1, tree
from tests.test_checkpoint import made  # noqa: F401
from tests.tiny_training import CONFIG

SECRET = b"a secret of the reader, which must not get into any artefact"
MEGABYTE = 2**20


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file to which no artefact may lead."""
    path = tmp_path / "outside" / "secret"
    path.parent.mkdir()
    path.write_bytes(SECRET)
    return path


@cache
def _made(compression: Compression) -> Path:
    """A folder with a store, its export and a predictions file, from which each test copies what it changes."""
    root = Path(mkdtemp())
    atexit.register(shutil.rmtree, root)
    writer = FeatureStoreWriter(root / "store", root / "scratch", {"encoder": "x"}, ["a", "b", "c"], 2, 2, compression)
    item = {
        "x": np.ones((3, 5), np.float32),
        "n.int8": np.ones((1, 2), np.int8),
        "n.scale": np.ones((1, 2), np.float32),
    }
    for number, keys in writer.plan():
        writer.write_shard(number, {key: item for key in keys if key != "b"})
    writer.publish([Failure("b", "audio", "no sound")])
    export_store(root / "store", root / "export.h5")
    edges = np.linspace(0, 1, 255, dtype=np.float32)
    with PredictionWriter(root / "predictions.h5", 2, 4, edges, {"made": "here"}) as predicted:
        predicted.write(["a", "b"], np.arange(64, dtype=np.uint8).reshape(2, 2, 4, 4))
    return root


def make_store(root: Path, compression: Compression = "none") -> Path:
    return Path(shutil.copytree(_made(compression) / "store", root / "store"))


def make_export(root: Path) -> Path:
    return Path(shutil.copy(_made("none") / "export.h5", root / "made.h5"))


def make_predictions(root: Path) -> Path:
    return Path(shutil.copy(_made("none") / "predictions.h5", root / "made.h5"))


def create(file: h5py.Group, name: str, length: int, change: Callable[[h5py.h5p.PropDCID], object]) -> None:
    """A dataset of bytes with changed creation properties."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    change(properties)
    space = h5py.h5s.create_simple((length,))
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.STD_U8LE, space, properties)


def external(file: h5py.Group, name: str, outside: Path) -> None:
    create(file, name, len(SECRET), lambda properties: properties.set_external(os.fsencode(outside), 0, len(SECRET)))


def virtual(file: h5py.File, outside: Path) -> None:
    layout = h5py.VirtualLayout((3,), np.uint8)
    layout[:] = h5py.VirtualSource(outside, "x", (3,))
    file.create_virtual_dataset("new", layout)


def plugin(properties: h5py.h5p.PropDCID) -> None:
    properties.set_chunk((3,))
    properties.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, (1,))  # HDF5 would look for a library with it, and load it


HAZARDS: dict[str, Callable[[h5py.File, Path], object]] = {
    "external raw storage": lambda file, outside: external(file, "new", outside),
    "virtual dataset": virtual,
    "external link": lambda file, outside: file.__setitem__("new", h5py.ExternalLink(outside, "/")),
    "external link below": lambda file, outside: file.create_group("new").__setitem__(
        "x", h5py.ExternalLink(outside, "/")
    ),
    "soft link": lambda file, _: file.__setitem__("new", h5py.SoftLink(next(iter(file)))),
    "dangling link": lambda file, _: file.__setitem__("new", h5py.SoftLink("/nowhere")),
    "filter of a plugin": lambda file, _: create(file, "new", 3, plugin),
    "gzip": lambda file, _: file.create_dataset("new", data=np.zeros(10**6, np.uint8), compression="gzip"),
    "cycle of groups": lambda file, _: file.create_group("new").__setitem__("x", file["/"]),
    "two links to one object": lambda file, _: file.__setitem__("new", file[next(iter(file))]),
    "committed type": lambda file, _: file.__setitem__("new", np.dtype("f4")),
    "deep groups": lambda file, _: file.create_group("new/" * 200),
    "compound type": lambda file, _: file.create_dataset("new", (1,), np.dtype("u1,f4")),
    "opaque type": lambda file, _: file.create_dataset("new", (1,), np.dtype("V8")),
    "reference": lambda file, _: file.create_dataset("new", (1,), h5py.ref_dtype),
    "sequences": lambda file, _: file.create_dataset("new", (1,), h5py.vlen_dtype(np.uint8)),
    "enum": lambda file, _: file.create_dataset("new", (1,), h5py.enum_dtype({"a": 1, "b": 2, "c": 3})),
    "10 TB of fill value": lambda file, _: file.create_dataset("new", (10**13,), np.uint8, fillvalue=7),
    "10 TB in chunks": lambda file, _: file.create_dataset("new", (10**13,), np.uint8, chunks=(10**6,)),
    "2 GB in one chunk": lambda file, _: file.create_dataset("new", (1,), np.uint8, maxshape=(None,), chunks=(2**31,)),
}
READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "import": (make_export, lambda path: import_store(path, path.parent / "back")),
    "export": (make_export, ExportReader),
    "info": (make_export, open_artefact),
    "predictions": (make_predictions, PredictionReader),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("hazard", HAZARDS)
def test_an_hdf5_file_with_anything_that_this_package_does_not_write_is_refused(tmp_path, outside, reader, hazard):
    make, read = READERS[reader]
    path = make(tmp_path)
    with h5py.File(path, "a") as file:
        HAZARDS[hazard](file, outside)
    before = tree(tmp_path)
    with pytest.raises(SamloveError, match=r"made\.h5: (cannot be imported|not a complete)"):
        read(path)
    assert tree(tmp_path) == before


def test_no_byte_of_another_file_gets_into_an_imported_store(tmp_path, outside):
    path = make_export(tmp_path)
    with h5py.File(path, "a") as file:
        del file["files/failures.csv"]
        external(file["files"], "failures.csv", outside)
        assert file["files/failures.csv"][()].tobytes() == SECRET  # as HDF5 itself reads it
    with pytest.raises(SamloveError, match="outside the file"):
        import_store(path, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_chunk_shorter_than_its_checksum_is_refused(tmp_path):
    """HDF5 2.0 itself reads beyond its memory."""
    path = make_export(tmp_path)
    with h5py.File(path) as file:
        size = file["arrays/x"].id.get_chunk_info(1).size
    record, short = (struct.pack("<II4Q", number, 0, 1, 0, 0, 0) for number in (size, 2))
    assert path.read_bytes().count(record) == 1
    path.write_bytes(path.read_bytes().replace(record, short))
    with pytest.raises(SamloveError, match=f"arrays/x: expected chunks of {size} bytes"):
        ExportReader(path)


@pytest.mark.parametrize("ends", ["Segmentation fault", "CPU time limit exceeded"])
def test_a_crash_or_a_hang_of_the_hdf5_library_is_an_error(tmp_path, monkeypatch, ends):
    def crash(path: Path) -> str:
        while ends == "CPU time limit exceeded":
            pass
        os.kill(os.getpid(), signal.SIGSEGV)
        return ""

    path = make_predictions(tmp_path)
    monkeypatch.setattr(sealed, "_fault", crash)
    monkeypatch.setattr(sealed, "CHECK_SECONDS", 1)
    with pytest.raises(SamloveError, match=f"the HDF5 library cannot read it: {ends}"):
        PredictionReader(path)


@pytest.mark.parametrize("reader", READERS)
def test_hdf5_files_are_read_without_a_lock(tmp_path, reader):
    """Some file systems have no locks; here another program holds the lock."""
    make, read = READERS[reader]
    path = make(tmp_path)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        read(path)


def chunk(content: bytes) -> bytes:
    """A chunk of compressed bins, with HDF5's checksum."""
    data = zlib.compress(content)
    return data + struct.pack("<HH", *predictions._fletcher32(data))


def header(**change: object) -> np.ndarray:
    return np.frombuffer(json.dumps({"schema": 2, "attrs": {}, **change}).encode(), np.uint8)


PARTS: dict[str, tuple[str, Any, str]] = {
    "ids of variable length": ("row_ids", np.array(["a", "b"], h5py.string_dtype()), "of fixed length"),
    "an id twice": ("row_ids", np.array(["a", "a"], "S1"), "each row once"),
    "an id that is not UTF-8": ("row_ids", np.array([b"a", b"\xff"], "S1"), "utf-8"),
    "fewer ids": ("row_ids", np.array(["a"], "S1"), r"expected bins \(1,T,H,W\)"),
    "numbers as ids": ("row_ids", np.array([1, 2]), "of fixed length"),
    "falling edges": ("edges", np.linspace(1, 0, 255, dtype=np.float32), "increasing edges"),
    "NaN among the edges": ("edges", np.array([0, np.nan, 1], np.float32), "increasing edges"),
    "too many edges": ("edges", np.zeros(256, np.float32), "increasing edges"),
    "edges of another dtype": ("edges", np.zeros(255), "increasing edges"),
    "another schema": ("header", header(schema=1), "expected schema 2, found 1"),
    "attrs that are a list": ("header", header(attrs=[1]), "a JSON object"),
    "a header that is a list": ("header", np.frombuffer(b"[1]", np.uint8), "indices must be integers"),
    "no header": ("header", np.zeros(0, np.uint8), "Expecting value"),
    "uncompressed bins": ("bins", np.zeros((2, 2, 4, 4), np.uint8), "expected bins"),
}


@pytest.mark.parametrize("case", PARTS)
def test_predictions_whose_parts_do_not_fit_together_are_refused(tmp_path, case):
    path, (name, value, match) = make_predictions(tmp_path), PARTS[case]
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = value
    with pytest.raises(SamloveError, match=rf"made\.h5: not a complete predictions file .*{match}"):
        PredictionReader(path)


@pytest.mark.parametrize(
    ("stored", "match"),
    [
        (chunk(bytes(32))[:-4] + b"\0\0\0\0", "checksum mismatch"),
        (chunk(bytes(31)), "expected 32 bytes, found 31"),
        (chunk(bytes(33)), "expected 32 bytes, found more"),
        (chunk(bytes(100 * MEGABYTE)), "expected 32 bytes, found more"),
        (chunk(bytes(32))[:3], "expected chunks of"),
        (b"\0" * 4, "expected 32 bytes, found 0"),
    ],
)
def test_a_row_of_predictions_that_inflates_to_another_size_is_refused_in_little_memory(tmp_path, stored, match):
    path = make_predictions(tmp_path)
    with h5py.File(path, "a") as file:
        file["bins"].id.write_direct_chunk((1, 0, 0, 0), stored)
    tracemalloc.start()
    with pytest.raises(SamloveError, match=rf"made\.h5: .*{match}"):
        PredictionReader(path).read("b")
    assert tracemalloc.get_traced_memory()[1] < 4 * MEGABYTE
    tracemalloc.stop()


def test_predictions_with_huge_rows_are_refused(tmp_path):
    path, side = make_predictions(tmp_path), 2**16
    with h5py.File(path, "a") as file:
        del file["bins"]
        options = {"chunks": (1, 1, side, side - 1), "compression": "gzip", "fletcher32": True}
        file.create_dataset("bins", (2, 1, side, side - 1), np.uint8, **options)
        for row in range(2):
            file["bins"].id.write_direct_chunk((row, 0, 0, 0), chunk(b""))
    with pytest.raises(SamloveError, match=f"of at most {LIMIT} bytes"):
        PredictionReader(path)


# Feature stores


def change_layout(meta: dict) -> dict[str, Callable[[], object]]:
    """Changes of an array's zarr.json, by what they are."""
    sharding = meta["codecs"][0]["configuration"]
    grid = meta["chunk_grid"]["configuration"]

    def everywhere(axis: int, length: object) -> None:
        for shape in (meta["shape"], grid["chunk_shape"], sharding["chunk_shape"]):
            shape[axis] = length

    return {
        "object": lambda: meta.update(data_type="object"),
        "text": lambda: meta.update(data_type="str"),
        "date": lambda: meta.update(data_type="datetime64[s]"),
        "record": lambda: meta.update(data_type="f4,f4"),
        "half a tuple": lambda: meta.update(data_type="(2,"),
        "dtype that is no text": lambda: meta.update(data_type={"name": "float32"}),
        "big-endian": lambda: sharding["codecs"][0]["configuration"].update(endian="big"),
        "big-endian index": lambda: sharding["index_codecs"][0]["configuration"].update(endian="big"),
        "other codec": lambda: sharding["codecs"].insert(1, {"name": "numcodecs.pickle"}),
        "no checksum": lambda: sharding["codecs"].pop(),
        "no sharding": lambda: meta["codecs"][0].update(name="bytes"),
        "other names of files": lambda: meta["chunk_key_encoding"]["configuration"].update(separator="."),
        "index first": lambda: sharding.update(index_location="start"),
        "negative": lambda: everywhere(2, -5),
        "zero": lambda: everywhere(2, 0),
        "fraction": lambda: everywhere(2, 5.0),
        "true": lambda: everywhere(2, True),
        "10 TB": lambda: everywhere(2, 10**12),
        "beyond 64 bits": lambda: everywhere(2, 10**30),
        "chunk larger than the item": lambda: (sharding["chunk_shape"].__setitem__(1, 10**9),),
        "chunk of no rows": lambda: sharding["chunk_shape"].__setitem__(1, 0),
        "shard shorter than the item": lambda: grid["chunk_shape"].__setitem__(1, 2),
        "no axes": lambda: [shape.clear() for shape in (meta["shape"], grid["chunk_shape"], sharding["chunk_shape"])],
        "many axes": lambda: [
            shape.extend([1] * 100) for shape in (meta["shape"], grid["chunk_shape"], sharding["chunk_shape"])
        ],
        "a list": lambda: meta.update(codecs={"a": 1}),
        "nothing": meta.clear,
    }


LAYOUTS = list(change_layout({"codecs": [{"configuration": {}}], "chunk_grid": {"configuration": {}}}))


@pytest.mark.parametrize("change", LAYOUTS)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_an_array_in_another_layout_is_refused(tmp_path, compression, change):
    store = make_store(tmp_path, compression)
    path = store / "shard-00000.zarr" / "x" / "zarr.json"
    meta = json.loads(path.read_text())
    change_layout(meta)[change]()
    path.write_text(json.dumps(meta))
    with pytest.raises(SamloveError, match=r"shard-00000\.zarr: 'a' cannot be read"):
        FeatureStore.open(store).read("a")
    if compression == "none":
        with pytest.raises(SamloveError, match="shard-00000"):  # nor is it exported
            export_store(store, tmp_path / "made.h5")


def replace_first_chunk(array: Path, content: bytes) -> None:
    """Append a chunk to an array's file, with valid checksums, in place of its first one."""
    (path,) = (p for p in (array / "c").rglob("*") if p.is_file())
    data = path.read_bytes()
    entries = next(n for n in range(1, 9) if google_crc32c.value(data[-4 - 16 * n : -4]) == _number(data[-4:]))
    start = len(data) - 4 - 16 * entries
    index = struct.pack("<QQ", start, len(content) + 4) + data[start + 16 : -4]
    checked = [part + struct.pack("<I", google_crc32c.value(part)) for part in (content, index)]
    path.write_bytes(data[:start] + b"".join(checked))


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


FRAME = bytes(Zstd().encode(bytes(2 * 5 * 4)))  # a chunk of x


@pytest.mark.parametrize(
    "content",
    [
        bytes(Zstd().encode(bytes(100 * MEGABYTE))),
        FRAME[:4] + b"\xe0" + (10**12).to_bytes(8, "little") + FRAME[6:],  # claims 1 TB
        FRAME[:4] + b"\xe0" + (2 * 5 * 4 - 1).to_bytes(8, "little") + FRAME[6:],
        FRAME[:4] + b"\x00\x58" + FRAME[6:],  # does not say how much
        FRAME[:-1],
        FRAME[:4],
        b"\x50\x2a\x4d\x18" + bytes(4) + FRAME,  # after a frame to skip
        bytes(Zstd().encode(b"")),
        b"",
    ],
)
def test_a_chunk_that_holds_another_size_is_refused_in_little_memory(tmp_path, content):
    store = make_store(tmp_path, "zstd")
    replace_first_chunk(store / "shard-00000.zarr" / "x", FRAME)
    assert not FeatureStore.open(store).read("a")["x"][:2].any()
    replace_first_chunk(store / "shard-00000.zarr" / "x", content)
    tracemalloc.start()
    with pytest.raises(SamloveError, match=r"shard-00000\.zarr: 'a' cannot be read"):
        FeatureStore.open(store).read("a")
    assert tracemalloc.get_traced_memory()[1] < 4 * MEGABYTE
    tracemalloc.stop()


def test_encoded_features_in_other_dtypes_and_shapes_are_refused():
    values, scale = np.ones((2, 3, 4), np.int8), np.ones((2, 3, 1), np.float32)
    decode({"x.int8": values, "x.scale": scale})
    for arrays in (
        {"x.int8": values},
        {"x.int8": values, "x.scale": scale.astype(np.float64)},
        {"x.int8": values.astype(np.int16), "x.scale": scale},
        {"x.int8": values, "x.scale": scale[:, :2]},
        {"x.int8": values, "x.scale": scale[0]},
        {"x.int8": values[:, :, :1], "x.scale": np.ones((2, 3, 10**6), np.float32)},
        {"x.bfloat16": values},
    ):
        with pytest.raises(SamloveError, match=r"x\.(int8|bfloat16): expected"):
            decode(arrays)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5,
        '{"a": ' * (DEPTH + 1) + "1" + "}" * (DEPTH + 1),
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"schema": 1, "schema": 2}',
        '{"a": ' + "1" * 5000 + "}",
        '{"a": "' + "\\" * 100_001,
        '"' + '\\"' * 10**5,
        "\ufeff{}",
        '{"a": 1e999}',
        '{"a": "\\ud800"}',
        "",
    ],
)
def test_json_that_no_program_of_this_package_writes_is_refused(tmp_path, text):
    with pytest.raises(ValueError):
        parse_json(text)
    store = make_store(tmp_path)
    for path in (store / "manifest.json", store / "shard-00000.zarr" / "x" / "zarr.json"):
        content = path.read_bytes()
        path.write_text(text, encoding="utf-8")
        with pytest.raises(SamloveError, match=str(path.parent if path.name == "zarr.json" else path)[:-2]):
            FeatureStore.open(store).read("a")
        assert verify(store)
        path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [{"fingerprint": "x"}, {"fingerprint": ["x"]}, {"fingerprint": None}, {"arrays": ["x"]}, {"arrays": {"x": 1}},
     {"arrays": {"x": {"shape": 5, "dtype": "f"}}}, {"arrays": {"x": {"shape": [1]}}}, {"schema": 3}],
)  # fmt: skip
def test_a_manifest_whose_fields_have_other_forms_is_refused(tmp_path, change):
    store = make_store(tmp_path)
    export_store(store, tmp_path / "made.h5")
    manifest = seal({**json.loads((store / "manifest.json").read_text()), **change})
    (store / "manifest.json").write_text(json.dumps(manifest))
    for use in USES.values():
        with pytest.raises(SamloveError, match=r"manifest\.json: cannot be read \(expected"):
            use(store)
    with h5py.File(tmp_path / "made.h5", "a") as file:
        del file["files/manifest.json"]
        file["files/manifest.json"] = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    with pytest.raises(SamloveError, match=r"made\.h5: not a complete exported store"):
        ExportReader(tmp_path / "made.h5")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\0b", "\ud800", "x" * 300])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path, outside, name):
    store = make_store(tmp_path)
    manifest = json.loads((store / "manifest.json").read_text())
    changed: dict[str, dict] = {
        "files": {**manifest["files"], name: {"bytes": len(SECRET), "crc32c": "00000000"}},
        "arrays": {**manifest["arrays"], name: manifest["arrays"]["x"]},
    }
    for part, value in changed.items():
        text = json.dumps({**manifest, part: value})
        (store / "manifest.json").write_text(text)
        with pytest.raises(SamloveError):
            FeatureStore.open(store).read("a")
        with pytest.raises(SamloveError):
            export_store(store, tmp_path / "made.h5")
        assert verify(store)


@pytest.mark.parametrize(
    "log", [b"", b"key,stage\na,b\n", b"key,stage,error\na\n", b"key,stage,error\na,b,c,d\n", b"\xff\n", b"a\0b\n",
            b"key,stage,error\n" + b"x" * 200_000],
)  # fmt: skip
def test_a_damaged_failure_log_is_refused(tmp_path, log):
    store = make_store(tmp_path)
    (store / "failures.csv").write_bytes(log)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["files"]["failures.csv"] = {"bytes": len(log), "crc32c": f"{google_crc32c.value(log):08x}"}
    (store / "manifest.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(SamloveError, match=r"failures\.csv: not a failure log"):
        _ = FeatureStore.open(store).failures
    export_store(store, tmp_path / "made.h5")
    with pytest.raises(SamloveError, match=r"made\.h5: not a complete exported store"):
        ExportReader(tmp_path / "made.h5")


# Links


def test_a_store_of_links_into_a_cache_is_read_verified_and_exported(tmp_path):
    """DVC leaves such links with cache.type symlink."""
    store = make_store(tmp_path)
    expected = {key: FeatureStore.open(store).read(key) for key in ("a", "c")}
    (tmp_path / "cache").mkdir()
    for number, path in enumerate([p for p in store.rglob("*") if p.is_file()]):
        path.rename(tmp_path / "cache" / str(number))
        path.symlink_to(tmp_path / "cache" / str(number))
    assert verify(store, deep=True) == []
    export_store(store, tmp_path / "made.h5")
    for reader in (FeatureStore.open(store), ExportReader(tmp_path / "made.h5")):
        for key, arrays in expected.items():
            np.testing.assert_equal(reader.read(key), arrays)


def test_an_export_holds_no_file_to_which_a_link_in_a_store_leads(tmp_path, outside):
    store = make_store(tmp_path)
    (store / "notes.txt").symlink_to(outside)  # listed nowhere
    export_store(store, tmp_path / "made.h5")
    assert SECRET not in (tmp_path / "made.h5").read_bytes()
    (tmp_path / "made.h5").unlink()
    group = store / "shard-00000.zarr" / "x" / "zarr.json"  # listed, with another checksum
    content = group.read_bytes()
    outside.write_bytes(SECRET.ljust(len(content)))
    group.unlink()
    group.symlink_to(outside)
    with pytest.raises(SamloveError, match=r"zarr\.json: damaged: its bytes do not match its checksum"):
        export_store(store, tmp_path / "made.h5")
    assert not (tmp_path / "made.h5").exists()


def test_a_pipe_in_place_of_a_file_does_not_block(tmp_path):
    store = make_store(tmp_path)
    for path in (store / "shard-00000.zarr" / "x" / "zarr.json", store / "shard-00000.zarr" / "x" / "c" / "0" / "0"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
        os.mkfifo(path)
        with pytest.raises(SamloveError, match="cannot be read"):
            FeatureStore.open(store).read("a")
    (tmp_path / "shards").mkdir()
    os.mkfifo(tmp_path / "shards" / "0.tar")
    with pytest.raises(SamloveError, match="expected a tar file"):
        ShardReader(tmp_path / "shards")


def relist(path: Path) -> None:
    """Write the size and checksum of a file, which need not be a plain one, into the manifest beside it."""
    manifest = json.loads((path.parent / "manifest.json").read_text())
    data = path.read_bytes() if path.is_file() else b""
    manifest["files"][path.name] = {"bytes": len(data), "crc32c": f"{google_crc32c.value(data):08x}"}
    (path.parent / "manifest.json").write_text(render_json(seal(manifest)))


def everything(path: Path) -> None:
    store = FeatureStore.open(path)
    _ = store.failures
    for key in store.keys():
        store.read(key)


USES: dict[str, Callable[[Path], object]] = {
    "read": everything,
    "info": open_artefact,
    "export": lambda path: export_store(path, path.parent / "made.h5"),
    "diff": lambda path: diff(path, path),
}


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "device"])
@pytest.mark.parametrize("schema", [1, 2])
def test_a_pipe_or_a_device_in_place_of_any_file_is_refused(tmp_path, schema, put):
    """A pipe would block, and /dev/zero has no end. The manifest lists them as empty, which is their size."""
    source = make_store(tmp_path / "made")
    if schema == 1:
        to_schema_1(source)
    for name in [path.relative_to(source) for path in source.rglob("*") if path.is_file()]:
        store = Path(shutil.copytree(source, tmp_path / "store"))
        (store / name).unlink()
        put(store / name)
        if store / name in (store / "failures.csv", store / "index.arrow", store / "files.arrow"):
            relist(store / name)
        for use in ("read", "export") if len(name.parts) > 1 else USES:
            with suppress(SamloveError):  # not every use needs every file
                USES[use](store)
        assert verify(store, deep=True)
        shutil.rmtree(store)


def test_a_link_to_nothing_in_place_of_a_file_is_named(tmp_path):
    store = make_store(tmp_path)
    chunk = store / "shard-00000.zarr" / "x" / "c" / "0" / "0" / "0"
    chunk.unlink()
    chunk.symlink_to(tmp_path / "gone")
    with pytest.raises(SamloveError, match=rf"{chunk}: link to {tmp_path}/gone, which does not exist"):
        open_artefact(store)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").symlink_to(tmp_path / "gone")
    with pytest.raises(SamloveError, match=r"0\.tar: link to .*, which does not exist"):
        ShardReader(tmp_path / "shards")


# Tar


def member(name: str = "a.x.json", data: bytes = b"1", **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def with_size(size: int) -> bytes:
    """A member whose header says that it has `size` bytes, in base 256."""
    header = bytearray(member()[:512])
    header[124:136] = (size % 256**12).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(512)


def npy(text: str, data: bytes = b"") -> bytes:
    """An npy file with this header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + data


PAX = tarfile.TarInfo.create_pax_global_header
TARS: dict[str, bytes] = {
    "size below zero, with which tarfile never ends": with_size(-1024),
    "size of -1": with_size(-1),
    "size beyond 64 bits": with_size(2**90),
    "thousands of long names": member("././@LongLink", b"x\0", type=tarfile.GNUTYPE_LONGNAME) * 2000 + member(),
    "long name of 8 GB": member("x", b"x\0", type=tarfile.GNUTYPE_LONGNAME).replace(b"00000000002", b"77777777777"),
    "many extended headers, of which each member has a copy": PAX({str(n): "x" for n in range(10_000)}) + member() * 9,
    "sparse file": member(type=tarfile.GNUTYPE_SPARSE),
    "damaged header between members": member() + b"\x01" * 512 + member("b.x.json"),
    "second tar behind the first": member() + bytes(1024) + member("b.x.json"),
    "name that is not UTF-8": member("a.\udcff.json"),
    "axes below zero": member("a.x.npy", npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -1)}", bytes(8))),
    "huge axes": member("a.x.npy", npy(f"{{'descr': '<f8', 'fortran_order': False, 'shape': (0, {10**30})}}")),
    "too many axes": member("a.x.npy", npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {(1,) * 40}}}", b"1")),
    "code in a header": member("a.x.npy", npy("{'descr': __import__('os').getpid(), 'fortran_order': 0, 'shape': ()}")),
    "brackets in a header": member("a.x.npy", npy("(" * 9000)),
    "header of 4 GB": member("a.x.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff{"),
}  # fmt: skip


@pytest.mark.parametrize("case", TARS)
def test_a_hostile_tar_is_refused_in_little_memory(tmp_path, case):
    path = tmp_path / "0.tar"
    path.write_bytes(TARS[case] + bytes(1024))
    tracemalloc.start()
    with pytest.raises(SamloveError, match=r"0\.tar"):
        scan_tar(path)
    assert tracemalloc.get_traced_memory()[1] < 100 * MEGABYTE
    tracemalloc.stop()


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff", b"1" * 5000])
def test_a_hostile_json_member_is_refused(tmp_path, text):
    for name in ("a.x.json", "a.rows.json"):
        (tmp_path / "0.tar").write_bytes(member(name, text) + bytes(1024))
        with pytest.raises(SamloveError):
            ShardReader(tmp_path)[0]


# Checkpoints, weights and audio embeddings


def safetensors(header: object, data: bytes = bytes(24), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**change: object) -> dict[str, object]:
    return {
        "__metadata__": {"samlove": "{}"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **change},
    }


SAFETENSORS: dict[str, bytes] = {
    "header of 1 EB": safetensors(entry(), length=2**60),
    "header longer than the file": safetensors(entry(), length=10**6),
    "deep header": safetensors(b'{"__metadata__":{"samlove":' + b"[" * 100_000),
    "deep text in the header": safetensors({"__metadata__": {"samlove": "[" * 100_000}}, b""),
    "list in the header": safetensors({"__metadata__": {"samlove": '[["a", 1]]'}}, b""),
    "offsets beyond the file": safetensors(entry(data_offsets=[0, 2**40])),
    "overlapping tensors": safetensors({**entry(), "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}),
    "shape of another size": safetensors(entry(shape=[2**40, 2**40])),
    "shape below zero": safetensors(entry(shape=[-2, -3])),
    "objects": safetensors(entry(dtype="OBJECT")),
    "a dtype that NumPy lacks": safetensors(entry(dtype="BF16", shape=[12])),
    "too many axes": safetensors(entry(shape=[1] * 70 + [6])),
    "the same tensor twice": safetensors(b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},' + b'"a":1}'),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_a_hostile_checkpoint_is_refused(tmp_path, case):
    path = tmp_path / "made.safetensors"
    path.write_bytes(SAFETENSORS[case])
    with pytest.raises(SamloveError, match=r"made\.safetensors"):
        reader = TensorReader(path)
        reader.read("a")
    with pytest.raises(SamloveError, match=r"made\.safetensors"):
        load_model(path)
    damage(path, deep=True)


@pytest.mark.parametrize(
    "change",
    [{"dims": {"audio": 10**12, "visual": 32, "text": 16, "frames": 3}}, {"fusion": {"dim": 8192, "blocks": 4096}}],
)
def test_a_checkpoint_cannot_ask_for_a_model_larger_than_its_file(made, change):  # noqa: F811
    *_, path = made
    tensors, stored = read_tensors(path)
    write_tensors(path, tensors, {**stored, **change})
    with pytest.raises(SamloveError, match=r"best\.safetensors: expected"):
        load_model(path)


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "torch.load", "sam2.modeling.sam2_base.torch.nn.Linear", "sam2.build_sam.build_sam2",
     "sam2.modeling.sam2_utils.get_activation_fn", "sam2.modeling.nothing.Nothing", "", "7"],
)  # fmt: skip
def test_the_configuration_that_a_checkpoint_names_can_call_nothing_but_sam2(tmp_path, target):
    text = Path(CONFIG).read_text()
    path = tmp_path / "sam2.yaml"
    path.write_text(text.replace("sam2.modeling.memory_encoder.CXBlock", repr(target)))
    assert path.read_text() != text
    with pytest.raises(RequestError, match=r"sam2\.yaml: expected classes of sam2\.modeling\."):
        instantiate_sam2(str(path), image_encoder=False)


@pytest.mark.parametrize(
    "change", [{"dims": {}}, {"dims": {"audio": 6, "visual": 8, "text": 10}}, {"features": {"audio": 5}}]
)
def test_a_checkpoint_whose_header_has_other_fields_is_refused(made, change):  # noqa: F811
    *_, path = made
    tensors, stored = read_tensors(path)
    write_tensors(path, tensors, {**stored, **change})
    with pytest.raises(SamloveError, match=rf"expected a header of schema 1.*{next(iter(change))}"):
        load_model(path)


class Reserved:
    """Unpickled, a call that reserves memory; torch allows it."""

    def __init__(self, function: Callable, size: int) -> None:
        self.call = function, (size,)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("function", [bytearray, torch.FloatTensor])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_reserves_memory_is_refused(tmp_path, function, zipped):
    path = tmp_path / "a.pt"
    torch.save(Reserved(function, 10**13), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SamloveError, match=rf"a\.pt: holds \S*{function.__name__}, which can reserve any memory"):
        load_state_dict(path)
    with pytest.raises(SamloveError, match=r"a\.pt: holds"):
        import_audio_embed(tmp_path, tmp_path / "out")


def test_tensors_that_share_their_memory_take_no_more_than_the_file(tmp_path):
    path, values = tmp_path / "a.pt", torch.zeros(2**16, dtype=torch.float16)
    torch.save({str(i): values[i:] for i in range(100)}, path)
    with pytest.raises(SamloveError, match=r"a\.pt: expected each tensor in its own memory"):
        load_state_dict(path)
    torch.save({str(i): values for i in range(100)}, path)  # tied weights
    loaded = load_state_dict(path)
    assert len(loaded) == 100 and len({tensor.data_ptr() for tensor in loaded.values()}) == 1


class Hostile:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize(
    "value",
    [
        Hostile(),
        {"audio": torch.zeros(10, 128)},
        torch.zeros(10, 128, device="meta"),
        torch.zeros(10, 128).to_sparse(),
        torch.zeros(10, 128, dtype=torch.complex64),
        torch.full((10, 128), float("nan")),
        torch.zeros(10, 129),
        torch.zeros(1).expand(10, 128),
        torch.nested.nested_tensor([torch.zeros(128)] * 10),
    ],
    ids=["code", "dict", "meta", "sparse", "complex", "nan", "shape", "expanded", "nested"],
)
def test_a_hostile_audio_embedding_is_refused(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    torch.save(value, tmp_path / "in" / "a.pt")
    with pytest.raises(SamloveError, match=r"a\.pt"):
        import_audio_embed(tmp_path / "in", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"in"}


def test_shard_sets_hold_no_pickles(tmp_path):
    with ShardWriter(tmp_path / "s") as writer:
        with pytest.raises(SamloveError, match="found dtype object"):
            writer.write("a", {"x": np.array([{}])})
    stream = io.BytesIO()
    np.save(stream, np.array([{}]), allow_pickle=True)
    (tmp_path / "0.tar").write_bytes(member("a.x.npy", stream.getvalue()) + bytes(1024))
    with pytest.raises(SamloveError, match="found dtype"):
        scan_tar(tmp_path / "0.tar")


def test_values_that_could_not_be_read_back_are_not_written(tmp_path):
    huge = np.broadcast_to(np.float32(0), (LIMIT // 4 + 1,))
    writer = FeatureStoreWriter(tmp_path / "store", tmp_path / "scratch", {}, ["a"], 1, compression="zstd")
    with pytest.raises(SamloveError, match=f"'a': x: expected at most {LIMIT} bytes"):
        writer.write_shard(0, {"a": {"x": huge}})
    with pytest.raises(RequestError, match=f"expected rows of at most {LIMIT} bytes"):
        PredictionWriter(tmp_path / "p.h5", 1, 2**16, np.zeros(1, np.float32))


def test_every_test_that_the_documentation_names_exists():
    named = set(re.findall(r"test_\w+", Path(__file__, "../../docs/security.md").resolve().read_text()))
    files = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    assert len(named) > 20 and named <= files | globals().keys()


def test_arrays_that_do_not_fit_in_their_file_are_refused(tmp_path):
    store = make_store(tmp_path)
    array = store / "shard-00000.zarr" / "x"
    (data,) = (p for p in (array / "c").rglob("*") if p.is_file())
    for size in (100, 30):
        data.write_bytes(data.read_bytes()[-size:])
        with pytest.raises(ValueError, match="does not fit|outside the file|checksum mismatch"):
            ShardArray(array).read(0)
