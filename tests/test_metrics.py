"""The metrics against results of the code of Ref-AVS Bench, and against a plain loop over its 255 thresholds."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samlove.bench.metrics import loop_f_score, loop_jaccard, loop_null_score
from samlove.errors import SamloveError
from samlove.scoring import metrics
from samlove.scoring.metrics import EDGES, f_score, jaccard, null_score, quantise, scores_from_bins

REFERENCE = Path(__file__).parents[1] / ".." / "shared" / "refavs" / "metric_reference.npz"
CASES = ["plain", "some_empty_frames", "all_empty_frames", "sharp", "flat", "predicts_nothing", "two_frames_odd_size"]


@pytest.mark.skipif(not REFERENCE.exists(), reason="needs the reference results of Ref-AVS Bench")
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_benchmarks_own_code(case):
    with np.load(REFERENCE) as reference:
        logits, target, expected = (reference[f"{case}/{name}"] for name in ("logits", "target", "J_F_S"))
    found = [jaccard(logits, target), f_score(logits, target), null_score(logits)]
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0, equal_nan=True)
    np.testing.assert_allclose(scores_from_bins(quantise(logits), target), expected, atol=1e-6, rtol=0, equal_nan=True)


@st.composite
def masks(draw):
    """Logits and targets of many sizes and kinds: soft, sharp, exactly on the edges, with empty frames."""
    frames, height, width = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (frames, height, width)
    scale = draw(st.sampled_from([0.01, 1.0, 5.0, 1000.0]))
    logits = generator.normal(size=shape).astype(np.float32) * scale
    if draw(st.booleans()):  # sigmoids exactly on an edge or next to it
        edge = generator.choice(EDGES[:-1], size=shape).astype(np.float64)
        logits = np.log(edge / (1 - edge)).astype(np.float32)
    target = generator.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    target[generator.random(frames) < 0.3] = False
    return torch.from_numpy(logits), torch.from_numpy(target)


@given(masks())
@settings(max_examples=80, deadline=None)
def test_agrees_with_a_plain_loop(case):
    logits, target = case
    assert jaccard(logits, target) == pytest.approx(loop_jaccard(logits, target), abs=1e-6)
    assert f_score(logits, target) == pytest.approx(loop_f_score(logits, target), abs=1e-6, nan_ok=True)
    assert null_score(logits) == pytest.approx(loop_null_score(logits), abs=1e-6)


@given(masks())
@settings(max_examples=50, deadline=None)
def test_bins_count_the_edges_a_sigmoid_reaches(case):
    logits, _ = case
    bins = quantise(logits)
    assert bins.dtype == np.uint8 and bins.shape == logits.shape
    searched = torch.bucketize(logits.sigmoid(), torch.from_numpy(EDGES), right=True)
    np.testing.assert_array_equal(bins, searched.numpy())


@given(masks())
@settings(max_examples=50, deadline=None)
def test_scores_from_bins_equal_scores_from_logits(case):
    logits, target = case
    scores = scores_from_bins(quantise(logits), target)
    assert scores.J == jaccard(logits, target)
    assert scores.F == pytest.approx(f_score(logits, target), abs=0, nan_ok=True)
    on_the_threshold = (logits.sigmoid() == metrics.NULL_THRESHOLD).float().mean().item()
    assert abs(scores.S**2 - null_score(logits) ** 2) <= on_the_threshold + 1e-9


def test_edges_are_255_distinct_values_and_each_cell_has_at_most_one():
    assert EDGES.shape == (255,) and EDGES.dtype == np.float32
    assert (np.diff(EDGES) > 1 / 1024).all()
    assert EDGES[-1] == 1 and EDGES[metrics.NULL_BIN - 1] == 0.5


def test_the_threshold_of_j_is_exclusive():
    at = torch.full((1, 1, 1), math.log(0.4 / 0.6))
    probability = at.sigmoid().item()
    above = torch.full((1, 1, 1), math.log(0.4 / 0.6) + 1e-5)
    assert (quantise(at)[0, 0, 0] >= metrics.JACCARD_BIN) == (probability > np.float32(0.4))
    assert jaccard(above, torch.ones(1, 1, 1, dtype=torch.bool)) == pytest.approx(1, abs=1e-6)


def test_saturated_masks_score_fully():
    target = torch.zeros(2, 8, 8, dtype=torch.bool)
    target[:, :4] = True
    logits = torch.where(target, 1024.0, -1024.0)
    assert jaccard(logits, target) == pytest.approx(1, abs=1e-6)
    assert f_score(logits, target) == pytest.approx(1, abs=1e-6)
    assert null_score(logits) == pytest.approx(math.sqrt(0.5))


def test_without_a_target_there_is_no_score():
    nothing = torch.zeros(3, 4, 4, dtype=torch.bool)
    logits = torch.full((3, 4, 4), -5.0)
    assert math.isnan(f_score(logits, nothing))
    assert jaccard(logits, nothing) == 1
    assert null_score(logits) == 0


def test_joined_histograms_score_like_joined_frames():
    generator = torch.Generator().manual_seed(0)
    parts = [
        (torch.randn(3, 5, 5, generator=generator), torch.rand(3, 5, 5, generator=generator) > 0.6) for _ in "abcd"
    ]
    joined = np.concatenate([metrics.histogram(quantise(logits), target) for logits, target in parts])
    logits, target = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    assert metrics.scores_of(joined) == scores_from_bins(quantise(logits), target)
    assert metrics.scores_of(joined).F == pytest.approx(loop_f_score(logits, target), abs=1e-6)


def test_arrays_tensors_and_half_precision_are_accepted():
    logits = np.random.default_rng(0).normal(size=(2, 6, 6)).astype(np.float16)
    target = logits > 0.3
    assert jaccard(logits, target) == jaccard(torch.from_numpy(logits), torch.from_numpy(target))
    assert f_score(logits, target) == f_score(torch.from_numpy(logits).float(), target)


def test_invalid_inputs_are_reported():
    with pytest.raises(SamloveError, match=r"\(1, 2, 2\) and \(1, 2, 3\)"):
        jaccard(torch.zeros(1, 2, 2), torch.zeros(1, 2, 3, dtype=torch.bool))
    with pytest.raises(SamloveError, match="NaN"):
        quantise(torch.tensor([[[float("nan")]]]))
