import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from dask.system import CPU_COUNT
from dvclive import Live

from pipelines import train as stage
from samlove.config import TrainConfig, load
from samlove.errors import RequestError, SamloveError
from samlove.model.checkpoint import Origin, load_model, read_header, read_tensors
from samlove.model.optimizer import warmup_decay
from samlove.model.processes import ALONE
from samlove.train import Samples, Trainer, train
from stores import ShardWriter
from tests.stage_code import ROOT
from tests.tiny_training import DIMS, Items, collate, origin, samples, write_sam2

CPU = torch.device("cpu")
STOPPED = "stopped; run the same command again to resume (some stages start over)"


@pytest.fixture
def sam2(tmp_path: Path) -> Path:
    return write_sam2(tmp_path / "sam2.safetensors")


class KillingItems(Items):
    """Sends the process a signal when an item is read for the n-th time."""

    def __init__(self, count: int, seed: int, reads: int, number: int = signal.SIGTERM) -> None:
        super().__init__(count, seed)
        self.numbers, self.reads, self.number = itertools.count(1), reads, number

    def __getitem__(self, index: int) -> dict:
        if next(self.numbers) == self.reads:
            os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


class BrokenItems(Items):
    """Item 4 has a feature that is not a number."""

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        if index == 4:
            item["visual"][0, 1] = float("nan")
        return item


def new_trainer(start: Origin, scratch: Path, data: Samples | None = None) -> Trainer:
    torch.manual_seed(start.train.seed)
    return Trainer(start.build(), start, data or samples(), CPU, scratch)


def live(folder: Path) -> Live:
    return Live(str(folder), save_dvc_exp=False, dvcyaml=None)


