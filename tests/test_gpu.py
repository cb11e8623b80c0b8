"""Results on a GPU against results on the CPU: python -m pytest -m gpu."""

import warnings
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dvclive import Live

from pipelines import audio, sam2, text, visual
from samlove.bench import train as bench_train
from samlove.bench.steps import WAYS, WayTrainer, static
from samlove.config import AudioConfig, Sam2Config, TextConfig, VisualConfig, load
from samlove.data.dataset import RefAvsFolder
from samlove.data.loader import ExpressionDataset, collate, make_resident
from samlove.features.encoders.frames import frame_sources
from samlove.features.encoders.sam2_image import Sam2ImageEncoder
from samlove.features.encoders.text import TextEncoder
from samlove.features.encoders.timm_image import TimmEncoder
from samlove.features.encoders.vggish import VggishEncoder
from samlove.features.extract import Job, extract
from samlove.features.golden import TOLERANCE, check_live, distance
from samlove.micro.clips import draw_clip
from samlove.model.checkpoint import Origin, read_tensors
from samlove.model.sam2 import LightSam2
from samlove.scoring.metrics import JACCARD_BIN
from samlove.train import Samples, Trainer
from stores import FeatureStore
from tests import small_encoders as small
from tests import tiny_training as tiny
from tests.stage_code import ROOT
from tests.test_infer import Run
from tests.test_train import KillingItems
from tests.tiny_pack import make_shards

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The micro profile's weights have paths relative to the repository's root."""
    monkeypatch.chdir(ROOT)


# --- features --------------------------------------------------------------------------------------------------------


def encoder_and_sources(name: str, device: torch.device, folder: RefAvsFolder) -> tuple[Any, list[Any]]:
    """The micro profile's encoder `name`."""
    media = ["a", "bb", "ccc"]
    frames = list(frame_sources(folder, media, 3).values())
    make: dict[str, Callable[[], tuple[Any, list[Any]]]] = {
        "audio": lambda: (VggishEncoder(load(AudioConfig), 3, device), [folder.audio_path(m) for m in media]),
        "visual": lambda: (TimmEncoder(load(VisualConfig), device), frames),
        "text": lambda: (TextEncoder(load(TextConfig), device), ["the red star on the left", "it"]),
        "sam2": lambda: (Sam2ImageEncoder(load(Sam2Config), device), frames),
    }
    return make[name]()


@pytest.mark.parametrize("name", ["audio", "visual", "text", "sam2"])
def test_an_encoder_is_repeatable_and_within_the_tolerance_of_the_cpu(name: str, tmp_path: Path, in_root: None) -> None:
    folder = RefAvsFolder(tmp_path)
    for media_id in ("a", "bb", "ccc"):
        small.write_clip(folder, media_id, frames=3, seconds=3)
    found = []
    for device in (CPU, GPU, GPU):
        encoder, sources = encoder_and_sources(name, device, folder)
        found.append(encoder.encode([encoder.load(source) for source in sources]))
    for on_cpu, once, again in zip(*found, strict=True):
        for key, array in on_cpu.items():
            np.testing.assert_array_equal(once[key], again[key], err_msg=key)
            assert distance(array, once[key]) <= TOLERANCE, key


def jobs() -> Iterator[Job]:
    yield from (audio.job(), visual.job(), text.job(), sam2.job("train"), sam2.job("eval"))


def on(device: torch.device, job: Job) -> Job:
    encoder = copy(job.encoder)
    encoder.__dict__.pop("network", None)
    encoder.device = device  # type: ignore[attr-defined]
    return replace(job, encoder=encoder)


def test_stores_of_the_gpu_are_repeatable_bit_for_bit_and_verified_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small.make_project(tmp_path)
    for job in jobs():
        assert job.encoder.device == GPU  # type: ignore[attr-defined]
        again = replace(job, out=Path("again") / job.out.name, scratch=Path("again/scratch") / job.out.name)
        extract(job)
        extract(again)
        store, other = FeatureStore.open(job.out), FeatureStore.open(again.out)
        assert list(store.keys()) == list(job.sources)
        for key in store.keys():
            for name, array in store.read(key).items():
                np.testing.assert_array_equal(array, other.read(key)[name], err_msg=f"{key} {name}")
        assert store.manifest["fingerprint"] == on(CPU, job).encoder.fingerprint()
        assert [str(row) for row in check_live(on(CPU, job), store) if not row.good] == []


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return tiny.write_sam2(tmp_path / "sam2.safetensors")


