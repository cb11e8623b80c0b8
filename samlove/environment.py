"""What a run needs of its surroundings: the code of this folder, a repository, and a user with a home folder."""

import getpass
import os
import re
import shutil
import subprocess
from pathlib import Path

from samlove.errors import RequestError

USER = "export HOME=/tmp USER=samlove (HOME: any folder that you may write to)"


def check_code() -> None:
    """Raise RequestError in the root of a copy of this project if the code that runs is the original's.

    The `samlove` command of a copied virtual environment does that: its editable install names the original folder.
    """
    own, here = Path(__file__).parent, Path("samlove")
    installed = {"site-packages", "dist-packages"} & set(own.parts)  # not editable: it belongs to no folder
    if not installed and os.path.isfile("dvc.yaml") and here.is_dir() and not here.samefile(own):
        raise RequestError(
            f"{here.resolve()}: not the code that runs, which is {own}: the Python environment was made for that "
            "folder and copied; make one for this folder: rm -rf .venv && make install"
        )


def check_user() -> None:
    """Raise RequestError if the user has no home folder or no name, which DVC and other libraries need.

    A container often runs with a user id that is not in its passwd file.
    """
    missing = []
    if not os.path.isabs(os.path.expanduser("~")):
        missing.append("home folder")
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        missing.append("name")
    if missing:
        raise RequestError(f"user {os.getuid()}: no {' and no '.join(missing)}, which DVC needs; run: {USER}")


def check_repository() -> None:
    """Raise RequestError unless DVC can run here: .dvc, and a git repository with a commit (or core.no_scm)."""
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo
    from scmrepo.exceptions import SCMError

    here = Path.cwd()
    try:
        with Repo() as repo:
            if not repo.config["core"].get("no_scm"):
                repo.scm.get_rev()
    except NotDvcRepoError:
        raise RequestError(
            f"{here / '.dvc'}: no such folder, which DVC needs; run: git restore .dvc, or clone the repository again"
        ) from None
    except (DvcException, SCMError):
        raise RequestError(
            f"{here}: no git repository with a commit, which DVC needs (a ZIP download has none); "
            "clone the repository, or run: git init && git add . && git commit -m start"
        ) from None


def check_git() -> None:
    """Raise RequestError if git is missing or refuses this repository, as it does if it belongs to another user.

    The stages run without it, but `dvc exp` does not, and the report cannot name the commit.
    """
    if shutil.which("git") is None:
        raise RequestError("git: not found; install it, for example with: apt install git")
    asked = subprocess.run(
        ["git", "rev-parse", "--git-dir"],
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if remedy := re.search(r"git config --global --add safe\.directory .*", asked.stderr):
        raise RequestError(f"{Path.cwd()}: belongs to another user, so git refuses it; run: {remedy[0]}")
