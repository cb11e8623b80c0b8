"""Runs of ablations: overrides of a profile's configuration, executed once each, in parallel, resumed and reused."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tqdm import tqdm

from pipelines import ablation_runs, ablation_tables, train
from samlove.ablations.driver import execute_missing
from samlove.ablations.run import Task, execute, make_tasks
from samlove.ablations.runs import plan_runs
from samlove.config import AblationsConfig, DatasetConfig, EvaluateConfig, LocalConfig, load
from samlove.data.layout import layout
from samlove.errors import RequestError, SamloveError
from tests.stage_code import ROOT
from tests.test_refusals import configure, evaluate_all, project, run, whole

__all__ = ["project", "whole"]  # fixtures: a small project after all stages have run, and a copy of it
ONE = LocalConfig(kind="local", workers=1)
RUNS: dict[str, dict] = {"base": {}, "no_cls": {"fusion": {"accumulate_cls": False}}}


def write_ablations(runs: dict[str, dict], seeds: tuple[int, ...] = (0,), **settings: Any) -> None:
    rows = [{"run": name, "label": name} for name in runs]
    table = {"title": "All", "base": next(iter(runs)), "rows": rows}
    content = {"seeds": list(seeds), "runs": runs, "tables": {"all": table}, **settings}
    Path("configs/tiny/ablations.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def tasks() -> list[Task]:
    runs = plan_runs(load(AblationsConfig), "tiny")
    return make_tasks(runs, layout(), load(DatasetConfig), load(EvaluateConfig))


def execute_all(workers: int = 1) -> None:
    execute_missing(tasks(), layout(), LocalConfig(kind="local", workers=workers, threads=1))


def executed() -> dict[str, int]:
    """{run/seed: when its result was made}."""
    records = layout().ablation_runs.glob("*/*/run.json")
    return {f"{p.parts[-3]}/{p.parts[-2]}": (p.parent / "best.safetensors").stat().st_mtime_ns for p in records}


def silent(**settings: Any) -> tqdm:
    return tqdm(**settings | {"disable": True})


def stopping_bar(stop: Event, steps: int) -> Callable[..., tqdm]:
    """A bar that sets `stop` at its update number `steps`, counted over all bars."""
    updates = 0

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            nonlocal updates
            updates += 1
            if updates == steps:
                stop.set()
            return super().update(n)

    return lambda **settings: Bar(**settings | {"file": open(os.devnull, "w", encoding="utf-8")})


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- what the runs are -----------------------------------------------------------------------------------------------


def test_a_run_is_the_profile_with_some_values_changed(project: Path) -> None:
    write_ablations({**RUNS, "both": {"train": {"lr": 0.5, "loss": {"dice": 0.25}}}}, seeds=(3, 4))
    runs = plan_runs(load(AblationsConfig), "tiny")
    assert [str(r) for r in runs] == [f"{name}, seed {seed}" for name in ("base", "no_cls", "both") for seed in (3, 4)]
    base, no_cls, both = runs[0], runs[2], runs[5]
    assert base.changes == {} and base.sections["train"].seed == 3
    assert no_cls.changes == {"fusion.accumulate_cls": [True, False]}
    assert both.changes == {"train.lr": [1e-4, 0.5], "train.loss.dice": [1.0, 0.25]}
    assert both.sections["train"].loss.bce == 1.0 and both.sections["train"].seed == 4
    assert both.sections["fusion"] == base.sections["fusion"] != no_cls.sections["fusion"]


def test_only_a_run_with_another_encoder_has_stores_and_shards_of_its_own(project: Path) -> None:
    texts = {"text": {"max_tokens": 7}}
    write_ablations({**RUNS, "short": texts, "short_no_cls": {**texts, **RUNS["no_cls"]}})
    base, no_cls, short, both = plan_runs(load(AblationsConfig), "tiny")
    paths = layout()
    for name in ("audio", "visual", "text", "sam2_train", "sam2_eval"):
        assert base.store(name, paths) == no_cls.store(name, paths) == paths.features / name
        assert (short.store(name, paths) == paths.features / name) == (name != "text")
    assert base.shards(paths) == no_cls.shards(paths) == paths.shards
    assert short.shards(paths).parent == paths.ablation_shards
    assert (short.store("text", paths), short.shards(paths)) == (both.store("text", paths), both.shards(paths))


def test_more_frames_of_training_need_no_other_features_for_evaluation(project: Path) -> None:
    write_ablations({**RUNS, "any": {"sam2": {"train_frames": 2}, "train": {"supervise": "any"}}})
    any_ = plan_runs(load(AblationsConfig), "tiny")[-1]
    paths = layout()
    assert any_.store("sam2_eval", paths) == paths.features / "sam2_eval" and not any_.owns("sam2_eval")
    assert any_.store("sam2_train", paths).parent == paths.ablation_features
    assert any_.shards(paths).parent == paths.ablation_shards
    write_ablations(
        {**RUNS, "both": {"sam2": {"train_frames": 2, "dtype": "int8"}}, "int8": {"sam2": {"dtype": "int8"}}}
    )
    *_, both, int8 = plan_runs(load(AblationsConfig), "tiny")
    assert both.store("sam2_eval", paths) == int8.store("sam2_eval", paths) != paths.features / "sam2_eval"
    assert both.store("sam2_train", paths) != int8.store("sam2_train", paths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": {"frames": 5}}, "runs.odd: expected sections audio, visual, .* found dataset; another dataset"),
        ({"fusion": {"block": 3}}, "runs.odd.fusion: block: no such setting"),
        ({"fusion": {"blocks": "three"}}, "runs.odd.fusion: blocks: .*found 'three'"),
        ({"train": {"seed": 1}}, "runs.odd: train.seed is not a run's; set seeds"),
        ({"infer": {"controls": []}}, "runs.odd: infer.controls is not a run's; set controls"),
    ],
)
def test_refuses_an_override_that_makes_no_sense(project: Path, changes: dict, message: str) -> None:
    write_ablations({**RUNS, "odd": changes})
    with pytest.raises(RequestError, match=message):
        plan_runs(load(AblationsConfig), "tiny")


# --- what is executed ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_unchanged_run_equals_the_profiles_own_stages(project: Path) -> None:
    torch.set_num_threads(1)  # as each of the local workers
    run(train.main)
    evaluate_all()
    write_ablations(RUNS)
    shutil.copytree(ROOT / "configs" / "cluster", "configs/cluster")
    run(ablation_runs.main)
    run(ablation_tables.main)
    base = layout().ablation_runs / "base" / "seed0"
    expected, found = load_file("data/tiny/model/best.safetensors"), load_file(base / "best.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    own, ours = (json.loads(path.read_text()) for path in (layout().metrics, base / "metrics.json"))
    assert own == ours
    scores = json.loads((layout().ablation_metrics / "base.json").read_text())
    assert scores["seen"]["J"] == pytest.approx(own["test_s"]["J"])
    assert (layout().ablation_tables / "index.html").is_file()
    assert not (layout().scratch / "ablations").exists() or not any((layout().scratch / "ablations").iterdir())


def test_executes_what_is_missing_and_nothing_else(project: Path) -> None:
    write_ablations(RUNS)
    execute_all()
    first = executed()
    assert set(first) == {"base/seed0", "no_cls/seed0"}
    execute_all()
    assert executed() == first
    write_ablations({"renamed": RUNS["no_cls"], "base": {}, "more": {"fusion": {"seg_tokens": 2}}}, seeds=(0, 1))
    execute_all()
    second = executed()
    assert second["base/seed0"] == first["base/seed0"]
    assert second["renamed/seed0"] == first["no_cls/seed0"], "a renamed run was executed again"
    assert set(second) == {f"{name}/seed{seed}" for name in ("renamed", "base", "more") for seed in (0, 1)}
    assert json.loads((layout().ablation_runs / "renamed/seed0/run.json").read_text())["run"] == "renamed"
    configure("train", lr=0.01)
    execute_all()
    third = executed()
    assert set(third) == set(second) and all(third[name] != second[name] for name in third)


def test_runs_that_swap_their_names_keep_their_results(project: Path) -> None:
    write_ablations(RUNS)
    execute_all()
    before = executed()
    write_ablations({"base": RUNS["no_cls"], "no_cls": {}})
    execute_all()
    after = executed()
    assert (after["base/seed0"], after["no_cls/seed0"]) == (before["no_cls/seed0"], before["base/seed0"])
    record = json.loads((layout().ablation_runs / "base/seed0/run.json").read_text())
    assert record["run"] == "base" and record["changes"] == {"fusion.accumulate_cls": [True, False]}


def test_equal_runs_are_trained_once(project: Path) -> None:
    write_ablations({**RUNS, "same": {"fusion": {"accumulate_cls": True}}})
    execute_all()
    paths = [layout().ablation_runs / name / "seed0" / "best.safetensors" for name in ("base", "same")]
    assert os.path.samefile(*paths)


def test_controls_are_computed_only_if_asked_for(project: Path) -> None:
    configure("infer", controls=["true_mask"])
    write_ablations({"base": {}})
    execute_all()
    rows = layout().ablation_runs / "base" / "seed0" / "evaluation" / "rows.parquet"
    assert "J_true_mask" not in pd.read_parquet(rows)
    write_ablations({"base": {}}, controls=["true_mask"])
    execute_all()
    assert "J_true_mask" in pd.read_parquet(rows)


def test_a_run_that_fails_does_not_stop_the_others(project: Path) -> None:
    write_ablations({"wild": {"train": {"lr": 1e3, "epochs": 40}}, **RUNS})
    with pytest.raises(SamloveError, match=r"1 of 3 runs failed, the others are finished: wild, seed 0: .*not finite"):
        execute_all()
    assert set(executed()) == {"base/seed0", "no_cls/seed0"}


def test_a_stopped_run_resumes_and_gives_the_same_result(project: Path) -> None:
    write_ablations({"base": {"train": {"epochs": 4}}})
    (task,) = tasks()
    torch.set_num_threads(1)
    execute(task, silent, Event())
    expected = load_file(task.out / "best.safetensors"), (task.out / "metrics.json").read_text()
    shutil.rmtree(task.out)
    for steps in (1, 3, 5, 6, 7, 8):  # in training, between its epochs, and in inference
        stop = Event()
        try:
            execute(task, stopping_bar(stop, steps), stop)
            break
        except KeyboardInterrupt:
            assert not task.out.exists()
    if not task.out.exists():
        execute(task, silent, Event())
    found = load_file(task.out / "best.safetensors")
    assert all(torch.equal(found[name], expected[0][name]) for name in found)
    assert (task.out / "metrics.json").read_text() == expected[1]
    assert not task.work.exists()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)
    return found


@pytest.mark.slow
def test_another_worker_resumes_the_run_of_one_that_was_killed(project: Path) -> None:
    """Two worker processes; the one that trains the first run is killed after its state was saved."""
    write_ablations({"base": {"train": {"epochs": 40}}, "no_cls": RUNS["no_cls"]})
    task = tasks()[0]
    torch.set_num_threads(1)
    execute(task, silent, Event())
    expected = load_file(task.out / "best.safetensors")
    shutil.rmtree(task.out)
    killed = []

    def kill() -> None:
        wait_for(lambda: list(task.work.glob("train/*/state.safetensors")))
        holder = int((task.work / "train.lock").read_text().split()[0])
        assert holder != os.getpid()
        killed.append(holder)
        os.kill(holder, signal.SIGKILL)

    killer = Thread(target=kill)
    killer.start()
    execute_all(workers=2)
    killer.join()
    assert killed and set(executed()) == {"base/seed0", "no_cls/seed0"}
    found = load_file(task.out / "best.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in found)
