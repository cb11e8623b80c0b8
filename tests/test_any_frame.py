"""Training on any of several frames of a video, from shards to weights."""

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from samlove.config import TrainConfig
from samlove.errors import RequestError, SamloveError
from samlove.model.checkpoint import read_tensors
from samlove.train import Samples, Trainer, prepare
from stores import ShardWriter
from tests.tiny_training import Items, origin, write_sam2

CPU, K, VIDEOS, EXPRESSIONS = torch.device("cpu"), 3, 3, 2
SHARED = ("audio", "audio_valid", "visual")
LEVELS = ("sam2_image_embed", "sam2_high_res_0", "sam2_high_res_1")


def write_shards(root: Path, sam2: Path, frames: int) -> Path:
    """Two expressions of each of three videos. Frame k shows the objects 8 k pixels further to the right; on frame 2,
    the first object of each video is out of sight."""
    features = {"weights_sha256": origin(sam2).sam2_sha256, "cache_point": "post_conv"}
    for split, seed in (("train", 3), ("val", 4)):
        items = Items(VIDEOS * EXPRESSIONS, seed)
        with ShardWriter(root / split, fingerprint={"audio": {}, "visual": {}, "text": {}, "sam2": features}) as writer:
            for video in range(VIDEOS):
                both = [items[EXPRESSIONS * video + i] for i in range(EXPRESSIONS)]
                sample = {name: both[0][name].numpy() for name in SHARED}
                for level in LEVELS:
                    sample[level] = np.stack([(both[0][level] + k).numpy() for k in range(frames)])
                for name in ("text", "text_mask"):
                    sample[name] = np.stack([item[name] for item in both])
                masks = np.stack([[np.roll(item["mask"], 8 * k, axis=1) for k in range(frames)] for item in both])
                masks[0, 2:] = 0
                sample["masks"] = masks.astype(np.uint8)
                sample["rows"] = [{"row_id": f"{video}_{i}", "text": i, "mask": i} for i in range(EXPRESSIONS)]
                writer.write(f"video{video}", sample)
    return root


class Run:
    """The trainer of the shards with `frames` frames."""

    def __init__(self, folder: Path, frames: int, **settings: Any) -> None:
        self.sam2, self.frames, self.settings = folder / "sam2.safetensors", frames, settings
        if not self.sam2.exists():
            write_sam2(self.sam2)
        self.shards = folder / f"shards{frames}"
        if not self.shards.exists():
            write_shards(self.shards, self.sam2, frames)

    def trainer(self, scratch: Path, change: Any = None) -> Trainer:
        start = origin(self.sam2, batch_size=2, accumulate=1, **self.settings)
        sam2 = start.sam2.model_copy(update={"train_frames": self.frames})
        made, samples = prepare(self.shards, start.fusion, start.train, sam2, CPU, str)
        torch.manual_seed(made.train.seed)
        return Trainer(made.build(), made, change(samples) if change else samples, CPU, scratch)


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.parameters.items()}


def test_the_first_of_several_frames_trains_as_one_frame_does(tmp_path):
    """The same samples in the same order, the same validation, and the same bits in the end."""
    ends = []
    for frames in (1, K):
        trainer = Run(tmp_path, frames).trainer(tmp_path / str(frames))
        trainer.run(None)
        ends.append((parameters(trainer), trainer.progress.history, trainer.total_steps))
    assert ends[0][1:] == ends[1][1:] and ends[0][2] == 2 * 3
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())


def test_any_frame_is_trained_and_every_frame_validated(tmp_path):
    first, any_ = (Run(tmp_path, K, supervise=what).trainer(tmp_path / what) for what in ("first", "any"))
    assert (len(first.samples.val), len(any_.samples.val)) == (VIDEOS * EXPRESSIONS, VIDEOS * EXPRESSIONS * K)
    assert any_.total_steps == first.total_steps and any_.fingerprint != first.fingerprint
    orders = [any_.samples.order(epoch) for epoch in range(20)]
    assert all(np.array_equal(np.sort(order // K), np.arange(VIDEOS * EXPRESSIONS)) for order in orders)
    assert {int(item) for order in orders for item in order} == set(range(len(any_.samples.train)))
    targets = [bool(np.any(any_.samples.val[i]["mask"])) for i in range(len(any_.samples.val))]
    assert targets == [True, True, False, True, True, True] * VIDEOS
    scores = any_.validate()
    assert {"J", "F", "J&F"} == set(scores) and scores != first.validate()
    any_.run(None)
    first.run(None)
    assert any((value != parameters(first)[name]).any() for name, value in parameters(any_).items())


@pytest.mark.parametrize("reads", [3, 8])
def test_an_interrupted_run_on_any_frame_ends_where_an_uninterrupted_one_does(tmp_path, reads):
    run = Run(tmp_path, K, supervise="any")
    whole = run.trainer(tmp_path / "whole")
    whole.run(None)

    class Killing:
        def __init__(self, items: Any) -> None:
            self.items, self.read = items, itertools.count(1)

        def __len__(self) -> int:
            return len(self.items)

        def __getitem__(self, i: int) -> Any:
            if next(self.read) == reads:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.items[i]

    def killing(samples: Samples) -> Samples:
        return Samples(Killing(samples.train), samples.val, samples.collate, samples.order)

    with pytest.raises(KeyboardInterrupt):
        run.trainer(tmp_path / "parts", killing).run(None)
    rest = run.trainer(tmp_path / "parts")
    assert rest.progress != whole.progress
    rest.run(None)
    assert rest.progress == whole.progress
    for name in ("state.safetensors", "best.safetensors"):
        found, expected = (read_tensors(trainer.folder / name)[0] for trainer in (rest, whole))
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_any_frame_needs_several_and_those_that_the_shards_hold(tmp_path):
    with pytest.raises(RequestError, match="supervise: any needs more than one frame .*train_frames: 1 in sam2.yaml"):
        Run(tmp_path, 1, supervise="any").trainer(tmp_path / "scratch")
    run = Run(tmp_path, K)
    run.frames = 2
    with pytest.raises(SamloveError, match=r"shards3/train.*train_frames: expected 2, found 3.*dvc repro pack"):
        run.trainer(tmp_path / "scratch")
    with pytest.raises(ValueError, match="supervise"):
        TrainConfig(epochs=1, supervise="all")
