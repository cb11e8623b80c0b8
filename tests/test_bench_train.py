"""The training benchmark on little data: what it prints, and that all its ways compute the trainer's own step."""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from samlove.bench.media import SIZES, sam2_encoder, vggish_encoder, vit_encoder, write_clips
from samlove.bench.online import CACHED, DECODED, EXPRESSIONS, Encoders, OnlineItems, OnlineTrainer, online_samples
from samlove.bench.steps import (
    ARRAYS,
    WayTrainer,
    _LossesOfArrays,
    checkpoint_blocks,
    compile_parts,
    static,
    step_operations,
)
from samlove.bench.train import _on_device, _samples, _trainer, _write_shards, run
from samlove.data.dataset import RefAvsFolder
from samlove.data.loader import ExpressionDataset
from samlove.errors import RequestError
from samlove.features.encoders.frames import frame_sources
from samlove.train import Batch, Trainer
from tests import tiny_training as tiny
from tests.stage_code import ROOT

CPU = torch.device("cpu")
Gradients = dict[str, torch.Tensor]


@pytest.mark.slow
def test_it_ends_with_one_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = run("micro", videos=4, steps=1, rounds=1)
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == result
    rates = result["expressions_per_s"]
    assert {"off", "ram", "reused"} <= set(rates)
    assert all(rate > 0 for rate in rates.values())
    assert set(result["over_reused"]) == set(result["waiting"]) == set(rates) - {"reused"}
    assert result["floor"]["tflop_a_batch"] > 0
    assert set(result["online"]["ms_a_video"]) == {"decode", "audio", "visual", "sam2"}
    assert set(result["online"]["cases"]) == {"fusion changed", "decoder changed"}
    for case in result["online"]["cases"].values():
        assert set(case["expressions_per_s"]) == {"cached", *case["ratio"]} == {"cached", "online", "online_shared"}
    if not torch.cuda.is_available():
        assert result["ways"] is None
        assert "not measured without a GPU" in printed
    assert not list(tmp_path.glob("samlove-*"))


def test_an_unknown_profile_is_an_invalid_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(RequestError, match="expected one of micro, refavs"):
        run("huge")


# --- online ----------------------------------------------------------------------------------------------------------


class Media(NamedTuple):
    """Four videos of the micro profile, shards for them, and encoders."""

    root: Path
    dataset: ExpressionDataset
    folder: RefAvsFolder
    names: list[str]
    encoders: Encoders

    def online(self, shared: bool) -> tuple[OnlineItems, OnlineTrainer]:
        items = OnlineItems(self.dataset, self.folder, self.names, self.encoders, shared)
        trainer = _trainer(OnlineTrainer, "micro", online_samples(items), self.dataset, CPU, self.root)
        trainer.encoders = self.encoders
        return items, trainer


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Media]:
    root = tmp_path_factory.mktemp("online")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        _write_shards(root / "shards", "micro", 4)
        folder = RefAvsFolder(root / "clips")
        names = write_clips(folder, 4, SIZES["micro"], audio=True)
        encoders = Encoders(vggish_encoder("micro", root), vit_encoder("micro", root), sam2_encoder("micro", root))
        yield Media(root, ExpressionDataset(root / "shards"), folder, names, encoders)


def stored(encoders: Encoders, folder: RefAvsFolder, media_ids: list[str]) -> Batch:
    """The arrays of videos as the feature stages store and the loader stacks them: one row per video."""
    paths = frame_sources(folder, media_ids, 10)
    rows = []
    for media_id in media_ids:
        sources = {"audio": folder.audio_path(media_id), "visual": paths[media_id], "sam2": paths[media_id][:1]}
        row = {}
        for name, source in sources.items():
            encoder = getattr(encoders, name)
            (arrays,) = encoder.encode([encoder.load(source)])
            row |= {array: value[0] if name == "sam2" else value for array, value in arrays.items()}
        rows.append(row)
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in CACHED}


def gradients(trainer: Trainer, batch: Batch) -> tuple[torch.Tensor, Gradients]:
    losses = trainer._losses(trainer._on_device(batch)).total
    losses.sum().backward()
    found = {name: p.grad.clone() for name, p in trainer.parameters.items() if p.grad is not None}
    trainer.optimizer.zero_grad()
    return losses.detach(), found


def assert_same_step(
    found: tuple[torch.Tensor, Gradients], expected: tuple[torch.Tensor, Gradients], tolerance: float
) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, wanted in expected[1].items():
        assert (found[1][name] - wanted).norm() <= tolerance * wanted.norm() + 1e-7, name


