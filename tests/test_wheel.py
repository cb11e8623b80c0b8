"""The wheel and the sdist: complete, and the commands work from the wheel in a folder without the repository."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE_STORE = """
import numpy as np
from pathlib import Path
from stores import FeatureStoreWriter
writer = FeatureStoreWriter(Path("store"), Path("scratch"), {"encoder": "example"}, ["a", "b"], shard_size=1)
for number, keys in writer.todo():
    writer.write_shard(number, {key: {"audio": np.ones((10, 128), np.float32)} for key in keys})
writer.publish()
"""

COPY_MASKS = """
import csv, shutil
for row in csv.DictReader(open("lavs/metadata.csv")):
    if row["split"] == "test_s":
        shutil.copytree(f"lavs/gt_mask/{row['vid']}/fid_{row['fid']}", f"masks/{row['uid']}")
"""


def python(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, encoding="utf-8", check=True
    )


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git tracks: building leaves files behind."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def installed(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of `checkout`, installed into a folder of its own; dependencies are those of the environment."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("target")
    python("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), ".", cwd=checkout)
    (wheel,) = wheels.iterdir()
    python("-m", "pip", "install", "--no-deps", "--no-compile", "--target", str(target), str(wheel), cwd=wheels)
    return target


def test_the_wheel_has_the_code_and_the_shipped_profile(installed: Path) -> None:
    for package in ("samlove", "stores", "pipelines"):
        code = {name for name in tracked() if name.startswith(f"{package}/") and not name.endswith(".md")}
        assert code <= {str(path.relative_to(installed)) for path in installed.rglob("*")}
    for folder in ("configs/micro", "weights/micro"):
        for name in tracked():
            if name.startswith(f"{folder}/"):
                assert (installed / "samlove" / "_shipped" / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (installed / "tests").exists() and not (installed / "setup.py").exists()


@pytest.mark.slow
def test_the_commands_work_without_the_repository(installed: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        return python(*arguments, cwd=tmp_path, PYTHONPATH=str(installed)).stdout

    def samlove(*arguments: str) -> str:
        return run("-m", "samlove.cli.main", *arguments)

    for package in ("samlove", "stores", "pipelines"):
        assert run("-c", f"import {package}; print({package}.__file__)").startswith(str(installed))
    assert "synth" in samlove("--help")
    samlove("synth", "--out", "lavs", "--seed", "0", "--scale", "small")
    assert "test_s" in samlove("audit", "lavs")
    run("-c", COPY_MASKS)
    assert "100.0" in samlove("score", "masks", "--dataset", "lavs", "--split", "test_s", "--protocol", "simtoken")
    samlove("predict", "--example")
    assert (tmp_path / "predictions" / "example" / "overlay.mp4").is_file()
    run("-c", MAKE_STORE)
    assert "all checksums match" in samlove("store", "verify", "--deep", "store")
    samlove("store", "export", "store", "store.h5")
    samlove("store", "import", "store.h5", "again")
    samlove("store", "diff", "store", "again")
    assert "feature store" in samlove("store", "info", "again")


def test_the_sdist_has_every_tracked_file(checkout: Path, tmp_path: Path) -> None:
    script = f"import setuptools.build_meta as backend; backend.build_sdist({str(tmp_path)!r})"
    python("-c", script, cwd=checkout)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as sdist:
        members = {name.partition("/")[2] for name in sdist.getnames()}
    assert set(tracked()) <= members
