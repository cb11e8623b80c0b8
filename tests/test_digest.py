"""Digests of folders, sources, rows and code change with the content, and with nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from samlove.data.digest import code_digest, folder_digest, rows_digest, source_ids
from samlove.data.hashes import FileHashes
from samlove.features.encoders.base import Sources
from samlove.features.encoders.timm_image import TimmEncoder
from tests.plain_user import run_as_plain_user
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


@pytest.mark.parametrize("name", ["b", "a/1"])
def test_links_below_the_folder_are_followed(folder: Path, tmp_path: Path, name: str) -> None:
    before = folder_digest(folder)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert folder_digest(folder) == before
    changed = tmp_path / "elsewhere" / "2" if name == "b" else tmp_path / "elsewhere"
    changed.write_text("x")
    assert folder_digest(folder) != before


def test_links_that_lead_back_end(folder: Path) -> None:
    before = folder_digest(folder)
    (folder / "a" / "up").symlink_to(folder)
    (folder / "a" / "b").symlink_to(folder / "b")
    (folder / "b" / "a").symlink_to(folder / "a")  # together with the one before
    (folder / "b" / "itself").symlink_to("itself")
    (folder / "dangling").symlink_to("nowhere")
    assert folder_digest(folder) != before  # b/a/1 and others


def test_any_name_counts_and_nothing_that_is_no_file(folder: Path) -> None:
    before = folder_digest(folder)
    os.mkfifo(folder / "pipe")
    (folder / "none").mkdir()
    assert folder_digest(folder) == before
    Path(os.fsdecode(bytes(folder) + b"/not-utf8-\xff")).write_text("x")
    assert folder_digest(folder) != before


@pytest.mark.parametrize("name", ["b", "b/2"])
def test_what_may_not_be_read_counts_as_empty(folder: Path, name: str) -> None:
    def digest() -> str:
        done = run_as_plain_user("-c", f"{imports}; print(folder_digest(Path({str(folder)!r})))")
        assert done.returncode == 0, done.stderr
        return done.stdout

    imports = "from pathlib import Path; from samlove.data.digest import folder_digest"
    before = digest()
    (folder / name).chmod(0)
    after = digest()
    (folder / name).chmod(0o755)
    assert digest() == before == f"{folder_digest(folder)}\n" != after


def test_the_cache_does_not_change_the_digest(folder: Path, tmp_path: Path) -> None:
    for n in range(50):
        (folder / "b" / f"{n}").write_text(str(n))
        os.utime(folder / "b" / f"{n}", (0, 0))
    for _ in range(2):
        with FileHashes(tmp_path / "hashes.sqlite") as hashes:
            assert folder_digest(folder, hashes) == folder_digest(folder)


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
    assert source_ids({}) == {}


def test_ids_of_many_sources_are_those_of_each(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}" for n in range(30)]
    for n, path in enumerate(paths):
        path.write_text(str(n))
    asked = []

    def source(key: str) -> list[Path]:
        asked.append(key)
        return [paths[int(key) % 30], paths[int(key) % 7]]

    many = source_ids(Sources((str(n) for n in range(5000)), source))
    assert sorted(asked) == sorted(many)  # once each
    for key in ("0", "29", "30", "4999"):
        assert many[key] == source_ids({key: source(key)})[key]
    assert many["0"] == many["210"] != many["1"]


def test_the_code_digest_covers_imported_modules(tmp_path: Path) -> None:
    """Edits in a copy of the package: the encoder, a module that it imports, and modules that it does not import."""
    root = Path(__file__).parents[1]
    shutil.copytree(root / "samlove", tmp_path / "samlove", ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
    shutil.copytree(root / "stores", tmp_path / "stores", ignore=shutil.ignore_patterns("__pycache__"))
    imports = "from samlove.data.digest import code_digest; from samlove.features.encoders import timm_image"
    code = f"{imports}; print(code_digest(timm_image.TimmEncoder))"

    def digest() -> str:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    before = digest()
    assert before == code_digest(TimmEncoder)
    encoders = "features/encoders"
    edits = {f"{encoders}/timm_image": False, "data/dataset": False, f"{encoders}/text": True, "config": True}
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
