"""Training in several processes: the same samples, weights and scores as in one; failures and signals end all of them.

Real processes, on the CPU, with gloo.
"""

import itertools
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dvclive import Live

from samlove.model.checkpoint import read_tensors
from samlove.model.processes import VARIABLES, processes_to_start
from samlove.train import Trainer
from tests.processes_run import Case, new_trainer, train_in
from tests.tiny_training import order, write_sam2

LR = 1e-4  # Adam's first steps are equally large for gradients that are 0 but for rounding


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(write_sam2(tmp_path / "sam2.safetensors"), tmp_path / "several", {"lr": LR, "clip_norm": 1.0})


def alone(case: Case) -> Trainer:
    """The case in this process, from its saved state if there is one, to the end."""
    trainer = new_trainer(case)
    case.root.mkdir(exist_ok=True)
    with Live(str(case.root / "live"), save_dvc_exp=False, dvcyaml=None) as live:
        trainer.run(live)
    return trainer


def ended(case: Case, name: str = "state") -> tuple[dict[str, torch.Tensor], dict]:
    (path,) = case.root.glob(f"scratch/*/{name}.safetensors")
    return read_tensors(path)


def assert_equal(found: Case, expected: Case) -> None:
    """Weights, gradients' running means and scores are those of the other run, but for the order of additions.

    The means tell a wrongly scaled gradient, to which Adam's steps are blind.
    """
    tensors, header = ended(found)
    wanted, wanted_header = ended(expected)
    for kind in ("model/", "exp_avg/", "exp_avg_sq/"):
        names = [name for name in sorted(wanted) if name.startswith(kind)]
        a, b = (torch.cat([some[name].flatten().double() for name in names]) for some in (tensors, wanted))
        assert (a - b).norm() < 1e-6 * b.norm(), kind
    assert header["step"] == wanted_header["step"] and len(header["history"]) == len(wanted_header["history"])
    for row, other in zip(header["history"], wanted_header["history"], strict=True):
        assert row == pytest.approx(other, rel=1e-6)


def assert_same_bits(found: Case, expected: Case) -> None:
    for name in ("state", "best"):
        (tensors, header), (wanted, wanted_header) = ended(found, name), ended(expected, name)
        assert header == wanted_header and tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(("count", "accumulate"), [(2, 2), (3, 3)])
def test_several_processes_reach_what_one_reaches_and_read_each_sample_once(case, tmp_path, count, accumulate):
    """Steps of 6 and 4 samples in two processes; of 9 and 1 in three, of which two have no sample in the last step."""
    settings = {**case.settings, "accumulate": accumulate}
    several, one = replace(case, settings=settings), replace(case, settings=settings, root=tmp_path / "one")
    found = train_in(several, count)
    assert [each["status"] for each in found] == [0] * count, found
    for rank, each in enumerate(found):
        shares = [
            order(epoch)[start : start + 3 * accumulate][rank::count]
            for epoch in (0, 1)
            for start in range(0, 10, 3 * accumulate)
        ]
        assert each["train"] == np.concatenate(shares).tolist()
        assert each["val"] == list(range(5))[rank::count] * 2
    alone(one)
    assert_equal(several, one)


def test_an_error_in_one_process_ends_all_with_it(case):
    broken = int(order(0)[7])  # of the second step, in the second process
    first, second = train_in(replace(case, broken=broken), 2)
    assert (second["status"], second["error"]) == (1, "SamloveError")
    assert f"the loss is not finite for 1 of 2 rows: row{broken};" in second["text"]
    assert (first["status"], first["error"]) == (1, "OtherFailed")
    assert first["text"] == f"process 1: {second['text']}"


@pytest.mark.parametrize(("of", "reads"), [(1, 2), (0, 6)])
def test_a_killed_process_ends_the_others_and_the_run_resumes(case, tmp_path, of, reads):
    whole = replace(case, root=tmp_path / "whole")
    assert [each["status"] for each in train_in(whole, 2)] == [0, 0]
    killed = replace(case, of=of, reads=reads, number=signal.SIGKILL)
    found = train_in(killed, 2)
    assert found[of]["status"] == -signal.SIGKILL
    assert found[1 - of]["status"] == 1 and "lost contact with another one" in found[1 - of]["text"]
    assert [each["status"] for each in train_in(case, 2)] == [0, 0]
    assert_same_bits(case, whole)


def test_processes_that_do_not_see_the_same_state_are_refused(case):
    train_in(replace(case, reads=4), 2)
    found = train_in(replace(case, apart=True), 2)
    assert [each["status"] for each in found] == [1, 1]
    assert all("the processes found different runs or states" in each["text"] for each in found)
    assert "at step 1" in found[0]["text"] and "at step 0" in found[0]["text"]


def test_a_full_disk_of_the_first_process_ends_all_and_the_run_resumes(case, tmp_path):
    whole = replace(case, root=tmp_path / "whole")
    train_in(whole, 2)
    (best,) = whole.root.glob("scratch/*/best.safetensors")
    first, second = train_in(replace(case, file_limit=best.stat().st_size + 1000), 2)  # less than the state
    assert (first["status"], first["error"]) == (1, "OSError") and "File too large" in first["text"]
    assert (second["status"], second["error"]) == (1, "OtherFailed")
    assert "state.safetensors.partial: File too large; free some space and run the same" in second["text"]
    train_in(case, 2)
    assert_same_bits(case, whole)


@pytest.mark.parametrize(
    ("before", "after", "reads", "split"),
    [(2, 1, 4, "train"), (1, 2, 8, "train"), (2, 2, 2, "val"), (2, 2, 7, "train")],
)
def test_a_signal_to_one_process_ends_all_and_any_number_resumes(case, tmp_path, before, after, reads, split):
    whole = replace(case, root=tmp_path / "whole")
    train_in(whole, after)
    stopped = train_in(replace(case, of=before - 1, reads=reads, split=split), before)
    assert [each.get("error") for each in stopped] == ["KeyboardInterrupt"] * before
    _, header = ended(case)
    assert 0 < header["step"] < 4
    assert [each["status"] for each in train_in(case, after)] == [0] * after
    (assert_same_bits if before == after else assert_equal)(case, whole)


@pytest.mark.slow
def test_runs_killed_at_every_step_end_bit_identical(case, tmp_path):
    """SIGTERM and SIGKILL at every read of either process, then resumed."""
    whole = replace(case, root=tmp_path / "whole")
    reads = [len(each["train"]) for each in train_in(whole, 2)]
    for number, of in itertools.product((signal.SIGTERM, signal.SIGKILL), (0, 1)):
        for read in range(1, reads[of] + 1):
            killed = replace(case, root=tmp_path / f"{number}_{of}_{read}", of=of, reads=read, number=number)
            assert all(each["status"] not in (0, None) for each in train_in(killed, 2)), killed
            again = replace(killed, reads=0)
            assert [each["status"] for each in train_in(again, 2)] == [0, 0], killed
            assert_same_bits(again, whole)


def test_processes_of_a_machine_are_its_gpus_or_one(monkeypatch):
    assert processes_to_start(2) == 2
    assert processes_to_start(None) == max(1, torch.cuda.device_count())
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes_to_start(2) == 2  # torchrun sets more than that
    for name in VARIABLES:
        monkeypatch.setenv(name, "4")
    assert processes_to_start(2) == 1