def test_warmup_then_linear_decay_to_zero():
    shares = [warmup_decay(step, total=10, warmup=4) for step in range(11)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    assert warmup_decay(0, total=3, warmup=0) == 1


def test_it_learns_and_publishes_what_it_learned(sam2, tmp_path):
    start = origin(sam2, epochs=30, batch_size=10, accumulate=1, lr=3e-3, warmup_steps=10, clip_norm=1.0)
    checkpoint = tmp_path / "model" / "best.safetensors"
    train(start, samples(), CPU, checkpoint, tmp_path / "dvclive", tmp_path / "scratch")
    header = read_header(checkpoint)
    assert header.threshold is None
    assert header.validation["J&F"] > 60  # a model that knows the two halves but guesses which one: 53
    metrics = json.loads((tmp_path / "dvclive" / "metrics.json").read_text())
    assert set(metrics["train"]) == {"loss", "bce", "dice"} and set(metrics["val"]) == {"J", "F", "J&F"}
    curve = (tmp_path / "dvclive" / "plots" / "metrics" / "val" / "J&F.tsv").read_text().splitlines()
    assert len(curve) == 1 + 30
    best = max(float(line.split("\t")[1]) for line in curve[1:])
    assert header.validation["J&F"] == pytest.approx(best)
    assert not any((tmp_path / "scratch").iterdir())
    again = new_trainer(start, tmp_path / "scratch")
    again.model.load_state_dict(load_model(checkpoint).state_dict())
    assert again.validate() == pytest.approx(header.validation)


def test_presence_learns_what_refers_to_nothing_and_keeps_its_threshold(sam2, tmp_path):
    recipe = {"epochs": 30, "batch_size": 10, "accumulate": 1, "lr": 3e-3, "warmup_steps": 10, "clip_norm": 1.0}
    start = origin(sam2, null_references="presence", **recipe)
    given = samples(Items(10, seed=1, nulls=True), Items(8, seed=2, nulls=True))
    train(start, given, CPU, tmp_path / "best.safetensors", tmp_path / "dvclive", tmp_path / "scratch")
    header = read_header(tmp_path / "best.safetensors")
    assert header.threshold is not None and header.threshold == header.validation["threshold"] >= 0
    assert header.validation["J"] > 60  # of the best epoch; the object score is learned later than the masks
    assert json.loads((tmp_path / "dvclive" / "metrics.json").read_text())["val"]["S"] == 0


@pytest.mark.parametrize(
    ("split", "reads", "consumed", "settings"),
    [
        ("train", 2, 0, {}),
        ("train", 8, 6, {}),
        ("train", 18, 6, {}),
        ("train", 18, 6, {"optimizer": "muon"}),
        ("train", 18, None, {"workers": 2}),
        ("val", 3, 10, {}),
    ],
    ids=["step1", "step2", "epoch2", "muon", "threads", "val"],
)
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(sam2, tmp_path, split, reads, consumed, settings):
    start = origin(sam2, clip_norm=1.0, **{"workers": 0, **settings})
    whole = new_trainer(start, tmp_path / "whole")
    whole.run(live(tmp_path / "live_whole"))

    items = {"train": Items(10, seed=1), "val": Items(4, seed=2)}
    items[split] = KillingItems(items[split].count, items[split].seed, reads)
    with pytest.raises(KeyboardInterrupt):
        new_trainer(start, tmp_path / "parts", samples(**items)).run(live(tmp_path / "live_parts"))
    rest = new_trainer(start, tmp_path / "parts")
    assert rest.state_file.exists() and rest.progress != whole.progress
    assert consumed in (rest.progress.consumed, None)  # None: threads read ahead of the step
    rest.run(live(tmp_path / "live_parts"))
    assert_same_run(rest, whole)
    logged = [(tmp_path / name / "metrics.json").read_bytes() for name in ("live_whole", "live_parts")]
    assert logged[0] == logged[1]


def test_a_signal_during_a_step_ends_the_run_after_the_step(sam2, tmp_path):
    whole = new_trainer(origin(sam2), tmp_path / "whole")
    whole.run(live(tmp_path / "live_whole"))
    stopped = new_trainer(origin(sam2), tmp_path / "parts")
    forwards = itertools.count(1)  # two in each step
    stopped.model.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT) if next(forwards) == 1 else None)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(live(tmp_path / "live_parts"))
    rest = new_trainer(origin(sam2), tmp_path / "parts")
    assert (rest.progress.step, rest.progress.consumed) == (1, 6)
    rest.run(live(tmp_path / "live_parts"))
    assert_same_run(rest, whole)


def assert_same_run(found: Trainer, expected: Trainer) -> None:
    """Both have ended with the same bits in the state and in the best checkpoint."""
    assert found.progress == expected.progress
    for name in ("state.safetensors", "best.safetensors"):
        wanted, header = read_tensors(expected.folder / name)
        tensors, found_header = read_tensors(found.folder / name)
        assert found_header == header
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)
    assert any(key.startswith("exp_avg_sq/") for key in read_tensors(expected.state_file)[0])


