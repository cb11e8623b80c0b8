"""Export to HDF5 and import: bit-identical, and nothing is imported from a damaged or hostile file."""

import json
import shutil
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest

from samlove.errors import RequestError, SamloveError
from stores import (
    ExportReader,
    Failure,
    FeatureStore,
    FeatureStoreWriter,
    PredictionReader,
    export_store,
    import_store,
)
from tests.store_kinds import KEYS, tree

STORABLE = ("bool", "uint8", "int32", "int64", "float16", "float32")


def make_item(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    items = {name: (rng.standard_normal((3, 5, 2)) * 3).astype(name) for name in STORABLE}
    return {**items, "c": np.zeros((3, 4), np.float16), "scalar": np.array(seed, np.int64)}


def make_store(root: Path, keys: list[str], failed: tuple[str, ...] = (), chunk_rows: int | None = 2) -> FeatureStore:
    writer = FeatureStoreWriter(root / "store", root / "scratch", {"encoder": "ä"}, keys, 2, chunk_rows)
    for number, planned in writer.todo():
        writer.write_shard(number, {key: make_item(keys.index(key)) for key in planned if key not in failed})
    writer.publish([Failure(key, "audio", "damaged") for key in failed])
    shutil.rmtree(root / "scratch")
    return FeatureStore.open(root / "store")


@pytest.mark.parametrize("chunk_rows", [None, 1, 2])
@pytest.mark.parametrize(("count", "failed"), [(0, ()), (1, ()), (len(KEYS), ()), (5, KEYS[1:4]), (2, KEYS[:2])])
def test_export_and_import_give_a_bit_identical_store(tmp_path, count, failed, chunk_rows):
    make_store(tmp_path, KEYS[:count], tuple(failed), chunk_rows)
    assert export_store(tmp_path / "store", tmp_path / "one.h5") == count - len(failed)
    assert import_store(tmp_path / "one.h5", tmp_path / "back") == count - len(failed)
    assert tree(tmp_path / "back") == tree(tmp_path / "store")
    assert {p.name for p in tmp_path.iterdir()} == {"store", "one.h5", "back"}


def test_other_programs_find_keys_and_arrays(tmp_path):
    make_store(tmp_path, KEYS)
    export_store(tmp_path / "store", tmp_path / "one.h5")
    with h5py.File(tmp_path / "one.h5") as file:
        assert list(file["keys"].asstr()) == KEYS
        for row in range(len(KEYS)):
            for name, value in make_item(row).items():
                assert file["arrays"][name].dtype == value.dtype
                np.testing.assert_array_equal(file["arrays"][name][row], value)


def test_nothing_is_overwritten(tmp_path):
    make_store(tmp_path, KEYS[:2])
    export_store(tmp_path / "store", tmp_path / "one.h5")
    before = (tmp_path / "one.h5").read_bytes()
    with pytest.raises(RequestError, match=r"one\.h5: already exists"):
        export_store(tmp_path / "store", tmp_path / "one.h5")
    with pytest.raises(RequestError, match="store: already exists"):
        import_store(tmp_path / "one.h5", tmp_path / "store")
    assert (tmp_path / "one.h5").read_bytes() == before


def test_a_missing_store_or_file_is_a_request_error(tmp_path):
    with pytest.raises(RequestError, match="nowhere"):
        export_store(tmp_path / "nowhere", tmp_path / "one.h5")
    with pytest.raises(RequestError, match=r"none\.h5: no such file"):
        import_store(tmp_path / "none.h5", tmp_path / "store")
    (tmp_path / "link.h5").symlink_to("gone.h5")
    for read in (partial(import_store, path=tmp_path / "store"), ExportReader, PredictionReader, FeatureStore.open):
        with pytest.raises(RequestError, match=r"link to gone\.h5, which does not exist"):
            read(tmp_path / "link.h5")


def test_a_store_that_lists_no_files_is_not_exported(tmp_path):
    store = make_store(tmp_path, KEYS[:2])
    (store.path / "manifest.json").write_text(json.dumps({**store.manifest, "schema": 2, "files": {}}))
    with pytest.raises(SamloveError, match=r"manifest\.json: lists no files"):
        export_store(store.path, tmp_path / "one.h5")
    assert {p.name for p in tmp_path.iterdir()} == {"store"}


def test_a_damaged_item_is_not_exported(tmp_path):
    store = make_store(tmp_path, KEYS[:4])
    data = next(p for p in (store.path / "shard-00001.zarr" / "float32" / "c").rglob("*") if p.is_file())
    whole = data.read_bytes()
    for damage in (whole[:-8], bytes([whole[0] ^ 1]) + whole[1:], None):
        data.unlink()
        if damage is not None:
            data.write_bytes(damage)
        with pytest.raises(SamloveError, match="shard-00001"):
            export_store(store.path, tmp_path / "one.h5")
        assert {p.name for p in tmp_path.iterdir()} == {"store"}


def test_a_flipped_bit_or_a_truncated_file_is_found_on_import(tmp_path):
    make_store(tmp_path, KEYS)
    file = tmp_path / "one.h5"
    export_store(tmp_path / "store", file)
    whole = file.read_bytes()
    place = whole.index(make_item(3)["float32"][:1].tobytes())
    for damage in (
        whole[: place + 5] + bytes([whole[place + 5] ^ 16]) + whole[place + 6 :],
        whole[: len(whole) // 2],
        b"not HDF5",
        b"",
    ):
        file.write_bytes(damage)
        with pytest.raises(SamloveError, match=r"one\.h5"):
            import_store(file, tmp_path / "back")
        assert {p.name for p in tmp_path.iterdir()} == {"store", "one.h5"}


@pytest.mark.parametrize(
    "part", ["files/index.arrow", "files/manifest.json", "arrays/bool", "files/shard-00000.zarr/bool/zarr.json"]
)
def test_a_file_with_a_missing_part_is_refused(tmp_path, part):
    make_store(tmp_path, KEYS)
    export_store(tmp_path / "store", tmp_path / "one.h5")
    with h5py.File(tmp_path / "one.h5", "a") as file:
        del file[part]
    with pytest.raises(SamloveError, match=r"one\.h5"):
        import_store(tmp_path / "one.h5", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_name_that_points_outside_the_folder_is_refused(tmp_path):
    make_store(tmp_path, KEYS)
    export_store(tmp_path / "store", tmp_path / "one.h5")
    with h5py.File(tmp_path / "one.h5", "a") as file:
        file["files"].create_group("..")["evil"] = np.zeros(3, np.uint8)
    with pytest.raises(SamloveError, match=r"one\.h5: cannot be imported: .*expected (a|the) plain name"):
        import_store(tmp_path / "one.h5", tmp_path / "deep" / "back")
    assert not list(tmp_path.rglob("evil"))


def test_nothing_is_written_to_another_folder_that_the_manifest_names(tmp_path):
    make_store(tmp_path, KEYS)
    export_store(tmp_path / "store", tmp_path / "one.h5")
    before = tree(tmp_path / "store")
    with h5py.File(tmp_path / "one.h5", "a") as file:
        manifest = json.loads(file["files/manifest.json"][()].tobytes())
        manifest["arrays"]["../../store/shard-00000.zarr/float32"] = manifest["arrays"].pop("float32")
        del file["files/manifest.json"]
        file["files/manifest.json"] = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
        file["arrays/float32"][:] = 7
    with pytest.raises(SamloveError, match=r"one\.h5: cannot be imported: .*expected (a|the) plain name"):
        import_store(tmp_path / "one.h5", tmp_path / "back")
    assert tree(tmp_path / "store") == before