@pytest.mark.parametrize("shared", [False, True])
def test_an_online_step_is_the_cached_step(media: Media, shared: bool) -> None:
    """The features of the micro profile, decoded and encoded in the step, against those that its stages store."""
    items, online = media.online(shared)
    cached = _trainer(Trainer, "micro", _samples(media.dataset, "micro"), media.dataset, CPU, media.root)
    cached.model.load_state_dict(online.model.state_dict())
    features = stored(media.encoders, media.folder, media.names)
    order, size = items.order(0)[:16], online.config.batch_size
    online_batches, cached_batches = online._batches(items, order), cached._batches(media.dataset, order)
    for start, given, batch in zip(range(0, 16, size), online_batches, cached_batches, strict=True):
        places = order[start : start + size] // EXPRESSIONS
        batch |= {name: array[places] for name, array in features.items()}
        encoded = online.encoded(given)
        assert set(encoded) == set(batch)
        assert encoded["row_id"] == batch["row_id"]
        for name in CACHED:
            torch.testing.assert_close(encoded[name], batch[name], rtol=2e-3, atol=2e-3)
        assert_same_step(gradients(online, given), gradients(cached, batch), 1e-2)


@pytest.mark.parametrize(("shared", "videos"), [(True, 4), (False, 20)])
def test_only_a_shared_video_is_decoded_and_encoded_once(media: Media, shared: bool, videos: int) -> None:
    items, trainer = media.online(shared)
    decoded: list[str] = []
    encoded: list[int] = []

    class Counted(Encoders):
        def decode(self, folder: RefAvsFolder, media_id: str) -> dict[str, Any]:
            decoded.append(media_id)
            return {name: torch.zeros(1) for name in DECODED}

        def encode(self, given: dict[str, torch.Tensor], precision: str) -> dict[str, torch.Tensor]:
            encoded.append(len(given["frames"]))
            return dict.fromkeys(CACHED, given["frames"])

    items.encoders = trainer.encoders = Counted(*media.encoders)
    for batch in trainer._batches(items, items.order(1)):
        trainer.encoded(batch)
    assert len(decoded) == sum(encoded) == videos


# --- ways ------------------------------------------------------------------------------------------------------------


def way_trainer(tmp_path: Path, blocks: int = 3) -> tuple[WayTrainer, Batch]:
    start = tiny.origin(tiny.write_sam2(tmp_path / "sam2.safetensors"), {"blocks": blocks})
    torch.manual_seed(0)
    trainer = WayTrainer(start.build(), start, tiny.samples(), CPU, tmp_path)
    (batch,) = trainer._batches(trainer.samples.train, [0, 1, 2])
    return trainer, batch


def test_recomputed_activations_do_not_change_a_step(tmp_path: Path) -> None:
    trainer, batch = way_trainer(tmp_path)
    expected = gradients(trainer, batch)
    calls = []
    trainer.model.fusion.blocks[1].mlp[1].register_forward_hook(lambda *_: calls.append(1))
    checkpoint_blocks(trainer)
    found = gradients(trainer, batch)
    assert_same_step(found, expected, 1e-6)
    assert len(calls) == 2 * tiny.DIMS["frames"]  # forward, and again for the gradient
    with pytest.raises(ValueError, match="one block"):
        checkpoint_blocks(way_trainer(tmp_path, blocks=1)[0])


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_module_that_a_graph_records_gives_the_trainers_losses(tmp_path: Path, blocks: int) -> None:
    trainer, batch = way_trainer(tmp_path, blocks)
    expected = gradients(trainer, batch)
    trainer.replaced = _LossesOfArrays(trainer)
    assert_same_step(gradients(trainer, batch), expected, 0)


def test_parts_are_compiled_whole_and_once_for_all_blocks(tmp_path: Path) -> None:
    """With a compiler that changes nothing, because torch's own takes minutes; see the next test."""
    graphs = []

    def compiler(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    trainer, batch = way_trainer(tmp_path, blocks=6)
    expected = gradients(trainer, batch)
    compile_parts(trainer, backend=compiler)
    assert_same_step(gradients(trainer, batch), expected, 1e-5)
    assert 3 <= len(graphs) <= 8  # more, and torch would give up compiling


@pytest.mark.slow
def test_compiled_parts_do_not_change_a_step(tmp_path: Path) -> None:
    trainer, batch = way_trainer(tmp_path)
    expected = gradients(trainer, batch)
    compile_parts(trainer)
    assert_same_step(gradients(trainer, batch), expected, 1e-4)


def test_static_batches_keep_the_full_length_of_texts(tmp_path: Path) -> None:
    trainer, _ = way_trainer(tmp_path)
    batch = _on_device(trainer)
    assert trainer._on_device(batch)["text"].shape[1] < tiny.TOKENS
    assert trainer._on_device(static(batch))["text"].shape[1] == tiny.TOKENS


def test_operations_are_counted_on_the_model_itself(tmp_path: Path) -> None:
    """A frozen layer needs no gradient of its weights, and the next layer none of its inputs: 2 operations a weight."""
    trainer, batch = way_trainer(tmp_path)
    given = trainer._on_device(batch)
    whole = step_operations(trainer, given)
    hidden, _, last = trainer.model.fusion.project_text
    rows = given["text"].shape[0] * given["text"].shape[1]
    hidden.requires_grad_(False)
    assert whole - step_operations(trainer, given) == 2 * rows * (hidden.weight.numel() + last.weight.numel())
    twice = {name: torch.cat([given[name], given[name]]) for name in ARRAYS}
    hidden.requires_grad_(True)
    assert 1.9 * whole < step_operations(trainer, twice) <= 2 * whole
