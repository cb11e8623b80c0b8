"""The inference benchmark on little data: what it prints, and that its loop and its floor compute the stage's masks."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from samlove.bench.infer import EVALUATED, EXPRESSIONS, PREDICTIONS, _infer, run, write_split
from samlove.bench.profile import section
from samlove.config import InferConfig
from samlove.errors import RequestError
from samlove.infer import _read_ahead, plan, predict
from samlove.model.checkpoint import load_model
from samlove.scoring.metrics import quantise
from stores import PredictionReader
from tests.stage_code import ROOT

CPU = torch.device("cpu")


def test_it_ends_with_one_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = run("micro", videos=2, rounds=1)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["expressions"] == 2 * EXPRESSIONS
    for measured in result["by_precision"].values():
        assert set(measured["seconds"]) == {"stage", "waiting", "computing", "writing", "rest"}
        assert set(measured["together"]) == {"1", "2"}  # there are no four videos
        assert measured["share"] == pytest.approx(measured["floor_s"] / measured["seconds"]["stage"], abs=2e-3)
        assert min(*measured["expressions_per_s"].values(), *measured["together"].values()) > 0
    assert not list(tmp_path.glob("samlove-*"))


def test_the_stage_and_the_computation_alone_give_the_same_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the expressions of two videos' size are one batch, as the benchmark counts them."""
    monkeypatch.chdir(ROOT)
    split, config = write_split(tmp_path, "micro", 2), section("micro", InferConfig, controls=[])
    _infer(split, config, CPU)
    reader = PredictionReader(tmp_path / "predictions" / "split" / "predictions.h5")
    assert reader.row_ids == split.rows["row_id"].tolist()
    model = load_model(split.checkpoint)
    for _, embeds, inputs in _read_ahead(plan(split.rows, []), split.sources, split.folder):
        given = inputs[PREDICTIONS]
        many = {name: torch.cat([array] * 2) for name, array in given.fusion.items()}
        alone = quantise(predict(model, embeds, given, split.mask_size, config).logits)
        twice = quantise(predict(model, embeds, given._replace(fusion=many), split.mask_size, config).logits)
        stored = np.stack([reader.read(row_id) for row_id in given.row_ids])
        assert stored.any()
        np.testing.assert_array_equal(np.asarray(alone), stored)
        for half in np.split(np.asarray(twice), 2):
            assert np.mean(half != stored) < 1e-2  # in another batch, the last bits differ


def test_it_counts_the_expressions_that_ref_avs_evaluates() -> None:
    assert EVALUATED == 1349 + 2288 + 1656 + 1028 == 6321


def test_an_unknown_profile_is_an_invalid_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(RequestError, match="expected one of micro, refavs"):
        run("huge")
