"""The pipeline of the ablations, run by DVC on the smallest LAVS-synth: what it runs, shows and shares."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.stage_code import ROOT
from tests.test_sharing import Clone, make_team, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PIPELINE = "pipelines/ablations/dvc.yaml"
STAGES = {"ablation_features", "ablation_runs", "ablation_tables"}
NAMES = ("base", "clip", "no_cls")


def choose(clone: Clone, *names: str) -> None:
    """Keep these of the shipped runs, in one table."""
    shipped = yaml.safe_load((ROOT / "configs/micro/ablations.yaml").read_text())["runs"]
    rows = [{"run": name, "label": name} for name in names]
    table = {"title": "All", "base": names[0], "rows": rows}
    clone.edit("ablations", runs={name: shipped[name] for name in names}, tables={"all": table})


def finished(clone: Clone) -> dict[str, int]:
    """{run: when its checkpoint was written}."""
    runs = clone.root / "data/micro/ablations/runs"
    return {path.parts[-3]: path.stat().st_mtime_ns for path in runs.glob("*/seed0/best.safetensors")}


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("team")
    make_team(folder, ".dvc/plots")
    repository = folder / "repository"
    shutil.copy(repository / "pipelines/ablations/pipeline.yaml", repository / PIPELINE)  # as `make ablations` does
    run(repository, "git", "add", "--all")
    run(repository, "git", "commit", "--quiet", "--message", "with ablations")
    return folder


@pytest.fixture(scope="module")
def first(team: Path) -> Iterator[Clone]:
    """A clone in which the pipeline has run once and been pushed."""
    clone = Clone(team / "first", team, "copy")
    choose(clone, *NAMES)
    ran = clone.repro(PIPELINE)
    assert STAGES < ran and "train" not in ran, "the profile's own run is not needed"
    run(clone.root, "git", "add", "--all")
    run(clone.root, "git", "commit", "--quiet", "--message", "ablations")
    run(clone.root, "git", "push", "--quiet", "origin", "HEAD")
    run(clone.root, "dvc", "push", "--remote", "folder", PIPELINE, "index", "audio", "visual", "text", "sam2", "pack")
    yield clone


def test_runs_and_tables_are_there_and_dvc_shows_them(first: Clone) -> None:
    below = first.root / "data/micro/ablations"
    assert set(finished(first)) == set(NAMES)
    assert {path.name.split("-")[0] for path in (below / "features").iterdir()} == {"visual", "text"}
    assert {path.name for path in (below / "tables").iterdir()} == {"tables.md", "all.csv", "index.html", "curves.csv"}
    record = json.loads((below / "runs/clip/seed0/run.json").read_text())
    assert record["changes"]["visual.encoder"] == ["vit", "clip"]
    metrics = run(first.root, "dvc", "metrics", "show", "--md")
    assert all(f"data/micro/ablations/metrics/{name}.json" in metrics for name in NAMES)
    plots = run(first.root, "dvc", "plots", "show", "data/micro/ablations/tables/curves.csv", "--show-vega")
    assert all(f'"run": "{name}"' in plots for name in NAMES)
    assert first.repro(PIPELINE) == set()


def test_adding_a_run_executes_that_run_only_also_where_the_others_were_pulled(first: Clone, team: Path) -> None:
    second = Clone(team / "second", team, "copy")
    run(second.root, "dvc", "pull", "--remote", "folder", PIPELINE, "index", "audio", "visual", "text", "sam2", "pack")
    for clone in (first, second):
        before = finished(clone)
        choose(clone, *NAMES, "seg_4")
        printed = run(clone.root, "dvc", "repro", PIPELINE)
        assert "4 runs: 3 finished, 1 to execute" in printed
        assert len(re.findall(r"^(visual|text)-.*: nothing to compute", printed, re.MULTILINE)) == 2
        assert len(re.findall(r"^(train|val): packed already", printed, re.MULTILINE)) == 2
        after = finished(clone)
        assert {name: after[name] for name in NAMES} == before and "seg_4" in after


def test_a_changed_base_executes_all_runs(first: Clone) -> None:
    before = finished(first)
    first.edit("train", lr=0.001)
    assert first.repro(PIPELINE) == {"ablation_runs", "ablation_tables"}
    after = finished(first)
    assert set(after) == set(before) and all(after[name] != before[name] for name in after)