def new_trainer(start: Origin, scratch: Path, data: Samples | None = None, device: torch.device = GPU) -> Trainer:
    torch.manual_seed(start.train.seed)
    return Trainer(start.build(), start, data or tiny.samples(), device, scratch)


def trained(trainer: Trainer, folder: Path) -> list[dict[str, float]]:
    """The row of each epoch."""
    trainer.run(Live(str(folder), save_dvc_exp=False, dvcyaml=None))
    return trainer.progress.history


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float) -> None:
    """Losses within a relative tolerance; for the scores, a pixel near the threshold may change sides."""
    for row, wanted in zip(found, expected, strict=True):
        for name, value in wanted.items():
            assert row[name] == (pytest.approx(value, abs=2) if "val/" in name else pytest.approx(value, rel=tolerance))


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-2), ("bfloat16", 0.05)])
def test_losses_match_the_cpus(weights: Path, tmp_path: Path, precision: str, tolerance: float) -> None:
    expected = trained(new_trainer(tiny.origin(weights), tmp_path / "cpu", device=CPU), tmp_path / "live")
    start = tiny.origin(weights, precision=precision, clip_norm=1e6)  # computed, but never reached
    found = trained(new_trainer(start, tmp_path / "gpu"), tmp_path / "live")
    for row, wanted in zip(found, expected, strict=True):
        losses = {name: value for name, value in wanted.items() if name.startswith("train/")}
        assert {name: row[name] for name in losses} == pytest.approx(losses, rel=tolerance)


def test_an_interrupted_run_resumes_from_its_exact_state(weights: Path, tmp_path: Path) -> None:
    """Ends equal except for rounding: on a GPU, the gradient of the masks' upsampling is summed in no fixed order."""
    start = tiny.origin(weights, clip_norm=1.0)
    whole = trained(new_trainer(start, tmp_path / "whole"), tmp_path / "live")
    with pytest.raises(KeyboardInterrupt):
        trained(new_trainer(start, tmp_path / "parts", tiny.samples(KillingItems(10, 1, 16))), tmp_path / "live")
    rest = new_trainer(start, tmp_path / "parts")
    assert rest.progress.epoch == 1 and rest.progress.consumed > 0
    kept, _ = read_tensors(rest.state_file)
    for name, parameter in rest.parameters.items():
        assert parameter.device.type == "cuda"
        torch.testing.assert_close(parameter.detach().cpu(), kept[f"model/{name}"], rtol=0, atol=0)
        for kind, value in rest.optimizer.state[parameter].items():
            assert value.device.type == "cuda"
            torch.testing.assert_close(value.cpu(), kept[f"{kind}/{name}"], rtol=0, atol=0)
    assert_same(trained(rest, tmp_path / "live"), whole, 1e-3)


class OnGpu(tiny.Items):
    """Items on the GPU, as after `ExpressionDataset.to`."""

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        return {
            name: value.to(GPU) if isinstance(value, torch.Tensor) and name != "text_mask" else value
            for name, value in item.items()
        }


def test_workers_and_residency_do_not_change_a_run(weights: Path, tmp_path: Path) -> None:
    plain = trained(new_trainer(tiny.origin(weights), tmp_path / "plain"), tmp_path / "live")
    two = trained(new_trainer(tiny.origin(weights, workers=2), tmp_path / "two"), tmp_path / "live")
    held = replace(tiny.samples(OnGpu(10, seed=1), OnGpu(4, seed=2)), on_gpu=True)
    resident = trained(new_trainer(tiny.origin(weights), tmp_path / "held", held), tmp_path / "live")
    assert_same(two, plain, 1e-3)
    assert_same(resident, plain, 1e-3)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["read", "resident"])
def test_a_step_waits_for_the_gpu_once(weights: Path, tmp_path: Path, on_gpu: bool) -> None:
    """It waits for the losses, which it must check before the step; each further wait would leave the GPU idle."""
    items = OnGpu(12, seed=1) if on_gpu else tiny.Items(12, seed=1)
    start = tiny.origin(weights, clip_norm=1.0)
    trainer = new_trainer(start, tmp_path, replace(tiny.samples(items), on_gpu=on_gpu))
    batches = trainer._batches(items, range(12))
    pairs = [list(islice(batches, 2)) for _ in range(2)]
    trainer._step(pairs[0], 6)  # creates the optimiser's state and CUDA's lazily created state
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            trainer._step(pairs[1], 6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in found if "called a synchronizing" in str(w.message)]
    assert len(waits) == 1, waits


