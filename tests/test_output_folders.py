"""A stage refuses to start if DVC would refuse its output, or a rename would not reach it, once it is computed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipelines import stage

ROOT = Path(__file__).parents[1]
DEFINITIONS = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()


def outputs() -> Iterator[Path]:
    """Every output in dvc.yaml except the dataset, in profile micro; one per stage of a matrix."""
    for definition in DEFINITIONS:
        body = definition.get("do", definition)
        for out in [*body["outs"], *body.get("metrics", [])]:
            if isinstance(out, str):  # the dataset has options
                for name, value in {"profile": "micro", "item.group": "train", "item.split": "val"}.items():
                    out = out.replace(f"${{{name}}}", value)
                yield Path(out)


FOLDERS = {str(parent) for path in outputs() for parent in path.parents} - {"."}
FOLDERS |= {str(path) for path in outputs() if not path.suffix}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose profile is micro; the working folder. The larger disk is beside it."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "configs", root / "configs")
    (root / "configs" / "profile.yaml").write_text("profile: micro\n")
    (tmp_path / "large").mkdir()
    monkeypatch.chdir(root)
    return root


def runs() -> bool:
    """Whether a stage starts to compute; an error ends it with one line."""
    started = []
    stage(lambda: started.append(1))()
    return bool(started)


@pytest.mark.parametrize("target", ["large", "nowhere"])
@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_link_in_place_of_an_output_folder_is_refused_before_the_stage_runs(
    folder: str, target: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project / folder
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(project.parent / target, path.parent))
    with pytest.raises(SystemExit) as ended:
        runs()
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith(f"error: {folder}: link to ../") and "clone" in error[0]


def test_links_that_dvc_accepts_are_accepted(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's dataset, files linked to a cache of type symlink, a project reached through a link, and scratch."""
    for path in (project / "data/dataset/micro", project / "data/micro/.scratch"):
        path.parent.mkdir(parents=True)
        path.symlink_to(project.parent / "large")
    for path in (project / "data/micro/metrics.json", project / "data/micro/index/videos.parquet"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(project.parent / "cached")
    (project.parent / "way").symlink_to(project)
    monkeypatch.chdir(project.parent / "way")
    assert runs()


# Run with a file system of its own in place of a folder, which only this process sees.
MOUNTED = 'mkdir -p "$1" && mount -t tmpfs none "$1" && exec "$2" -c "$3"'
CHECK = "from samlove.data.layout import layout; layout().check_folders()"


def check_with_mount(folder: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", MOUNTED, "sh", folder, sys.executable, CHECK]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_disk_may_be_mounted_as_the_whole_data_folder_only(project: Path) -> None:
    whole = check_with_mount("data")
    if "unshare" in whole.stderr or "mount" in whole.stderr:
        pytest.skip(f"may not mount: {whole.stderr}")
    assert whole.returncode == 0, whole.stderr
    (project / "data" / "micro").mkdir(parents=True)
    for folder in ("data/micro/features", "data/micro/.scratch"):
        refused = check_with_mount(folder)
        assert f"{folder}: expected it on the same disk as data/micro" in refused.stderr
