"""A folder's digest changes with its content and with nothing else."""

import os
from pathlib import Path

import pytest

from samlove.digest import folder_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/2", "a/1", "a/10"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "data"


def test_content_and_names_count(folder: Path) -> None:
    digests = [folder_digest(folder)]
    (folder / "a" / "1").write_text("x")
    digests.append(folder_digest(folder))
    (folder / "a" / "1").rename(folder / "a" / "2")
    digests.append(folder_digest(folder))
    (folder / "a" / "2").unlink()
    digests.append(folder_digest(folder))
    assert len(set(digests)) == 4


def test_times_and_place_do_not(folder: Path, tmp_path: Path) -> None:
    before = folder_digest(folder)
    os.utime(folder / "a" / "1", (0, 0))
    assert folder_digest(folder) == before
    (tmp_path / "link").symlink_to(folder)
    assert folder_digest(tmp_path / "link") == before


def test_missing_folder_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert folder_digest(tmp_path / "nowhere") == folder_digest(tmp_path / "empty")
