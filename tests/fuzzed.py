"""The parsers that tests/fuzzing.py fuzzes. Each function prepares valid files in a folder and returns the attempt."""

import io
import json
import os
import random
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import h5py
import numpy as np
import soundfile

from samlove.data.audit import parse_rows, row_faults, split_leaks
from samlove.data.dataset import CUE_COLUMNS, RefAvsFolder, load_audio
from samlove.errors import SamloveError
from stores import (
    ExportReader,
    FeatureStore,
    FeatureStoreWriter,
    PredictionReader,
    PredictionWriter,
    ShardReader,
    ShardWriter,
    TensorReader,
    export_store,
    import_store,
    tensors,
)
from stores import manifest as manifests
from stores.chunks import ShardArray
from stores.inspect import open_artefact
from stores.verify import verify
from tests.fuzzing import NUMBERS, Attempt, changed, mutate, mutate_json, to_text

CANARY = b"not for you, nor for anyone else"  # in a file outside: must never be read
FIELDS = {  # of a tar header: offset, length
    "name": (0, 100), "size": (124, 12), "type": (156, 1), "link": (157, 100), "magic": (257, 8), "prefix": (345, 155),
}  # fmt: skip


def _npy(value: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, value, version)
    return stream.getvalue()


def _summed(header: bytearray) -> bytes:
    """A tar header with its checksum."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def tar(folder: Path) -> Attempt:
    members = [
        ("a.x.npy", _npy(np.arange(6.0).reshape(2, 3))),
        ("a.rows.json", b'["r", 1]'),
        ("b/c.npy", _npy(np.ones(2, bool), (2, 0))),
    ]
    formats = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
    path = folder / "0.tar"
    npy_parts = [b"'descr': '<f8'", b"(2, 3)", b"False", b"{", b"}", b"'shape'"]
    npy_values = [
        b"'descr': '|O'", b"'descr': 'V8'", b"'descr': [('a', '<f8')]", b"'descr': '(2,)f4'", b"'descr': 'M8[s]'",
        b"(2, 3", b"(6,)", b"(-2, -3)", b"(2, 3.0)", b"(True, 6)", b"(6" + b",1" * 40 + b")", b"(0, 10**20)",
        b"(0," + b"9" * 30 + b")", b"(" * 300, b"__import__('os')", b"True", b"None", b"{'a':1,", b"\xff",
    ]  # fmt: skip

    def blocks(rng: random.Random) -> bytes:
        parts: list[bytes] = []
        long = rng.choice(("", "", "d" * 120 + "/", "ü/"))
        for name, data in rng.sample(members, rng.randrange(1, 4)):
            if rng.random() < 0.3:
                data = mutate(data, rng)
            elif rng.random() < 0.4:
                data = data.replace(rng.choice(npy_parts), rng.choice(npy_values), 1)
            info = tarfile.TarInfo(long + name)
            info.size = len(data)
            if rng.random() < 0.2:
                info.type = rng.choice((b"1", b"2", b"5", b"6", b"7", b"S", b"Z", b"g", b"x", b"L", b"K", b"\0"))
            if rng.random() < 0.2:
                records = {
                    "path": "x.y.npy",
                    "size": "9",
                    "GNU.sparse.map": "0,1",
                    "GNU.sparse.major": "1",
                    "hdrcharset": "x",
                    "comment": "a",
                }
                info.pax_headers = {
                    key: rng.choice((value, "-1", "9" * 30, "", "\0", "x" * 600))
                    for key, value in records.items()
                    if rng.random() < 0.4
                }
            try:
                header = bytearray(info.tobuf(rng.choice(formats)))
            except ValueError:  # ustar has no room for the name
                header = bytearray(info.tobuf(tarfile.PAX_FORMAT))
            if rng.random() < 0.5:
                start, length = FIELDS[rng.choice(list(FIELDS))]
                at = rng.randrange(len(header) // 512) * 512
                number = rng.choice(NUMBERS) * rng.choice((1, 1, -1, 512, -512))
                value = rng.choice((
                    mutate(bytes(header[at + start : at + start + length]), rng),
                    b"%o" % abs(number), (number % 2**96).to_bytes(12, "big"),
                    b"", b"../../x.npy", b"/etc/x.npy", b"x" * 200,
                ))  # fmt: skip
                header[at + start : at + start + length] = value[:length].ljust(length, b"\0")
                header[at : at + 512] = _summed(header[at : at + 512])
            parts.append(bytes(header) * rng.choice((1, 1, 1, 1, 1, 1, 2, 1100 if rng.random() < 0.01 else 1)))
            parts.append(data + bytes(-len(data) % 512))
        if rng.random() < 0.5:
            parts.insert(0, bytes(tarfile.TarInfo.create_pax_global_header({"comment": "percent-encoded keys"})))
        if rng.random() < 0.02:
            parts.insert(0, bytes(tarfile.TarInfo.create_pax_global_header({str(n): "x" for n in range(300)})))
        return b"".join(parts) + bytes(1024)

    def attempt(rng: random.Random) -> None:
        data = blocks(rng)
        if rng.random() < 0.2:
            data = mutate(data, rng)
        path.write_bytes(data)
        reader = ShardReader(folder)
        _read_shards(reader)
        with tarfile.open(path, "r:") as archive:  # webdataset's reader finds the same samples
            names = [member.name for member in archive]
        assert len(names) == sum(len(reader[i]) - 1 for i in range(len(reader))), names

    return attempt


def _feature_store(folder: Path, compression: str = "none", rows: int | None = 2) -> Path:
    """A small feature store of two shards, with a failure and an encoded feature."""
    writer = FeatureStoreWriter(
        folder / "store", folder / "scratch", {"encoder": "x"}, ["a", "ü", "c", "d"], 2, rows, compression
    )  # type: ignore[arg-type]
    for number, keys in writer.plan():
        items = {
            key: {"f.int8": np.ones((3, 2), np.int8), "f.scale": np.ones((3, 2), np.float32), "n": np.array(1)}
            for key in keys
            if key != "c"
        }
        writer.write_shard(number, items)
    from stores import Failure

    writer.publish([Failure("c", "audio", "no sound")])
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    return folder / "store"


def _read_features(store: FeatureStore | ExportReader) -> None:
    _ = store.failures
    for key in store.keys():
        store.read(key)


def _read_shards(reader: ShardReader) -> None:
    for number in range(len(reader)):
        for value in reader[number].values():
            value.tobytes() if isinstance(value, np.ndarray) else None


def zarr(folder: Path) -> Attempt:
    seeds = []
    for compression in ("none", "zstd"):
        for rows in (None, 2):
            path = _feature_store(folder / f"{compression}{rows}", compression, rows) / "shard-00000.zarr"
            for name in ("f.int8", "f.scale", "n"):
                (data,) = (p for p in (path / name / "c").rglob("*") if p.is_file())
                seeds.append((json.loads((path / name / "zarr.json").read_text()), data.read_bytes()))

    def chunk(data: bytearray, entries: int, rng: random.Random) -> None:
        """Change one chunk or one entry of the index, and their checksums."""
        index = len(data) - 4 - 16 * entries
        if rng.random() < 0.5:
            place = index + 16 * rng.randrange(entries)
            offset, size = struct.unpack("<QQ", data[place : place + 16])
            content = mutate(bytes(data[offset : offset + size - 4]), rng)
            if rng.random() < 0.5 and content[:4] == b"\x28\xb5\x2f\xfd":  # a frame that claims another size
                content = content[:4] + bytes([0xE0]) + rng.choice(NUMBERS).to_bytes(9, "little")[:8] + content[6:]
            data[place : place + 16] = struct.pack("<QQ", index, len(content) + 4)
            data[index:index] = content + google_crc32c.value(content).to_bytes(4, "little")
            index = len(data) - 4 - 16 * entries
        else:
            place = index + 8 * rng.randrange(2 * entries)
            data[place : place + 8] = (rng.choice(NUMBERS) % 2**64).to_bytes(8, "little")
        data[-4:] = google_crc32c.value(bytes(data[index:-4])).to_bytes(4, "little")

    def attempt(rng: random.Random) -> None:
        meta, original = rng.choice(seeds)
        place = folder / "array"
        shutil.rmtree(place, ignore_errors=True)
        file = place.joinpath("c", *["0"] * len(meta["shape"]))
        file.parent.mkdir(parents=True)
        data = bytearray(original)
        if rng.random() < 0.5:
            per_key = -(-meta["shape"][1] // 2) if len(meta["shape"]) > 1 and len(data) > 100 else 1
            entries = next(
                (
                    n
                    for n in {2, 4, 2 * per_key}
                    if google_crc32c.value(original[-4 - 16 * n : -4]) == int.from_bytes(original[-4:], "little")
                ),
                2,
            )
            chunk(data, entries, rng)
        elif rng.random() < 0.3:
            data = bytearray(mutate(bytes(data), rng))
        text = changed(meta, rng) if rng.random() < 0.6 else json.dumps(meta).encode()
        (place / "zarr.json").write_bytes(text)
        file.write_bytes(data)
        try:
            array = ShardArray(place)
            for key in range(array.shape[0]):
                array.read(key)
                array.read(key, slice(1, 2)) if len(array.shape) > 1 else None
        except (OSError, ValueError) as error:  # which FeatureStore turns into this
            raise SamloveError(str(error)) from None

    return attempt


def _restore(saved: dict[Path, bytes]) -> None:
    for path, data in saved.items():
        path.write_bytes(data)


def manifest(folder: Path) -> Attempt:
    store = _feature_store(folder)
    with ShardWriter(folder / "shards", 2, {"made": "here"}) as writer:
        for key in ("a", "b", "c"):
            writer.write(key, {"x": np.ones((2, 2)), "rows": [{"row_id": key}], "y": 1})
    texts = [
        path
        for path in [*store.glob("*"), *store.glob("*.zarr/zarr.json"), *(folder / "shards").glob("*")]
        if path.suffix in (".json", ".csv")
    ]
    saved = {path: path.read_bytes() for path in texts}

    def attempt(rng: random.Random) -> None:
        _restore(saved)
        path = rng.choice(
            texts if rng.random() < 0.3 else [store / "manifest.json", folder / "shards" / "manifest.json"]
        )
        if path.suffix == ".csv":
            path.write_bytes(mutate(saved[path], rng))
        else:
            value = mutate_json(json.loads(saved[path]), rng)
            sealed_again = isinstance(value, dict) and path.name == "manifest.json" and rng.random() < 0.7
            try:
                value = manifests.seal(value) if sealed_again else value
            except ValueError:
                pass  # cannot be sealed
            path.write_bytes(
                changed(value, rng)
                if rng.random() < 0.1
                else to_text(value, rng)
                if rng.random() < 0.1
                else json.dumps(value).encode()
            )
        root = store if store in path.parents else folder / "shards"
        verify(root, deep=rng.random() < 0.1)
        open_artefact(root)
        if root == store:
            if rng.random() < 0.2:  # as the store of before, whose rows are reused
                keys = ["a", "ü", "c", "d"]
                writer = FeatureStoreWriter(
                    folder / "new", folder / "scratch", {"encoder": "x"}, keys, 2, 2, previous=[store]
                )
                list(writer.todo())
                shutil.rmtree(folder / "scratch", ignore_errors=True)
            _read_features(FeatureStore.open(root))
        else:
            _read_shards(ShardReader(root))

    return attempt


def table(folder: Path) -> Attempt:
    """The Arrow tables of a feature store and of a shard set."""
    store = _feature_store(folder)
    with ShardWriter(folder / "shards", 2, {"made": "here"}) as writer:
        for key in ("a", "b", "c"):
            writer.write(key, {"x": np.ones((2, 2)), "rows": [{"row_id": key}], "y": 1})
    roots = (store, folder / "shards")
    saved = {path: path.read_bytes() for root in roots for path in root.glob("*.*") if path.is_file()}
    tables = [path for path in saved if path.suffix == ".arrow"]
    texts = {
        b"<f8": (b"(2,", b"|O8", b"<U8", b"<f4", b"|V8"),
        b'"C"': (b'"F"', b'"X"', b"123"),
        b"rows": (b"ro\\s", b"x   "),
    }

    def attempt(rng: random.Random) -> None:
        _restore(saved)
        path = rng.choice(tables)
        data = bytearray(saved[path])
        words = [at for at in range(0, len(data), 8) if 0 < int.from_bytes(data[at : at + 8], "little") < 2**20]
        for _ in range(rng.choice((1, 1, 2, 4))):
            size = rng.choice((1, 2, 4, 8))
            at = rng.randrange(len(data) // size) * size if rng.random() < 0.7 else rng.randrange(len(data) - 8)
            change = rng.choice((rng.choice(NUMBERS), rng.randrange(256**size), data[at] ^ 1 << rng.randrange(8)))
            if rng.random() < 0.3:  # an offset, a length or the end of a text, which overflows if a size is added
                at, size, change = rng.choice(words), 8, rng.choice((change, 2**63 - 1, 2**63 - 64))
            data[at : at + size] = (change % 256**size).to_bytes(size, "little")
        if rng.random() < 0.1:
            text = rng.choice(list(texts))
            data = data.replace(text, rng.choice(texts[text]))
        if rng.random() < 0.2:
            data = bytearray(mutate(bytes(data), rng))
        path.write_bytes(data)
        value = json.loads(saved[path.parent / "manifest.json"])
        value["files"][path.name] = {"bytes": len(data), "crc32c": f"{google_crc32c.value(bytes(data)):08x}"}
        (path.parent / "manifest.json").write_text(manifests.render_json(manifests.seal(value)))
        verify(path.parent, deep=True)
        if path.parent == store:
            opened = FeatureStore.open(store)
            _read_features(opened)
            for key in ("a", "ü", "x"):
                assert key not in opened or opened.read(key)
        else:
            _read_shards(ShardReader(path.parent))

    return attempt


def wav(folder: Path) -> Attempt:
    rng, seeds = np.random.default_rng(0), []
    for kind, subtype in (
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("WAV", "PCM_24"),
        ("WAVEX", "PCM_16"),
        ("WAV", "IMA_ADPCM"),
        ("WAV", "ULAW"),
        ("W64", "PCM_16"),
        ("RF64", "PCM_16"),
        ("FLAC", "PCM_16"),
    ):
        soundfile.write(folder / "seed", rng.uniform(-1, 1, (60, 2)), 8000, format=kind, subtype=subtype)
        seeds.append((folder / "seed").read_bytes())
    path = folder / "audio.wav"

    def attempt(rng: random.Random) -> None:
        data = bytearray(rng.choice(seeds[:6] if rng.random() < 0.8 else seeds))
        if rng.random() < 0.6:  # a number of the header
            at, size = rng.randrange(min(80, len(data) - 8)), rng.choice((2, 4))
            data[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
        if rng.random() < 0.6:
            data = bytearray(mutate(bytes(data), rng))
        path.write_bytes(data)
        load_audio(path)

    return attempt


def csv(folder: Path) -> Attempt:
    root = RefAvsFolder(folder)
    rows = [
        ["vid", "uid", "split", "fid", "exp"],
        ["a", "a_cello_1", "train", "1", "the cello"],
        ["b", "null_m-b_null_1", "test_n", "0", ' "x", y '],
        ["a", "a_cello_1", "test_s", "2", "NO."],
    ]
    cues = [list(CUE_COLUMNS), ["a_cello_1", "1", "the cello", "t", "red", "", ""]]
    fields = [
        "",
        " ",
        '"',
        ",",
        "\n",
        "\r",
        "\0",
        "ü",
        "\ufeff",
        "..",
        "/",
        "a/b",
        "\\",
        "9" * 9,
        "9" * 400,
        "-1",
        "1.5",
        "٣",
        "TODO",
        "test_u",
        "null_c-a_null_1",
        "x" * 140_000,
        "[Error]",
        "NaN",
        "\u2028",
        "=1",
    ]

    def text(table: list[list[str]], rng: random.Random) -> bytes:
        table = [list(row) for row in table]
        for _ in range(rng.choice((1, 1, 2, 4))):
            row = rng.choice(table)
            match rng.randrange(5):
                case 0 if row:
                    del row[rng.randrange(len(row))]
                case 1:
                    row.insert(rng.randrange(len(row) + 1), rng.choice(fields))
                case 2:
                    table.append(list(row))
                case _ if row:
                    row[rng.randrange(len(row))] = rng.choice(
                        (rng.choice(fields), rng.choice(rng.choice(table) or [""]))
                    )
        quote = rng.random() < 0.8
        lines = [",".join('"' + f.replace('"', '""') + '"' if quote else f for f in row) for row in table]
        data = rng.choice(("\n", "\n", "\r\n", "\r")).join(lines).encode()
        if rng.random() < 0.1:
            data = data.decode().encode(rng.choice(("utf-16", "utf-8-sig", "utf-32")))
        return mutate(data, rng) if rng.random() < 0.3 else data

    def attempt(rng: random.Random) -> None:
        (folder / "metadata.csv").write_bytes(text(rows, rng))
        (folder / "cues.csv").write_bytes(text(cues, rng if rng.random() < 0.3 else random.Random(1)))
        error = None
        try:
            root.cues()
        except SamloveError as found:
            error = found
        parsed = parse_rows(root.metadata())
        list(row_faults(parsed, folder / "metadata.csv"))
        list(split_leaks(parsed))
        if error:
            raise error

    return attempt


def _hdf5_seeds(seeds: list[Path], outside: Path) -> list[bytes]:
    """The files, in HDF5's old and new formats, and with each way to refer to another file or object."""
    made = [path.read_bytes() for path in seeds]
    space, kind = h5py.h5s.create_simple((32,)), h5py.h5t.STD_U8LE

    def external(file: h5py.File) -> None:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_external(os.fsencode(outside), 0, 32)
        h5py.h5d.create(file.id, b"outside", kind, space, properties)

    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((32,), np.uint8)
        layout[:] = h5py.VirtualSource(outside, "x", (32,))
        file.create_virtual_dataset("virtual", layout)

    additions: list[Callable[[h5py.File], object]] = [
        external,
        virtual,
        lambda file: file.__setitem__("link", h5py.ExternalLink(outside, "/x")),
        lambda file: file.__setitem__("soft", h5py.SoftLink("/files")),
        lambda file: file.__setitem__("type", np.dtype("f4")),
        lambda file: file.attrs.__setitem__("note", h5py.Reference()),
        lambda file: file.create_dataset(
            "zip", (64,), np.uint8, chunks=(64,), compression="gzip", data=np.zeros(64, np.uint8)
        ),
        lambda file: file.create_group("group").__setitem__("again", file["/"]),
    ]
    for path in seeds:
        for add in additions:
            copy = path.with_name("copy.h5")
            shutil.copy(path, copy)
            with h5py.File(copy, "a") as file:
                add(file)
            made.append(copy.read_bytes())
        new = path.with_name("new.h5")
        with h5py.File(path) as old, h5py.File(new, "w", libver="latest", userblock_size=512) as file:
            for name in old:
                old.copy(name, file)
            file.attrs.update(old.attrs)
        made.append(new.read_bytes())
        copy.unlink(), new.unlink()
    return made


