"""`samlove store export` and `samlove store import` as a user runs them."""

from pathlib import Path

import pytest
import torch

from tests.store_kinds import KEYS, tree
from tests.test_cli import samlove
from tests.test_stores_hdf5 import make_store


def test_export_and_import(tmp_path: Path) -> None:
    store, file, back = (str(tmp_path / name) for name in ("store", "one.h5", "back"))
    make_store(tmp_path, KEYS)
    done = samlove("store", "export", store, file)
    assert (done.returncode, done.stdout) == (0, f"{file}: 9 items of {store}\n"), done.stderr
    done = samlove("store", "import", file, back)
    assert (done.returncode, done.stdout) == (0, f"{back}: 9 items of {file}\n"), done.stderr
    assert tree(tmp_path / "back") == tree(tmp_path / "store")


def test_import_of_a_folder_of_tensors(tmp_path: Path) -> None:
    torch.save(torch.zeros(10, 128), tmp_path / "a.pt")
    done = samlove("store", "import", str(tmp_path), str(tmp_path / "audio"))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'audio'}: 1 items of {tmp_path}\n"), done.stderr


@pytest.mark.parametrize("arguments", [("export", "none", "a.h5"), ("import", "none.h5", "a"), ("import", ".", "a")])
def test_an_invalid_request_gives_one_line_and_status_2(tmp_path: Path, arguments: tuple[str, str, str]) -> None:
    command, *paths = arguments
    done = samlove("store", command, *(str(tmp_path / path) for path in paths))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
