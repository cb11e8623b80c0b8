"""Whose code runs, for which user, in which repository and locale: what would fail is said before anything runs."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from samlove.environment import check_git, check_repository
from samlove.errors import RequestError
from tests.plain_user import ROOT
from tests.repository import git, make_repository
from tests.test_index import write_masks, write_media

CONTAINER = 12345  # a user id without an entry in passwd
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def run(*command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python COMMAND`; of the environment, only PATH and `variables` are set. The output's bytes become characters."""
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, encoding="latin-1")


# --- the code --------------------------------------------------------------------------------------------------------


def command_of(packages: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`samlove --help` as a console script runs it: with the packages that are installed, not those in `cwd`."""
    return run("-P", "-m", "samlove.cli.main", "--help", cwd=cwd, HOME=os.environ["HOME"], PYTHONPATH=str(packages))


def copy_packages(folder: Path) -> Path:
    for name in ("samlove", "stores", "pipelines"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_a_copied_project_does_not_run_the_originals_code(tmp_path: Path) -> None:
    copy = copy_packages(tmp_path / "copy")
    shutil.copy(ROOT / "dvc.yaml", copy)
    done = command_of(ROOT, copy)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {copy / 'samlove'}: not the code that runs, which is {ROOT / 'samlove'}")
    assert done.stderr.endswith("rm -rf .venv && make install\n")
    assert command_of(copy, copy).returncode == 0
    linked = tmp_path / "linked"
    linked.symlink_to(ROOT)
    for legitimate in (ROOT, ROOT / "docs", tmp_path, linked):
        assert command_of(ROOT, legitimate).returncode == 0
    installed = copy_packages(tmp_path / "lib" / "site-packages")
    assert command_of(installed, copy).returncode == 0


# --- the user --------------------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({}, "no home folder and no name"),
        ({"HOME": "/tmp"}, "no name"),
        ({"USER": "me"}, "no home folder"),
        ({"HOME": "/tmp", "USER": "me"}, None),
        ({"HOME": "/tmp", "LOGNAME": "me"}, None),
    ],
)
def test_a_user_without_home_or_name_is_told_which_variable_to_set(
    variables: dict[str, str], missing: str | None
) -> None:
    code = (
        "import os, sys, samlove.environment as e; from samlove.errors import one_line_errors\n"
        f"os.setuid({CONTAINER}); one_line_errors(e.check_user)()"
    )
    done = run("-c", code, **variables)
    if missing is None:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: user {CONTAINER}: {missing}, which DVC needs; run: export HOME=")


@needs_root
def test_without_a_home_folder_the_download_cache_needs_a_place() -> None:
    code = (
        "import os; from stores.remote import Cache; from samlove.errors import one_line_errors\n"
        f"os.setuid({CONTAINER}); one_line_errors(Cache.of_environment)()"
    )
    done = run("-c", code)
    assert done.stderr == "error: ~/.cache/stores: the home folder is unknown; set STORES_CACHE or HOME\n"
    assert done.returncode == 2
    assert run("-c", code, STORES_CACHE="/tmp/cache").returncode == 0


# --- the repository --------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of a small project with DVC, in which everything is in order."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "configs", folder / "configs")
    make_repository(folder)
    monkeypatch.chdir(folder)
    return folder


def test_a_clone_is_accepted(project: Path) -> None:
    check_git()
    check_repository()


def without_git(project: Path) -> None:
    shutil.rmtree(project / ".git")


def without_commit(project: Path) -> None:
    without_git(project)
    git(project, "init")


def without_dvc(project: Path) -> None:
    shutil.rmtree(project / ".dvc")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without_git, "no git repository with a commit.*a ZIP download has none.*; clone .*git init && git add"),
        (without_commit, "no git repository with a commit"),
        (without_dvc, r"\.dvc: no such folder.*; run: git restore \.dvc"),
    ],
)
def test_a_repository_in_which_dvc_fails_is_refused_with_the_remedy(
    spoil: Callable[[Path], None], says: str, project: Path
) -> None:
    spoil(project)
    with pytest.raises(RequestError, match=says):
        check_repository()


def test_a_zip_download_without_git_can_be_used_without_it(project: Path) -> None:
    without_git(project)
    Path(".dvc/config").write_text("[core]\n    no_scm = true\n")
    check_repository()


@needs_root
def test_a_clone_of_another_user_is_refused_with_gits_own_remedy(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SUDO_UID", raising=False)  # git trusts the user who ran sudo
    for path in (project, project / ".git"):
        os.chown(path, CONTAINER, CONTAINER)
    with pytest.raises(RequestError, match=f"another user.*; run: git config --global --add safe.directory {project}$"):
        check_git()


def test_without_git_the_remedy_is_to_install_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(project))
    with pytest.raises(RequestError, match="git: not found; install it"):
        check_git()


@pytest.mark.parametrize("module", ["samlove.cli.demo", "pipelines.dataset"])
def test_the_demo_and_a_stage_say_at_once_that_there_is_no_repository(module: str, project: Path) -> None:
    without_git(project)
    done = run("-m", module, cwd=project, PYTHONPATH=str(ROOT), HOME=str(project), USER="me")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {project}: no git repository with a commit")
    assert done.stderr.count("\n") == 1
    assert not (project / "data").exists()


# --- the locale ------------------------------------------------------------------------------------------------------

LOCALES = [  # in none of them can Python print a curly quote
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1:strict"},
]
SAID = "The “café” object."


@pytest.mark.parametrize("locale", LOCALES, ids=str)
def test_everything_is_printed_and_written_in_any_locale(locale: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs/micro/dataset.yaml").write_text("synth: null # “own”\nname: Café\nframes: 3\n", "utf-8")
    root = tmp_path / "data" / "dataset" / "micro"
    root.mkdir(parents=True)
    write_media(root, "a")
    write_masks(root, "a", 0)
    with (root / "metadata.csv").open("w", encoding="utf-8") as file:
        file.write(f"vid,uid,split,fid,exp\na,a_cat_1,train,0,{SAID}\n")
    variables = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "USER": "me", **locale}
    for command in (("samlove.cli.main", "audit", str(root)), ("pipelines.index",)):
        done = run("-m", *command, cwd=tmp_path, **variables)
        assert done.returncode == 0, done.stderr
        assert r"The \u201ccaf" in done.stdout
    rows = pd.read_parquet(tmp_path / "data/micro/index/expressions.parquet")
    assert set(rows["exp"]) == {SAID}
    assert SAID in (tmp_path / "data/micro/index/audit.json").read_text(encoding="utf-8")


def test_a_file_name_that_the_locale_lacks_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    write_media(tmp_path, "café")
    write_masks(tmp_path, "café", 0)
    with (tmp_path / "metadata.csv").open("w", encoding="utf-8") as file:
        file.write("vid,uid,split,fid,exp\ncafé,café_cat_1,train,0,The cat.\n")
    done = run("-m", "samlove.cli.main", "audit", str(tmp_path), PYTHONPATH=str(ROOT), **LOCALES[0])
    assert done.returncode == 1
    assert done.stderr.endswith(
        f"error: {tmp_path}/media/caf\\xe9: not a file name in this locale (ascii); run: export PYTHONUTF8=1, "
        "and the same command again\n"
    )
    assert "Traceback" not in done.stderr
    done = run("-m", "samlove.cli.main", "audit", str(tmp_path), PYTHONPATH=str(ROOT), PYTHONUTF8="1", LC_ALL="C")
    assert done.returncode == 0, done.stderr


def test_text_files_are_read_and_written_as_utf_8_whatever_the_locale() -> None:
    assert [place for package in ("samlove", "stores", "pipelines") for place in locale_dependent(ROOT / package)] == []


def locale_dependent(folder: Path) -> Iterator[str]:
    """The calls that read or write text in the encoding of the locale, by file and line."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _is_text(node) and "encoding" not in {k.arg for k in node.keywords}:
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def _is_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text: read_text, write_text, open without b, a process with text=True."""
    options = {k.arg: k.value for k in call.keywords}
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name != "open":
        return name in ("read_text", "write_text") or "text" in options and name in ("run", "Popen", "check_output")
    if ast.unparse(call.func) == "av.open":  # media, not text
        return False
    method = isinstance(call.func, ast.Attribute)
    modes: list[Any] = [a.value for a in call.args if isinstance(a, ast.Constant)]
    given = [mode for mode in modes if isinstance(mode, str) and set(mode) <= set("rwaxbt+")]
    return not any("b" in mode for mode in given) and (not method or bool(given) or "newline" in options)