@pytest.mark.parametrize(("workers", "number"), [(0, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_ends_a_wait_for_a_sample_that_never_comes(sam2, tmp_path, workers, number):
    """In its own process, which must end although a thread still waits, and with the state saved."""
    whole = new_trainer(origin(sam2), tmp_path / "whole")
    whole.run(live(tmp_path / "live"))
    command = [sys.executable, "-m", "tests.stuck_run", str(sam2), str(tmp_path / "parts"), str(workers)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as stuck:
        try:
            assert stuck.stdout is not None and stuck.stdout.readline() == "first step\n"
            time.sleep(1)  # now it waits for the sample
            stuck.send_signal(number)
            _, errors = stuck.communicate(timeout=60)
        finally:
            stuck.kill()
    assert stuck.returncode == 1, errors
    assert errors.splitlines()[-1].startswith("stopped; run the same command again")
    rest = new_trainer(origin(sam2), tmp_path / "parts")
    assert (rest.progress.step, rest.progress.consumed) == (1, 6)
    rest.run(live(tmp_path / "live"))
    assert_same_run(rest, whole)


def test_interrupt_handlers_are_put_back(sam2, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    data = samples(KillingItems(10, seed=1, reads=1, number=signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        new_trainer(origin(sam2), tmp_path / "scratch", data).run(live(tmp_path / "live"))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_with_different_settings_is_not_resumed(sam2, tmp_path):
    data = samples(KillingItems(10, seed=1, reads=8))
    with pytest.raises(KeyboardInterrupt):
        new_trainer(origin(sam2), tmp_path, data).run(live(tmp_path / "live"))
    assert new_trainer(origin(sam2), tmp_path).progress.consumed == 6
    assert new_trainer(origin(sam2, lr=2e-3), tmp_path).progress.consumed == 0
    for settings in ({"workers": 1}, {"processes": 2}):  # do not change the samples
        assert new_trainer(origin(sam2, **settings), tmp_path).progress.consumed == 6


def test_accumulated_batches_are_one_large_batch(sam2, tmp_path):
    ends = []
    for size, accumulate in ((6, 1), (3, 2)):
        trainer = new_trainer(origin(sam2, epochs=1, lr=1e-4, batch_size=size, accumulate=accumulate), tmp_path)
        trainer.run(live(tmp_path / "live"))
        ends.append({name: parameter.detach() for name, parameter in trainer.parameters.items()})
        assert trainer.progress.step == 2  # 10 samples: 6 and 4
    for name, expected in ends[0].items():
        # Adam's first steps are equally large for small and large gradients, so a few values may differ.
        assert torch.isclose(ends[1][name], expected, atol=1e-5).float().mean() > 0.95, name


def test_sam2_learns_at_its_scaled_rate(sam2, tmp_path):
    def moved(scale: float) -> dict[str, float]:
        trainer = new_trainer(origin(sam2, sam2_lr_scale=scale), tmp_path / str(scale))
        before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        trainer._step([collate([samples().train[i] for i in range(3)])], 3)
        return {name: float((p - before[name]).abs().max()) for name, p in trainer.parameters.items()}

    whole, tenth = moved(1.0), moved(0.1)
    for name in whole:
        share = 0.1 if name.startswith("sam2.") else 1.0
        assert tenth[name] == pytest.approx(share * whole[name], rel=1e-2, abs=1e-7), name


def test_muon_takes_orthogonal_steps_with_the_fusion_matrices_and_those_of_adamw_elsewhere(sam2, tmp_path):
    def moved(optimizer: str) -> dict[str, torch.Tensor]:
        trainer = new_trainer(origin(sam2, optimizer=optimizer, lr=0.01, warmup_steps=0), tmp_path / optimizer)
        before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        trainer._step([collate([samples().train[i] for i in range(3)])], 3)
        return {name: p.detach() - before[name] for name, p in trainer.parameters.items()}

    adamw, muon = moved("adamw"), moved("muon")
    matrices = {n for n, p in adamw.items() if n.startswith("fusion.") and n.endswith("weight") and p.ndim == 2}
    assert len(matrices) > 8
    for name, update in muon.items():
        if name in matrices:
            unit = 0.01 * 0.2 * max(update.shape) ** 0.5  # of a step's singular values; Muon's are 0.7 to 1.2 of it
            first, *_ = torch.linalg.svdvals(update) / unit
            assert 0.6 < first < 1.3, name
        else:
            assert torch.equal(update, adamw[name]), name


@pytest.mark.parametrize("prompt_encoder", [True, False])
@pytest.mark.parametrize("mask_decoder", [True, False])
def test_only_the_chosen_parts_move(sam2, tmp_path, prompt_encoder, mask_decoder):
    start = origin(sam2, epochs=1, train_prompt_encoder=prompt_encoder, train_mask_decoder=mask_decoder)
    trainer = new_trainer(start, tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.run(live(tmp_path / "live"))
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("fusion.") for name in moved)
    assert any(name.startswith("sam2.sam_prompt_encoder.") for name in moved) == prompt_encoder
    assert any(name.startswith("sam2.sam_mask_decoder.") for name in moved) == mask_decoder
    rest = {name for name in moved if not name.startswith(("fusion.", "sam2.sam_prompt_", "sam2.sam_mask_decoder."))}
    assert not rest


def test_no_trained_parameter_is_without_a_gradient(sam2, tmp_path):
    trainer = new_trainer(origin(sam2, epochs=1), tmp_path)
    trainer.run(live(tmp_path / "live"))
    assert [name for name, parameter in trainer.parameters.items() if parameter not in trainer.optimizer.state] == []


def test_a_loss_that_is_not_finite_names_its_rows_and_stops(sam2, tmp_path):
    trainer = new_trainer(origin(sam2), tmp_path, samples(BrokenItems(10, seed=1)))
    with pytest.raises(SamloveError, match="the loss is not finite for 1 of . rows: row4;"):
        trainer.run(live(tmp_path / "live"))
    assert all(parameter.isfinite().all() for parameter in trainer.parameters.values())


def test_a_validation_mask_that_is_not_finite_names_its_row(sam2, tmp_path):
    trainer = new_trainer(origin(sam2), tmp_path, samples(val=BrokenItems(6, seed=1)))
    with pytest.raises(SamloveError, match="the validation mask is not finite for 1 of 3 rows: row4;"):
        trainer.validate()


def test_bfloat16_trains_in_full_precision_weights(sam2, tmp_path):
    trainer = new_trainer(origin(sam2, epochs=1, precision="bfloat16"), tmp_path)
    trainer.run(live(tmp_path / "live"))
    assert all(parameter.dtype == torch.float32 for parameter in trainer.parameters.values())
    assert trainer.progress.history[0]["train/loss"] > 0


def test_reading_by_workers_changes_nothing(sam2, tmp_path):
    losses = []
    for workers in (0, 1):
        trainer = new_trainer(origin(sam2, epochs=1, workers=workers), tmp_path / str(workers))
        trainer.run(live(tmp_path / "live"))
        losses.append(trainer.progress.history)
    assert losses[0] == losses[1]


def test_samples_are_read_by_as_many_threads_as_there_are_cores(sam2, tmp_path):
    trainer = new_trainer(origin(sam2, workers=None), tmp_path)
    assert trainer.workers == min(CPU_COUNT, 8)
    trainer.samples = replace(trainer.samples, on_gpu=True)
    assert trainer.workers == 0


class WithoutTarget(Items):
    """Samples of which only `targets` have an object on the first frame."""

    def __init__(self, count: int, seed: int, targets: tuple[int, ...] = ()) -> None:
        super().__init__(count, seed)
        self.targets = targets

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        return item if index in self.targets else {**item, "mask": torch.zeros_like(item["mask"])}


def test_without_a_target_in_val_the_last_epoch_is_kept(sam2, tmp_path, capsys):
    """Also in a run that was interrupted in its second epoch."""
    checkpoint, val = tmp_path / "best.safetensors", WithoutTarget(4, seed=2)
    for items in (KillingItems(10, seed=1, reads=18), Items(10, seed=1)):
        data = Samples(items, val, collate, samples().order)
        with nullcontext() if type(items) is Items else pytest.raises(KeyboardInterrupt):
            train(origin(sam2, epochs=3), data, CPU, checkpoint, tmp_path / "live", tmp_path / "scratch")
    header = read_header(checkpoint)
    assert header.epoch == 3 and set(header.validation) == {"J"}
    assert capsys.readouterr().out.count("F and J&F are undefined") == 1
    metrics = (tmp_path / "live" / "metrics.json").read_text()
    assert "NaN" not in metrics and set(json.loads(metrics)["val"]) == {"J"}


def test_the_score_is_that_of_the_expressions_with_a_target(sam2, tmp_path):
    scores = []
    for targets in ((0, 1), (0, 1, 2, 3)):
        trainer = new_trainer(origin(sam2), tmp_path, samples(val=WithoutTarget(4, 2, targets)))
        scores.append(trainer.validate())
    two = new_trainer(origin(sam2), tmp_path, samples(val=Items(2, seed=2))).validate()
    assert scores[0]["F"] == pytest.approx(two["F"]) and scores[0]["F"] != pytest.approx(scores[1]["F"])
    assert scores[0]["J&F"] == (scores[0]["J"] + scores[0]["F"]) / 2


def test_an_interrupted_run_whose_best_checkpoint_is_gone_is_refused(sam2, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        new_trainer(origin(sam2), tmp_path, samples(KillingItems(10, 1, 18))).run(live(tmp_path / "live"))
    (best,) = tmp_path.glob("*/best.safetensors")
    best.unlink()
    with pytest.raises(SamloveError, match="best.safetensors: no such file, although .* completed 1 epochs"):
        new_trainer(origin(sam2), tmp_path)


def test_a_split_without_samples_is_refused(sam2, tmp_path):
    with pytest.raises(RequestError, match="the val shard set has no samples"):
        train(origin(sam2), samples(val=Items(0, seed=1)), CPU, tmp_path / "best", tmp_path / "live", tmp_path)


@pytest.fixture
def workplace(sam2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration and shards of two videos, in which the stage can run."""
    start = origin(sam2, epochs=1)
    sections = {
        "fusion": start.fusion.model_dump(),
        "train": start.train.model_dump(),
        "sam2": {"config": start.sam2.config, "checkpoint": "sam2.safetensors"},
    }
    (tmp_path / "configs" / "tiny").mkdir(parents=True)
    (tmp_path / "configs" / "profile.yaml").write_text("profile: tiny")
    for name, values in sections.items():
        (tmp_path / "configs" / "tiny" / f"{name}.yaml").write_text(yaml.safe_dump(values))
    sam2_features = {"weights_sha256": start.sam2_sha256, "cache_point": "post_conv"}
    fingerprint = {"audio": {}, "visual": {}, "text": {}, "sam2": sam2_features}
    for split in ("train", "val"):
        with ShardWriter(tmp_path / "data" / "tiny" / "shards" / split, fingerprint=fingerprint) as writer:
            for video in range(2):
                first, second = (Items(4, seed=3)[2 * video + i] for i in range(2))
                shared = ("audio", "audio_valid", "visual", "sam2_image_embed", "sam2_high_res_0", "sam2_high_res_1")
                sample = {name: first[name].numpy() for name in shared}
                sample |= {name: sample[name][None] for name in shared[3:]}  # one frame
                for name in ("text", "text_mask"):
                    sample[name] = np.stack([first[name], second[name]])
                sample["masks"] = np.stack([first["mask"], second["mask"]])[:, None].astype(np.uint8)
                rows = [{"row_id": f"{video}_{i}", "text": i, "mask": i} for i in range(2)]
                writer.write(f"video{video}", {**sample, "rows": rows})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_stage_trains_from_shards(workplace):
    stage.main()
    header = read_header("data/tiny/model/best.safetensors")
    assert header.dims == DIMS and header.epoch == 1
    assert header.features["sam2"]["cache_point"] == "post_conv"
    assert load_model("data/tiny/model/best.safetensors").fusion.config.dim == 16
    assert json.loads(Path("data/tiny/dvclive/metrics.json").read_text())["train"]["loss"] > 0
    assert not any(Path("data/tiny/.scratch/train").iterdir())


def test_the_stage_needs_neither_shared_memory_nor_many_open_files(workplace):
    """Threads read the samples: in a container with a tiny /dev/shm, and with few open files, training runs."""
    settings = workplace / "configs" / "tiny" / "train.yaml"
    settings.write_text(yaml.safe_dump({**yaml.safe_load(settings.read_text()), "workers": 3}))
    limits = "mount -t tmpfs -o size=16k tmpfs /dev/shm && ulimit -n 128"
    inside = ["unshare", "-m", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*inside, limits], capture_output=True).returncode:
        pytest.skip("needs permission to mount a small /dev/shm")
    done = subprocess.run(
        [*inside, f"{limits} && exec {sys.executable} -m pipelines.train"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert read_header("data/tiny/model/best.safetensors").epoch == 1


def start_stage(workplace: Path, **settings: object) -> subprocess.Popen:
    """The stage with two processes, and with these settings in train.yaml."""
    path = workplace / "configs" / "tiny" / "train.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "processes": 2, **settings}))
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.train"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_stage_starts_several_processes(workplace):
    with start_stage(workplace) as run:
        said, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors
    assert said.count("shards are ") == said.count("epoch 1:") == 1
    assert "Traceback" not in errors and not any((workplace / "data" / "tiny" / ".scratch" / "train").iterdir())
    several, header = read_tensors(workplace / "data" / "tiny" / "model" / "best.safetensors")
    stage.run(load(TrainConfig), ALONE)
    one, expected = read_tensors(workplace / "data" / "tiny" / "model" / "best.safetensors")
    assert header["validation"] == pytest.approx(expected["validation"])
    for name, value in one.items():
        assert torch.isclose(several[name], value, atol=1e-5).float().mean() > 0.95, name


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_stage_stops_its_processes_and_it_resumes(workplace, number):
    """The state is saved: the run continues in its last epochs, and ends with the bits of an uninterrupted one."""
    checkpoint, scratch = (workplace / "data" / "tiny" / name for name in ("model/best.safetensors", ".scratch/train"))
    with start_stage(workplace, epochs=200) as run:
        run.communicate(timeout=240)
    expected = checkpoint.read_bytes()
    with start_stage(workplace) as run:
        assert run.stdout is not None and any(line.startswith("epoch 50:") for line in run.stdout)
        run.send_signal(number)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 1
    assert [line for line in errors.splitlines() if "stopped" in line] == [STOPPED] and "Traceback" not in errors
    (state,) = scratch.glob("*/state.safetensors")
    assert read_tensors(state)[1]["epoch"] >= 50
    with start_stage(workplace) as run:
        said, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors
    assert "epoch 50:" not in said and "epoch 200:" in said
    assert checkpoint.read_bytes() == expected


@pytest.mark.slow
def test_a_failure_of_one_process_is_one_line_of_the_stage(workplace):
    """A process that is killed; then another folder in place of the checkpoint's, so that the first one fails."""
    with start_stage(workplace, epochs=2000) as run:
        assert run.stdout is not None and any(line.startswith("epoch 50:") for line in run.stdout)
        ranks = [child for child in psutil.Process(run.pid).children() if "pipelines.train" in child.cmdline()]
        assert len(ranks) == 2
        ranks[1].kill()
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 1 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: process 1 of 2 was killed by SIGKILL, often because memory ran")
    (workplace / "data" / "tiny" / "model" / "best.safetensors.partial").mkdir(parents=True)
    with start_stage(workplace, epochs=1) as run:
        _, errors = run.communicate(timeout=240)
    lines = [line for line in errors.splitlines() if "best.safetensors.partial" in line]
    assert run.returncode == 1 and "Traceback" not in errors
    assert lines == ["error: data/tiny/model/best.safetensors.partial: Is a directory"]


def test_embeddings_of_a_different_sam2_are_refused(workplace, capsys):
    write_sam2(workplace / "sam2.safetensors", seed=5)
    with pytest.raises(SystemExit) as end:
        stage.main()
    assert end.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: data/tiny/shards/train: its SAM 2 embeddings") and "weights_sha256: expected" in line
