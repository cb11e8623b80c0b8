"""What `make demo` says before and after it runs the pipeline."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from samlove.cli import demo
from tests.test_graph import ROOT, Project

EVERY_STAGE = {stage for part in demo.PARTS for stage in part.seconds}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("tools"))


def test_each_stage_belongs_to_one_part() -> None:
    assert EVERY_STAGE == set(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
    assert sum(len(part.seconds) for part in demo.PARTS) == len(EVERY_STAGE)


def test_the_plan_lists_what_dvc_would_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    assert demo.stages_to_run() == {}  # after a run

    shutil.rmtree(project.root / "data/micro/predictions/val")
    assert demo.stages_to_run() == {"infer": 1 / 4, "evaluate": 1, "report": 1}

    with (project.root / "samlove" / "train.py").open("a") as file:
        file.write("changed = True\n")
    assert demo.stages_to_run() == {"train": 1, "infer": 1, "evaluate": 1, "report": 1}

    (project.root / "dvc.lock").unlink()
    shutil.rmtree(project.root / "data" / "micro")
    assert demo.stages_to_run() == dict.fromkeys(EVERY_STAGE, 1)  # as in a fresh clone


def test_the_plan_has_one_line_per_part_and_their_sum() -> None:
    everything = dict.fromkeys(EVERY_STAGE, 1.0)
    text = demo.render_plan(everything, 1.0)
    assert "the whole pipeline" in text and "estimates" in text
    for part in demo.PARTS:
        assert re.search(rf"^  {part.title} +\d+ (s|min)  {re.escape(part.meaning)}$", text, re.M)
    minutes = sum(seconds for part in demo.PARTS for seconds in part.seconds.values()) / 60
    assert re.search(rf"^  total +{minutes:.0f} min$", text, re.M)
    assert re.search(rf"^  total +{minutes / 2:.0f} min$", demo.render_plan(everything, 2.0), re.M)


def test_the_plan_of_a_later_run_lists_only_its_parts() -> None:
    text = demo.render_plan({"evaluate": 1.0, "report": 1.0}, 1.0)
    assert "not up to date" in text
    assert [part.title for part in demo.PARTS if f"\n  {part.title} " in text] == ["report"]


def test_the_speed_test_gives_a_plausible_speed() -> None:
    assert 0.001 < demo.machine_speed() < 1000


def test_a_run_that_is_up_to_date_says_so_and_shows_the_results(monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, "active_profile", lambda: "micro")
    monkeypatch.setattr(demo, "stages_to_run", dict)
    monkeypatch.setattr(demo, "render_results", lambda: "the table")
    demo.main()
    said = capsys.readouterr().out
    assert said.index("everything is up to date") < said.index("the table") < said.index("Worth trying next")


def test_another_profile_is_refused_in_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "profile.yaml").write_text("profile: refavs\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "refavs" in said


def test_a_failed_run_ends_with_status_1(monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, "active_profile", lambda: "micro")
    monkeypatch.setattr(demo, "stages_to_run", lambda: {"train": 1.0})
    monkeypatch.setattr(demo, "DVC", ["false"])
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_the_commands_to_try_next_exist() -> None:
    for file, key in re.findall(r"-S (\S+?):(\w+)=", demo.NEXT):
        assert key in yaml.safe_load((ROOT / file).read_text())
    assert set(re.findall(r"samlove (\w+)", demo.NEXT)) == {"picture", "doctor"}  # tests/test_cli.py runs both