def _hdf5_input(seeds: list[bytes], rng: random.Random) -> bytes:
    data = bytearray(rng.choice(seeds[: len(seeds) // 9 + 1] if rng.random() < 0.6 else seeds))
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = rng.choice((1, 1, 2, 4, 8))
        nonzero = [at for at in (rng.randrange(512, len(data) - 8) for _ in range(20)) if any(data[at : at + 4])]
        at = nonzero[0] if nonzero else rng.randrange(512, len(data) - 8)  # most of a small file is empty
        if rng.random() < 0.5:
            data[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
        elif rng.random() < 0.5:
            data[at] ^= 1 << rng.randrange(8)
        else:  # another part of the file: addresses and messages change places
            other = rng.randrange(512, len(data) - 8)
            data[at : at + 8] = data[other : other + 8]
    return mutate(bytes(data), rng) if rng.random() < 0.05 else bytes(data)


def hdf5_export(folder: Path) -> Attempt:
    outside = folder.parent / "outside"
    outside.write_bytes(CANARY)
    store = _feature_store(folder)
    export_store(store, folder / "seed.h5")
    seeds = _hdf5_seeds([folder / "seed.h5"], outside)
    path, target = folder / "one.h5", folder / "back"

    def attempt(rng: random.Random) -> None:
        path.write_bytes(_hdf5_input(seeds, rng))
        if rng.random() < 0.7:  # an import takes 20 times as long
            _read_features(ExportReader(path))
        elif rng.random() < 0.3:
            open_artefact(path)
            verify(path, deep=True)
        else:
            before = set(os.listdir(folder))
            try:
                import_store(path, target)
            except SamloveError:
                assert set(os.listdir(folder)) == before, os.listdir(folder)
                raise
            for file in target.rglob("*"):
                assert not file.is_file() or CANARY not in file.read_bytes(), file
            shutil.rmtree(target)

    return attempt


def hdf5_predictions(folder: Path) -> Attempt:
    outside = folder.parent / "outside"
    outside.write_bytes(CANARY)
    with PredictionWriter(
        folder / "seed.h5", 2, 4, np.linspace(0, 1, 255, dtype=np.float32), {"made": "here"}
    ) as writer:
        writer.write(["a", "ü"], np.arange(64, dtype=np.uint8).reshape(2, 2, 4, 4))
    seeds = _hdf5_seeds([folder / "seed.h5"], outside)
    path = folder / "one.h5"

    def attempt(rng: random.Random) -> None:
        path.write_bytes(_hdf5_input(seeds, rng))
        reader = PredictionReader(path)
        for row in reader.row_ids:
            assert CANARY not in reader.read(row).tobytes()
        open_artefact(path)
        verify(path, deep=True)

    return attempt


def safetensors(folder: Path) -> Attempt:
    header = {
        "__metadata__": {"samlove": json.dumps({"crc32c": "0" * 8, "epoch": 1, "made": {"a": [1, 2]}})},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
        "c": {"dtype": "BOOL", "shape": [4], "data_offsets": [32, 36]},
    }
    types = ["BF16", "F16", "F8_E4M3", "F4", "U8", "F64", "C64", "OBJECT", "", None]
    path = folder / "model.safetensors"

    def attempt(rng: random.Random) -> None:
        value = json.loads(json.dumps(header))
        if rng.random() < 0.5:
            part = value[rng.choice("abc")]
            part[rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(
                (
                    rng.choice(types),
                    [0, rng.choice(NUMBERS)],
                    [rng.choice(NUMBERS)],
                    [24, 32],
                    [1] * rng.choice((33, 70)),
                )
            )
        if rng.random() < 0.3:
            inner = changed(json.loads(value["__metadata__"]["samlove"]), rng)
            value["__metadata__"]["samlove"] = inner.decode(errors="replace")
        text = changed(value, rng) if rng.random() < 0.4 else json.dumps(value).encode()
        text += b" " * (-len(text) % 8 if rng.random() < 0.9 else 0)
        length = len(text) if rng.random() < 0.9 else rng.choice(NUMBERS) % 2**64
        data = length.to_bytes(8, "little") + text + bytes(36)
        path.write_bytes(mutate(data, rng) if rng.random() < 0.2 else data)
        if rng.random() < 0.5 and tensors.is_sealed(path):
            tensors.seal(path)
        if tensors.is_tensors(path):
            verify(path, deep=True)
        reader = TensorReader(path)
        for key in reader.keys():
            reader.read(key)

    return attempt
