"""Damage of every kind, done to every kind of artefact: found, and named."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from samlove.errors import RequestError
from stores.verify import verify
from tests.store_kinds import KEYS, STORES, Predictions, make_items

FLIPS = 150  # bits flipped an artefact, about, spread over all its files


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


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
def test_what_was_just_written_is_sound(path: Path, deep: bool) -> None:
    assert verify(path, deep) == []


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("count", [0, 1])
def test_so_is_an_empty_one(kind, tmp_path: Path, deep: bool, count: int) -> None:
    kind.write(tmp_path / "store", make_items(KEYS[:count]))
    assert verify(tmp_path / "store", deep) == []


def test_every_flipped_bit_is_found_and_named(path: Path) -> None:
    rng = np.random.default_rng(0)
    files = files_of(path)
    sizes = [file.stat().st_size for file in files]
    done = found = 0
    for file, size in zip(files, sizes, strict=True):
        whole = file.read_bytes()
        for place in rng.choice(size * 8, max(2, FLIPS * size // sum(sizes)), replace=False):
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            file.write_bytes(damaged)
            done += 1
            found += names(verify(path, deep=True), file)
        file.write_bytes(whole)
    print(f"{path.name}: {found} of {done} flipped bits found and named")
    assert found == done > 100
    assert verify(path, deep=True) == []


@pytest.mark.parametrize("deep", [False, True])
def test_every_truncated_or_longer_file_is_found_and_named(path: Path, deep: bool) -> None:
    for file in files_of(path):
        whole = file.read_bytes()
        for content in (whole[:-1], whole[: len(whole) // 2], whole + b"\n", whole + b"\0" * 512):
            file.write_bytes(content)
            assert names(verify(path, deep), file), (file, len(content))
        file.write_bytes(whole)


@pytest.mark.parametrize("deep", [False, True])
def test_missing_files_and_shards_and_extra_files_are_found_and_named(path: Path, deep: bool, tmp_path: Path) -> None:
    if path.is_file():
        pytest.skip("one file: it is there or it is not")
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


def test_links_into_a_cache_are_as_good_as_files(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "cache") if path.is_dir() else shutil.copy(path, tmp_path / "cache")
    for file in files_of(path):
        file.unlink()
        file.symlink_to((tmp_path / "cache" / file.relative_to(path)) if path.is_dir() else tmp_path / "cache")
    assert verify(path, deep=True) == []


def test_the_items_that_damage_costs_are_named(tmp_path: Path) -> None:
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
def test_what_is_no_artefact_is_a_wrong_request(tmp_path: Path, deep: bool) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    for other in ("nowhere", "empty", "text"):
        with pytest.raises(RequestError, match=f"{other}: expected"):
            verify(tmp_path / other, deep)


def test_what_an_older_version_wrote_says_so(tmp_path: Path) -> None:
    import h5py

    for kind in STORES[:2]:
        path = tmp_path / type(kind).__name__
        kind.write(path, make_items(KEYS))
        (path / "manifest.json").write_text('{"schema": 1, "fingerprint": {}, "keys": 9}\n')
        (fault,) = verify(path)
        assert "an older version made it" in fault
    assert isinstance(STORES[2], Predictions)
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file["bins"] = np.zeros(3)
    (fault,) = verify(tmp_path / "old.h5")
    assert "an older version made it" in fault
