"""The threshold of the object score: its choice on the validation split, and its curve in the evaluation."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from samlove.data.dataset import RefAvsFolder
from samlove.scoring.evaluate import CONTROLS, evaluate, render_table
from samlove.scoring.metrics import EDGES, quantise, scores_from_bins
from samlove.scoring.presence import COST, SCORES, UNGATED, choose_threshold
from samlove.scoring.report.curves import draw_presence
from samlove.scoring.validation import average, score_frame
from stores import PredictionReader, PredictionWriter
from tests.made_run import make_run

NAN = float("nan")


def validation(seed: int, overlap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """scores, kept, gated, S of 200 rows, a fifth of them null; overlap: how much the scores of both kinds mix."""
    rng = np.random.default_rng(seed)
    null = rng.random(200) < 0.2
    scores = np.where(null, 1.0, 4.0) + overlap * rng.normal(size=200)
    kept = np.where(null, NAN, rng.uniform(0.3, 1, 200))
    return scores, kept, np.where(null, NAN, 0.0), np.where(null, rng.uniform(0.1, 0.4, 200), NAN)


def applied(threshold: float, scores: np.ndarray, kept: np.ndarray, gated: np.ndarray, S: np.ndarray):
    shown = scores >= threshold
    return np.nanmean(np.where(shown, kept, gated)), np.nanmean(np.where(shown | np.isnan(S), S, 0))


@pytest.mark.parametrize("overlap", [0.1, 1.0, 3.0])
def test_the_threshold_has_the_lowest_s_at_its_cost(overlap: float) -> None:
    for seed in range(5):
        rows = validation(seed, overlap)
        threshold = choose_threshold(*rows)
        quality, S = applied(threshold, *rows)
        allowed, _ = applied(0.0, *rows)
        assert threshold >= 0 and quality >= allowed - COST - 1e-12
        for other in np.linspace(0, 8, 161):
            other_quality, other_S = applied(other, *rows)
            assert other_quality < allowed - COST or other_S >= S - 1e-12


def test_separate_scores_lose_nothing_and_gate_everything() -> None:
    rows = validation(0, 0.1)
    assert applied(choose_threshold(*rows), *rows) == (applied(0.0, *rows)[0], 0.0)


def test_without_null_rows_the_threshold_is_that_of_sam_2() -> None:
    scores, kept, gated, _ = validation(0, 1.0)
    present = ~np.isnan(kept)
    assert choose_threshold(scores[present], kept[present], gated[present], np.full(present.sum(), NAN)) == 0.0
    assert choose_threshold(*(np.empty(0) for _ in range(4))) == 0.0


def test_validation_scores_are_those_of_the_gated_masks() -> None:
    rng = np.random.default_rng(0)
    frames, size, count = 3, 16, 40
    targets = rng.random((count, frames, size, size)) < 0.3
    null = np.arange(count) % 4 == 0
    targets[null] = False
    targets[1, 0] = False  # out of sight on one frame
    bins = quantise(np.where(targets, 3.0, -3.0) + rng.normal(scale=2, size=targets.shape))
    object_scores = np.where(null[:, None], -1.0, 2.0) + rng.normal(scale=1.5, size=(count, frames))
    flat = zip(np.concatenate(bins), np.concatenate(targets), object_scores.ravel(), strict=True)
    samples = np.array([score_frame(*sample) for sample in flat])
    plain = average(samples, frames, presence=False)
    assert set(plain) == {"J", "F", "J&F"}
    each = [
        scores_from_bins(b[None], t[None]) for b, t in zip(np.concatenate(bins), np.concatenate(targets), strict=True)
    ]
    assert plain["J"] == pytest.approx(100 * np.mean([s.J for s in each]))
    assert plain["F"] == pytest.approx(100 * np.nanmean([s.F for s in each]))
    gated = average(samples, frames, presence=True)
    hidden = object_scores.max(1) < gated["threshold"]
    assert gated["threshold"] > 0 and null[hidden].all() and hidden.sum() > 3
    bins[hidden] = 0
    each = [
        scores_from_bins(b[None], t[None]) for b, t in zip(np.concatenate(bins), np.concatenate(targets), strict=True)
    ]
    assert gated["J"] == pytest.approx(100 * np.mean([s.J for s in each]))
    assert gated["F"] == pytest.approx(100 * np.nanmean([s.F for s in each]))
    assert gated["S"] == pytest.approx(np.mean([null_score_of_bins(b) for b in bins[null]]))
    assert "S" not in average(samples[np.repeat(~null, frames)], frames, presence=True)


def null_score_of_bins(bins: np.ndarray) -> float:
    return scores_from_bins(bins, np.zeros(bins.shape, bool)).S


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """A run in which every third row was gated."""
    data = tmp_path_factory.mktemp("run")
    expressions = make_run(data, {"test_s": 6, "test_u": 6, "test_n": 6})
    for control in CONTROLS:
        for path in (data / "predictions").glob(f"*/{control}.h5"):
            path.unlink()
    for split, rows in expressions.groupby("split"):
        folder = data / "predictions" / str(split)
        made = PredictionReader(folder / "predictions.h5")
        row_ids = rows["row_id"].tolist()
        scores = {row_id: 0.5 if i % 3 == 0 else 1.5 + i for i, row_id in enumerate(row_ids)}
        attrs = made.attrs | {"threshold": 1.0}
        extra = {"variant": UNGATED, SCORES: scores}
        bins = {row_id: made.read(row_id) for row_id in row_ids}
        with (
            PredictionWriter(folder / f"{UNGATED}.h5", *made.shape[:2], EDGES, attrs | extra) as ungated,
            PredictionWriter(folder / "predictions.h5", *made.shape[:2], EDGES, attrs) as gated,
        ):
            for row_id, value in bins.items():
                hidden = scores[row_id] < 1.0
                gated.write([row_id], np.zeros_like(value[None]) if hidden else value[None])
                if hidden:
                    ungated.write([row_id], value[None])
    return data, expressions


def test_the_curve_is_what_each_threshold_would_have_scored(run: tuple[Path, pd.DataFrame]) -> None:
    data, expressions = run
    result = evaluate(expressions, RefAvsFolder(data / "set"), data / "predictions", "per_expression")
    presence, rows = result.details["presence"], result.rows
    assert presence["threshold"] == 1.0
    points = {point["threshold"]: point for point in presence["points"]}
    chosen = points[1.0]
    assert chosen["S"] == pytest.approx(result.metrics["test_n"]["S"], abs=1e-6)
    for name, split in (("seen", "test_s"), ("unseen", "test_u")):
        assert chosen[name] == pytest.approx(result.metrics[split]["J&F"], abs=1e-3)
    lowest, highest = points[min(points)], points[max(points)]
    assert lowest["S"] > chosen["S"] > highest["S"] or highest["S"] == 0
    assert lowest["seen"] > chosen["seen"]
    folder = RefAvsFolder(data / "set")
    raw = PredictionReader(data / "predictions" / "test_s" / f"{UNGATED}.h5")
    for row in rows[rows["row_id"].isin(raw.row_ids)].itertuples():
        target = folder.load_masks(row.media_id, row.fid, *raw.shape[:2])
        assert row.J_ungated == pytest.approx(scores_from_bins(raw.read(row.row_id), target).J)
        assert row.J == pytest.approx(row.J_empty)
    assert json.loads(json.dumps(presence)) == presence
    assert draw_presence(**presence).count("<path") > 4
    assert "object score of 1.00" in render_table(result.metrics, result.details)
