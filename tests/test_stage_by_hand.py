"""A stage that runs without DVC (`python -m pipelines.NAME`) changes no file that DVC's cache shares with data/.

DVC links its cached files into data/, so a stage that edited one of its outputs would edit the cache as well.
"""

import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from pipelines import evaluate, report
from samlove.data.index import audit_folder, write_index
from samlove.scoring.report.picture import save
from samlove.train import train
from tests import tiny_training as tiny
from tests.made_run import make_run
from tests.stage_code import ROOT
from tests.test_index import ROWS, write_rows
from tests.test_sharing import COPIED, SMALL, run

by_link = pytest.mark.parametrize("kind", ["hardlink", "symlink"])


class Outputs:
    """Outputs of an earlier run that are links to cached files, as DVC makes them."""

    def __init__(self, cache: Path, kind: str, *outputs: Path):
        self.cached = {path: cache / str(number) for number, path in enumerate(outputs)}
        cache.mkdir()
        for path, copy in self.cached.items():
            copy.write_text("earlier")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(copy) if kind == "symlink" else os.link(copy, path)

    def assert_replaced(self) -> None:
        for path, copy in self.cached.items():
            assert copy.read_text() == "earlier", f"{path}: edited in the cache"
            assert not path.is_symlink() and path.stat().st_nlink == 1 and path.read_bytes() != b"earlier"


@by_link
def test_evaluate_and_report_replace_their_outputs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data" / "micro"
    make_run(data, {"test_s": 3, "test_u": 3, "test_n": 3})
    (tmp_path / "data" / "dataset").mkdir()
    (data / "set").rename(tmp_path / "data" / "dataset" / "micro")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "profile.yaml").write_text("profile: micro\n")
    names = ("metrics.json", "evaluation/rows.parquet", "evaluation/details.json", "report/index.html")
    outputs = Outputs(tmp_path / "cache", kind, *(data / name for name in names))
    monkeypatch.chdir(tmp_path)
    evaluate.main()
    report.main()
    outputs.assert_replaced()
    assert not list(data.glob("*.partial*"))


@by_link
def test_index_replaces_its_files(kind: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder", ROWS)
    names = ("videos.parquet", "expressions.parquet", "audit.json", "media.sha256", "gt_mask.sha256")
    outputs = Outputs(tmp_path / "cache", kind, *(tmp_path / "index" / name for name in names))
    write_index(audit_folder(tmp_path / "folder", check_media=False), tmp_path / "index")
    outputs.assert_replaced()


@by_link
def test_train_replaces_checkpoint_and_curves(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVCLIVE_RESUME", "1")  # DVCLive would append to existing curves
    checkpoint, curves = tmp_path / "model" / "best.safetensors", tmp_path / "dvclive"
    old = (checkpoint, curves / "metrics.json", curves / "plots" / "metrics" / "train" / "loss.tsv")
    outputs = Outputs(tmp_path / "cache", kind, *old)
    origin = tiny.origin(tiny.write_sam2(tmp_path / "sam2.safetensors"), epochs=1)
    train(origin, tiny.samples(), torch.device("cpu"), checkpoint, curves, tmp_path / "scratch")
    outputs.assert_replaced()


@by_link
def test_a_picture_replaces_the_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    outputs = Outputs(tmp_path / "cache", kind, path)
    save(Image.new("RGB", (8, 8)), path)
    outputs.assert_replaced()


# --- every stage, with DVC -------------------------------------------------------------------------------------------

# In one process, because importing takes longer than computing.
BY_HAND = """
import runpy, sys
for command in (
    "dataset", "index", "audio", "visual", "text", "sam2 train", "sam2 eval", "pack", "train",
    "infer val", "infer test_s", "infer test_u", "infer test_n", "evaluate", "report",
):
    stage, *sys.argv[1:] = command.split()
    runpy.run_module(f"pipelines.{stage}", run_name="__main__")
"""


def cached_files(root: Path) -> dict[str, str]:
    """Name of each file in DVC's cache -> MD5 of its content, which is its name if nobody edited it."""
    found = {}
    for path in (root / ".dvc" / "cache" / "files" / "md5").glob("??/*"):
        found[path.parent.name + path.name.removesuffix(".dir")] = hashlib.md5(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline after a `dvc repro` on the smallest LAVS-synth."""
    root = tmp_path_factory.mktemp("project")
    for name in COPIED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        copy: Callable = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    (root / "dvc.lock").unlink(missing_ok=True)
    for section, values in SMALL.items():
        configure(root, section, values)
    run(root, "git", "init", "--quiet")
    run(root, "git", "add", "--all")
    run(root, "git", "commit", "--quiet", "--message", "as released")
    run(root, "dvc", "repro")
    return root


def configure(root: Path, section: str, values: dict) -> None:
    path = root / "configs" / "micro" / f"{section}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "seed"), [("hardlink", 1), ("symlink", 2)])
def test_no_stage_by_hand_edits_the_cache(project: Path, kind: str, seed: int) -> None:
    metrics = (project / "data/micro/metrics.json").read_bytes()
    run(project, "dvc", "config", "--local", "cache.type", kind)
    run(project, "dvc", "checkout", "--relink")
    before = cached_files(project)
    for path in (project / ".dvc" / "cache").rglob("*"):
        path.chmod(path.stat().st_mode | stat.S_IWUSR)  # not only root may write to the cached files
    other = {"synth": {"seed": seed, "scale": "small"}}  # so that every stage computes other bytes
    configure(project, "dataset", other)
    run(project, "python", "-c", BY_HAND)
    run(project, "python", "-m", "samlove.cli.main", "picture", "data/micro/report/picture.png")
    assert (project / "data/micro/metrics.json").read_bytes() != metrics
    assert before and cached_files(project) == before == {name: name for name in before}
    configure(project, "dataset", SMALL["dataset"])
    run(project, "dvc", "repro")
    assert (project / "data/micro/metrics.json").read_bytes() == metrics


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_index_before_a_failing_one_is_brought_back_by_dvc_checkout(project: Path) -> None:
    run(project, "dvc", "repro", "index")
    index = project / "data" / "micro" / "index"
    before = {path.name: path.read_bytes() for path in index.iterdir()}
    configure(project, "dataset", {"frames": 11, "policy": {"frame_count": "fail"}})
    with pytest.raises(AssertionError, match="policy 'fail': frame_count"):
        run(project, "dvc", "repro", "index")
    assert not any(index.iterdir())  # DVC removes the outputs of a stage before it runs the stage
    run(project, "dvc", "checkout", "index")
    assert {path.name: path.read_bytes() for path in index.iterdir()} == before
    configure(project, "dataset", {"frames": 10, "policy": {}})
