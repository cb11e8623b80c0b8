"""Digests of folders, sources, rows and code change with the content, and with nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from samlove.data.digest import code_digest, folder_digest, rows_digest, source_ids
from samlove.features.encoders.vit import VitEncoder
from tests.tiny_pack import ROWS


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


def test_times_and_location_do_not_count(folder: Path, tmp_path: Path) -> None:
    before = folder_digest(folder)
    os.utime(folder / "a" / "1", (0, 0))
    assert folder_digest(folder) == before
    (tmp_path / "link").symlink_to(folder)
    assert folder_digest(tmp_path / "link") == before


def test_missing_folder_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert folder_digest(tmp_path / "nowhere") == folder_digest(tmp_path / "empty")


def test_only_the_content_identifies_a_source(tmp_path: Path) -> None:
    for name, content in {"a": "1", "b": "2", "c": "1"}.items():
        (tmp_path / name).write_text(content)
    a, b, c = (tmp_path / name for name in "abc")
    sources = {"a": a, "c": c, "b": b, "ab": [a, b], "ba": [b, a], "cb": [c, b], "aab": [a, a, b], "text": "1"}
    ids = source_ids(sources)
    assert ids["a"] == ids["c"]
    assert ids["ab"] == ids["cb"]
    assert len(set(ids.values())) == 6
    assert source_ids({"gone": tmp_path / "gone", "half": [a, tmp_path / "gone"]}) == {"gone": "", "half": ""}


def test_the_code_digest_covers_imported_modules(tmp_path: Path) -> None:
    """Edits in a copy of the package: the encoder, a module that it imports, and modules that it does not import."""
    root = Path(__file__).parents[1]
    shutil.copytree(root / "samlove", tmp_path / "samlove", ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
    shutil.copytree(root / "stores", tmp_path / "stores", ignore=shutil.ignore_patterns("__pycache__"))
    imports = "from samlove.data.digest import code_digest; from samlove.features.encoders import vit"
    code = f"{imports}; print(code_digest(vit.VitEncoder))"

    def digest() -> str:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    before = digest()
    assert before == code_digest(VitEncoder)
    encoders = "features/encoders"
    edits = {f"{encoders}/vit": False, "data/dataset": False, f"{encoders}/roberta": True, "config": True}
    for file, same in edits.items():
        path = tmp_path / "samlove" / f"{file}.py"
        path.write_text(path.read_text() + "# edited\n")
        after = digest()
        assert (after == before) == same, file
        before = after


@pytest.mark.parametrize("name", ["row_id", "media_id", "fid", "exp", "null"])
def test_the_content_of_rows_counts_and_their_order_does_not(name):
    changed = ROWS.copy()
    changed.loc[2, name] = {"fid": 7, "null": True}.get(name, "another")
    assert rows_digest(changed) != rows_digest(ROWS)
    assert rows_digest(ROWS[::-1].assign(sight=True)) == rows_digest(ROWS)
