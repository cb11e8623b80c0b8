"""Every kind of damage to every kind of artefact is found, and the file is named."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from samlove.errors import RequestError
from stores.manifest import file_entry, render_json, seal
from stores.tensors import HEADER_KEY
from stores.verify import verify
from tests.store_kinds import KEYS, STORES, Exported, Kind, Tensors, files_of, make_items


@pytest.fixture(params=STORES, ids=lambda s: type(s).__name__)
def kind(request):
    return request.param


@pytest.fixture
def path(kind, tmp_path: Path) -> Path:
    kind.write(tmp_path / "store", make_items(KEYS))
    return tmp_path / "store"


def names(faults: list[str], file: Path) -> bool:
    return len(faults) >= 1 and all(str(file) in fault for fault in faults)


@pytest.mark.parametrize("deep", [False, True])
def test_a_new_artefact_has_no_faults(path: Path, deep: bool) -> None:
    assert verify(path, deep) == []


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("count", [0, 1])
def test_an_artefact_of_no_or_one_item_has_no_faults(kind, tmp_path: Path, deep: bool, count: int) -> None:
    kind.write(tmp_path / "store", make_items(KEYS[:count]))
    assert verify(tmp_path / "store", deep) == []


@pytest.mark.parametrize("flips", [30, pytest.param(150, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found_and_named(path: Path, flips: int) -> None:
    """Flips about so many bits, spread over all files of the artefact."""
    rng = np.random.default_rng(0)
    files = files_of(path)
    sizes = [file.stat().st_size for file in files]
    done = found = 0
    for file, size in zip(files, sizes, strict=True):
        whole = file.read_bytes()
        for place in rng.choice(size * 8, max(1, flips * size // sum(sizes)), replace=False):
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            file.write_bytes(damaged)
            done += 1
            found += names(verify(path, deep=True), file)
        file.write_bytes(whole)
    print(f"{path.name}: {found} of {done} flipped bits found and named")
    assert found == done > flips // 2
    assert verify(path, deep=True) == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_found_and_named(path: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(files_of(path)))
    whole = file.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    other = whole[place] ^ data.draw(st.integers(1, 255))
    file.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
    faults = verify(path, deep=True)
    file.write_bytes(whole)
    assert names(faults, file)


@pytest.mark.parametrize("deep", [False, True])
def test_every_truncated_or_longer_file_is_found_and_named(path: Path, deep: bool) -> None:
    for file in files_of(path):
        whole = file.read_bytes()
        for content in (whole[:-1], whole[: len(whole) // 2], whole + b"\n", whole + b"\0" * 512):
            file.write_bytes(content)
            assert names(verify(path, deep), file), (file, len(content))
        file.write_bytes(whole)


@pytest.mark.parametrize("kind", STORES[:2], ids=lambda kind: type(kind).__name__)  # the others are one file each
@pytest.mark.parametrize("deep", [False, True])
def test_missing_files_and_shards_and_extra_files_are_found_and_named(path: Path, deep: bool, tmp_path: Path) -> None:
    for file in files_of(path):
        file.rename(tmp_path / "away")
        assert names(verify(path, deep), file)
        (tmp_path / "away").rename(file)
    for shard in sorted(path.glob("shard-*")):
        shard.rename(tmp_path / "away")
        assert names(verify(path, deep), shard)
        (tmp_path / "away").rename(shard)
    for extra in ("more.txt", "shard-00099.tar", ".hidden"):
        (path / extra).write_text("x")
        assert names(verify(path, deep), path / extra)
        (path / extra).unlink()
    (path / "link").symlink_to("nowhere")
    assert names(verify(path, deep), path / "link")
    (path / "link").unlink()
    assert verify(path, deep) == []


def test_an_artefact_of_links_into_a_cache_has_no_faults(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "cache") if path.is_dir() else shutil.copy(path, tmp_path / "cache")
    for file in files_of(path):
        file.unlink()
        file.symlink_to((tmp_path / "cache" / file.relative_to(path)) if path.is_dir() else tmp_path / "cache")
    assert verify(path, deep=True) == []


def test_items_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    items = make_items([f"key_{n}" for n in range(6)])
    STORES[0].write(tmp_path / "store", items)
    file = next(p for p in (tmp_path / "store" / "shard-00001.zarr" / "x" / "c").rglob("*") if p.is_file())
    data = bytearray(file.read_bytes())
    data[data.index(items["key_3"].tobytes()) + 5] ^= 4
    file.write_bytes(data)
    (fault,) = verify(tmp_path / "store", deep=True)
    assert fault.startswith(f"{file}: expected crc32c ")
    assert fault.endswith("; cannot be read: key_3")


@pytest.mark.parametrize("deep", [False, True])
def test_a_path_without_an_artefact_is_a_request_error(tmp_path: Path, deep: bool) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    for other in ("nowhere", "empty", "text"):
        with pytest.raises(RequestError, match=f"{other}: .*expected"):
            verify(tmp_path / other, deep)


def test_an_artefact_of_an_older_version_is_reported_as_such(tmp_path: Path) -> None:
    for kind in STORES[:2]:
        path = tmp_path / type(kind).__name__
        kind.write(path, make_items(KEYS))
        (path / "manifest.json").write_text('{"schema": 1, "fingerprint": {}, "keys": 9}\n')
        (fault,) = verify(path)
        assert "written by an older version" in fault
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file["bins"] = np.zeros(3)
    (fault,) = verify(tmp_path / "old.h5")
    assert "written by an older version" in fault
    save_file({"x": np.zeros(3)}, tmp_path / "old.safetensors", {HEADER_KEY: "{}"})
    (fault,) = verify(tmp_path / "old.safetensors")
    assert "written by an older version" in fault


def test_files_that_a_manifest_lists_outside_the_folder_count_as_missing(tmp_path: Path) -> None:
    STORES[0].write(tmp_path / "store", make_items(KEYS))
    (tmp_path / "away").write_bytes(b"x" * 9)
    path = tmp_path / "store" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("../away", str(tmp_path / "away")):
        changed = {**manifest, "files": {**manifest["files"], name: file_entry(tmp_path / "away")}}
        path.write_text(render_json(seal(changed)))
        (fault,) = verify(tmp_path / "store", deep=True)
        assert "missing" in fault and "away" in fault


@pytest.mark.parametrize("kind", [Exported(), Tensors()], ids=["Exported", "Tensors"])
def test_a_truncated_file_is_reported_in_one_line(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "file"
    kind.write(path, make_items(KEYS))
    whole = path.read_bytes()
    for size in (70, 600, len(whole) // 2):
        path.write_bytes(whole[:size])
        (fault,) = verify(path)
        assert fault.startswith(f"{path}: ") and "\n" not in fault
