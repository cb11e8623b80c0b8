"""Sharing: one clone computes and pushes, others pull and train; with linked caches, no stage edits a cached file.

DVC runs the real pipeline on the smallest LAVS-synth in clones of one repository. The remote is a folder or S3.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from samlove.cli.plan import per_shard
from samlove.data.layout import layout
from samlove.features.sizes import count, planned, read_settings
from tests.s3_service import s3_service
from tests.stage_code import ROOT
from tests.test_graph import without_profile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COPIED = ("dvc.yaml", "configs", "pipelines", "samlove", "stores", "weights", ".dvc/config", ".dvcignore", ".gitignore")
REMOTES = ("folder", "s3")
FEATURES = ("audio", "visual", "text", "sam2")
FEATURE_STAGES = {"audio", "visual", "text", "sam2-train", "sam2-eval"}
SMALL = {
    "dataset": {"synth": {"seed": 0, "scale": "small"}},
    "train": {"epochs": 1, "warmup_steps": 1},
    "infer": {"controls": []},
}


def run(folder: Path, *command: str) -> str:
    """Run a command on one thread, so that other tests have the other cores. Returns what it printed."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        **{f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Clone:
    """A clone of the team's repository, with the team's remotes and a cache of its own."""

    def __init__(self, root: Path, team: Path, link: str):
        self.root = root
        run(team, "git", "clone", "--quiet", str(team / "repository"), str(root))
        run(root, "dvc", "config", "--local", "cache.type", link)
        run(root, "dvc", "remote", "add", "--local", "folder", str(team / "remote"))
        run(root, "dvc", "remote", "add", "--local", "s3", "s3://team/samlove")

    def repro(self, *arguments: str) -> set[str]:
        """The stages that `dvc repro` ran, without the profile in their names."""
        printed = run(self.root, "dvc", "repro", *arguments)
        return {
            without_profile(name.split(":")[-1])
            for name in re.findall(r"^Running stage '(.*)':", printed, re.MULTILINE)
        }

    def edit(self, section: str, **values: object) -> None:
        path = self.root / "configs" / "micro" / f"{section}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))

    def cached(self) -> dict[str, str]:
        """Name of each file in the cache -> MD5 of its content."""
        files = self.root / ".dvc" / "cache" / "files" / "md5"
        return {
            path.parent.name + path.name.removesuffix(".dir"): hashlib.md5(path.read_bytes()).hexdigest()
            for path in files.glob("??/*")
        }

    def stored(self) -> list[Path]:
        data = self.root / "data" / "micro"
        return [p for name in ("features", "shards") for p in (data / name).rglob("*") if p.is_file()]

    def shares_with_cache(self) -> bool:
        """Whether every file of a store is a link, hard or symbolic, to the file in the cache."""
        files = {path.stat().st_ino for path in (self.root / ".dvc" / "cache" / "files" / "md5").glob("??/*")}
        stored = {path.stat().st_ino for path in self.stored()}
        return bool(stored) and stored <= files


def assert_untouched(clone: Clone) -> None:
    """The name of every file in the cache is the hash of its content: nothing was written through a link."""
    cached = clone.cached()
    assert cached and {name: found for name, found in cached.items() if name != found} == {}


def make_team(folder: Path, *more: str) -> None:
    """Write folder/remote and folder/repository, the released project at small scale. more: further paths to copy."""
    (folder / "remote").mkdir()
    repository = folder / "repository"
    for name in (*COPIED, *more):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, repository / name, ignore=shutil.ignore_patterns("__pycache__", "dvc.lock"))
        else:
            shutil.copy(ROOT / name, repository / name)
    for section, values in SMALL.items():
        path = repository / "configs" / "micro" / f"{section}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))
    run(repository, "git", "init", "--quiet")
    run(repository, "git", "config", "receive.denyCurrentBranch", "updateInstead")
    run(repository, "git", "add", "--all")
    run(repository, "git", "commit", "--quiet", "--message", "as released")


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the team's repository and remote; the environment names its S3 service."""
    folder = tmp_path_factory.mktemp("team")
    make_team(folder)
    with s3_service("team"):
        yield folder


@pytest.fixture(scope="module")
def first(team: Path, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """The clone that computes everything up to the shards and pushes it; its files are hard links to the cache."""
    clone = Clone(tmp_path_factory.mktemp("first") / "clone", team, "hardlink")
    assert clone.repro("pack") == {"dataset", "index", *FEATURE_STAGES, "pack"}
    run(clone.root, "git", "add", "--all")
    run(clone.root, "git", "commit", "--quiet", "--message", "features")
    run(clone.root, "git", "push", "--quiet")
    for remote in REMOTES:
        run(clone.root, "dvc", "push", "--remote", remote)
    return clone


@pytest.mark.parametrize("remote", REMOTES)
def test_features_alone_are_pulled_trained_on_and_not_computed(
    first: Clone, team: Path, tmp_path: Path, remote: str
) -> None:
    second = Clone(tmp_path / "second", team, "symlink")
    run(second.root, "dvc", "pull", "--remote", remote, *FEATURES)
    assert {p.name for p in (second.root / "data" / "micro").iterdir()} == {"features"}
    assert second.shares_with_cache() and all(path.is_symlink() for path in second.stored())
    pulled = second.cached()
    assert second.repro("train") == {"dataset", "index", "pack", "train"}
    second.edit("fusion", blocks=2)
    assert second.repro("evaluate") == {
        "train",
        *(f"infer-{s}" for s in ("val", "test_s", "test_u", "test_n")),
        "evaluate",
    }
    assert_untouched(second)
    assert pulled.items() <= second.cached().items()


def test_shards_alone_are_enough_to_train(first: Clone, team: Path, tmp_path: Path) -> None:
    third = Clone(tmp_path / "third", team, "symlink")
    run(third.root, "dvc", "pull", "--remote", "folder", "pack")
    assert third.repro("--allow-missing", "train") == {"train"}
    made = {p.name for p in (third.root / "data" / "micro").iterdir() if p.name[0] != "."}
    assert made == {"shards", "dvclive", "model"}
    assert_untouched(third)


@pytest.mark.parametrize("link", ["hardlink", "symlink"])
def test_no_stage_edits_a_file_that_is_linked_to_the_cache(first: Clone, team: Path, tmp_path: Path, link: str) -> None:
    clone = first
    if link == "symlink":
        clone = Clone(tmp_path / "fourth", team, link)
        run(clone.root, "dvc", "pull", "--remote", "folder", "index", *FEATURES, "pack")
        assert clone.repro("index") == {"dataset"}  # a dataset is in no cache; generated again, it is the same
    assert clone.shares_with_cache() and {path.is_symlink() for path in clone.stored()} == {link == "symlink"}
    before = clone.cached()
    clone.edit("text", max_tokens=24)
    assert clone.repro("pack") == {"text", "pack"}
    assert clone.repro("--force", "--single-item", "sam2@micro-train", "audio") == {"sam2-train", "audio"}
    assert clone.shares_with_cache()
    assert_untouched(clone)
    assert before.items() <= clone.cached().items()


def test_the_plan_predicts_the_sizes(first: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(first.root)
    settings, paths = read_settings(), layout()
    counts, source = count(settings, paths)
    assert source == "data/micro/index/expressions.parquet"
    for entry in planned(settings, counts):
        if entry.path.split("/")[1] in per_shard(settings):
            arrays = sum(p.stat().st_size for p in (paths.root / entry.path).rglob("c/**/*") if p.is_file())
            assert arrays == pytest.approx(sum(entry.bytes.values()), rel=0.02)
