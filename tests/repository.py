"""Makes a folder a repository of git and DVC, as a clone of this project is."""

import os
import subprocess
from pathlib import Path

NAMES = {f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, env={**os.environ, **NAMES}, check=True, capture_output=True)


def make_repository(folder: Path) -> None:
    """Commit everything in `folder` to a new repository."""
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").touch()
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "start")