def test_residency_on_the_gpu_does_not_change_a_batch(tmp_path: Path) -> None:
    make_shards(tmp_path)
    read, held = (ExpressionDataset(tmp_path / "shards") for _ in range(2))
    assert make_resident([held], "auto", GPU) == "gpu"
    expected, found = (collate([each[i] for i in range(len(each))]) for each in (read, held))
    assert list(found) == list(expected)
    assert found["visual"].device.type == found["mask"].device.type == "cuda"
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name].cpu(), value, rtol=0, atol=0)
        else:
            assert found[name] == value


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_execute_a_step_gives_its_gradients(
    weights: Path, tmp_path: Path, way: str, blocks: int, precision: str
) -> None:
    """Of two batches together, which a graph must not overwrite, and of two further ones."""
    if way == "checkpointed" and blocks == 1:
        pytest.skip("a model of one block has nothing to compute again")
    start = tiny.origin(weights, {"blocks": blocks}, precision=precision)
    found = []
    for name in ("eager", way):
        torch.manual_seed(0)
        trainer = WayTrainer(start.build(), start, tiny.samples(tiny.Items(12, seed=1)), GPU, tmp_path)
        batches = [
            static(trainer._on_device(full(batch))) for batch in trainer._batches(trainer.samples.train, range(12))
        ]
        trainer.use(name, trainer._on_device(batches[0]))
        gradients = []
        for pair in (batches[:2], batches[2:]):
            losses = trainer._backward(pair, 6)
            gradients.append({key: p.grad.clone() for key, p in trainer.parameters.items() if p.grad is not None})
            trainer.optimizer.zero_grad()
            gradients[-1]["loss"] = torch.tensor(losses["loss"])
        found.append(gradients)
    tolerance = 0.05 if precision == "bfloat16" else 1e-2
    for expected, others in zip(*found, strict=True):
        assert others.keys() == expected.keys()
        for key, wanted in expected.items():
            assert (others[key] - wanted).norm() <= tolerance * wanted.norm() + 1e-5, key


def full(batch: dict) -> dict:
    """A batch whose texts the trainer does not shorten when it moves them."""
    return {**batch, "text_mask": torch.ones_like(batch["text_mask"])}


def test_the_benchmark_measures_every_way(in_root: None) -> None:
    ways = bench_train.run("micro", videos=4, steps=1, rounds=1)["ways"]
    errors = {way: found["error"] for way, found in ways.items() if "error" in found}
    assert list(ways) == list(WAYS) and list(errors) == ["checkpointed"], errors  # micro has one block
    assert all(found["peak_gb"] > 0 and found["share"] > 0 for way, found in ways.items() if way not in errors)


# --- inference -------------------------------------------------------------------------------------------------------


def test_predictions_of_every_variant_match_the_cpus(tmp_path: Path) -> None:
    runs = [Run(tmp_path / name) for name in ("on_cpu", "on_gpu")]
    runs[1].device = GPU
    counts = [run.infer() for run in runs]
    assert counts[0] == counts[1]
    for variant in counts[0]:
        expected, found = (run.bins(variant) for run in runs)
        assert list(found) == list(expected)
        sides = [(found[row] >= JACCARD_BIN) != (expected[row] >= JACCARD_BIN) for row in expected]
        assert np.mean(sides) < 0.01, variant


@pytest.mark.parametrize(("precision", "least"), [("float32", 0.99), ("bfloat16", 0.95)])
def test_tracked_objects_match_the_cpus(in_root: None, precision: str, least: float) -> None:
    """The micro profile's SAM 2, image encoder and memory, run entirely on each device; IoU over all masks together."""
    rng = np.random.default_rng(0)
    both = one = 0
    for clip in (draw_clip(rng) for _ in range(3)):
        frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)  # (T, 3, S, S)
        objects = torch.from_numpy(clip.masks[clip.masks[:, 0].any((1, 2))][:, 0])  # (K, S, S)
        masks = []
        for device, enabled in ((CPU, False), (GPU, precision == "bfloat16")):
            config = load(Sam2Config)
            arrays = Sam2ImageEncoder(config, device).encode([frames])[0]
            embeds = {name: torch.from_numpy(array) for name, array in arrays.items()}
            model = LightSam2.load(config.config, config.checkpoint).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
                masks.append(model.track(embeds, masks=objects).cpu() > 0)
        both += int((masks[0] & masks[1]).sum())
        one += int((masks[0] | masks[1]).sum())
    assert one > 0 and both / one >= least
