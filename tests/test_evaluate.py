"""Evaluation of a synthetic run: the format of its outputs, both protocols, breakdowns, controls, faults."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from samlove.data.dataset import RefAvsFolder
from samlove.errors import RequestError, SamloveError
from samlove.scoring.evaluate import Evaluation, evaluate, render_table, write
from samlove.scoring.metrics import EDGES, histogram, scores_of
from stores import PredictionReader, PredictionWriter
from tests.made_run import make_run

ROWS = {"val": 3, "test_s": 9, "test_u": 6, "test_n": 5}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = tmp_path_factory.mktemp("run")
    return data, make_run(data, ROWS)


Run = tuple[Path, pd.DataFrame]


def evaluated(run: Run, protocol: str = "per_expression") -> Evaluation:
    data, expressions = run
    return evaluate(expressions, RefAvsFolder(data / "set"), data / "predictions", protocol)


def test_metrics_have_the_documented_format(run, tmp_path):
    write(evaluated(run), tmp_path / "metrics.json", tmp_path / "evaluation")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics) == {"test_s", "test_u", "mix", "test_n", "protocol"}
    for split in ("test_s", "test_u", "mix"):
        assert set(metrics[split]) == {"J", "F", "J&F", "n"}
        assert metrics[split]["J&F"] == pytest.approx((metrics[split]["J"] + metrics[split]["F"]) / 2, abs=1e-3)
        assert 1 < metrics[split]["J"] <= 100
    assert set(metrics["test_n"]) == {"S", "n"} and 0 <= metrics["test_n"]["S"] <= 1
    assert metrics["mix"]["J&F"] == pytest.approx((metrics["test_s"]["J&F"] + metrics["test_u"]["J&F"]) / 2, abs=1e-3)
    assert [metrics[s]["n"] for s in ("test_s", "test_u", "mix", "test_n")] == [9, 6, 15, 5]
    assert metrics["protocol"] == "per_expression"
    rows = pd.read_parquet(tmp_path / "evaluation" / "rows.parquet")
    assert sorted(rows["row_id"]) == sorted(run[1]["row_id"])
    assert rows["S"].notna().equals(rows["null"].astype(bool))


def counts_of(run: Run, split: str) -> list[np.ndarray]:
    data, expressions = run
    rows = expressions[expressions["split"] == split].to_dict("records")
    reader = PredictionReader(data / "predictions" / split / "predictions.h5")
    bins = [reader.read(row["row_id"]) for row in rows]
    folder = RefAvsFolder(data / "set")
    targets = [np.zeros_like(b) if r["null"] else folder.load_masks(r["media_id"], r["fid"], len(b), b.shape[-1])
               for r, b in zip(rows, bins, strict=True)]  # fmt: skip
    return [histogram(b, t) for b, t in zip(bins, targets, strict=True)]


def test_per_expression_is_the_mean_of_the_expressions(run):
    metrics = evaluated(run).metrics
    scores = [scores_of(c) for c in counts_of(run, "test_s")]
    assert metrics["test_s"]["J"] == pytest.approx(100 * np.mean([s.J for s in scores]), abs=1e-3)
    assert metrics["test_s"]["F"] == pytest.approx(100 * np.mean([s.F for s in scores]), abs=1e-3)
    null = [scores_of(c).S for c in counts_of(run, "test_n")]
    assert metrics["test_n"]["S"] == pytest.approx(np.mean(null), abs=1e-5)


def test_official_batch_joins_four_expressions_in_file_order(run):
    result = evaluated(run, "official_batch")
    assert result.metrics["protocol"] == "official_batch"
    counts = counts_of(run, "test_s")
    batches = [scores_of(np.concatenate(counts[i : i + 4])) for i in (0, 4, 8)]
    assert result.metrics["test_s"]["F"] == pytest.approx(100 * np.mean([b.F for b in batches]), abs=1e-3)
    assert result.metrics["test_s"]["n"] == 9
    null = counts_of(run, "test_n")
    roots = [scores_of(np.concatenate(null[i : i + 4])).S for i in (0, 4)]
    assert result.metrics["test_n"]["S"] == pytest.approx(np.mean(roots), abs=1e-5)
    assert result.details["protocol"] == "per_expression"


def test_breakdowns_cover_every_row_once(run):
    details = evaluated(run).details
    assert set(details["cues"]["test_s"]) == {"sight", "sound", "sound+time"}
    assert set(details["categories"]["test_u"]) == {"ring", "kite"}
    for kind in ("cues", "categories"):
        assert {split: sum(g["n"] for g in details[kind][split].values()) for split in details[kind]} == {
            "test_s": 9,
            "test_u": 6,
        }


def test_s_is_given_for_each_kind_of_null(run):
    result = evaluated(run)
    nulls, rows = result.details["nulls"], result.rows[result.rows["split"] == "test_n"]
    assert sum(of_kind["n"] for of_kind in nulls.values()) == len(rows)
    for prefix, kind in (("null_m-", "sound removed"), ("null_c-", "sound of another video")):
        of_kind = rows[rows["media_id"].str.startswith(prefix)]
        assert nulls[kind] == {"S": pytest.approx(of_kind["S"].mean(), abs=1e-6), "n": len(of_kind)}
        assert f"{kind} {of_kind['S'].mean():.3f} (n {len(of_kind)})" in render_table(result.metrics, result.details)


def test_targets_out_of_sight_in_frame_0_have_a_row_of_their_own(tmp_path):
    """Found in the ground-truth masks, so also without cues. An object that no frame shows is not one of them."""
    expressions = make_run(tmp_path, {"test_s": 6, "test_u": 3})
    folder = RefAvsFolder(tmp_path / "set")
    assert evaluate(expressions, folder, tmp_path / "predictions", "per_expression").details["late"] == {}
    for number, frames in ((0, 1), (1, 1), (2, folder.frame_count("test_s_clip0"))):
        row = expressions.iloc[number]
        for t in range(frames):
            Image.new("L", (40, 30)).save(folder.mask_path(row["media_id"], row["fid"], t))
    plain = expressions.drop(columns=["sight", "sound", "time", "template"])
    result = evaluate(plain, folder, tmp_path / "predictions", "per_expression")
    assert list(np.flatnonzero(result.rows["late"])) == [0, 1]
    late = result.details["late"]
    assert set(late) == {"test_s"} and late["test_s"]["n"] == 2
    assert late["test_s"]["J"] == pytest.approx(100 * result.rows["J"][:2].mean(), abs=1e-3)


def test_controls_compare_the_same_rows(run):
    result = evaluated(run)
    controls, rows = result.details["controls"], result.rows
    swapped = controls["swapped_audio"]
    assert swapped["rows"] == "that need sound" and swapped["test_s"]["n"] == 6
    hearing = rows[(rows["split"] == "test_s") & rows["sound"]]
    expected = 100 * (hearing["JF"].mean() - hearing["JF_swapped_audio"].mean())
    assert swapped["test_s"]["drop"] == pytest.approx(expected, abs=1e-3) and expected > 5
    assert controls["permuted_text"]["rows"] == "all" and controls["permuted_text"]["mix"]["drop"] > 5
    ceiling = controls["true_mask"]["test_u"]
    assert ceiling["ratio"] == pytest.approx(ceiling["J"] / ceiling["J_true_mask"], abs=1e-3) and ceiling["ratio"] < 1
    assert ceiling["J"] == result.metrics["test_u"]["J"]


def test_the_table_shows_everything(run):
    result = evaluated(run)
    text = render_table(result.metrics, result.details)
    names = ("per_expression", "seen", "unseen", "mix", "null")
    for expected in (*names, "audio of another video", "ground-truth mask", "drop"):
        assert expected in text
    assert f"{result.metrics['mix']['J&F']:.1f}" in text and f"{result.metrics['test_n']['S']:.3f}" in text
    assert max(map(len, text.splitlines())) <= 100


def test_without_cues_controls_and_val(tmp_path):
    make_run(tmp_path, {"test_s": 3, "test_u": 3, "test_n": 3})
    for path in (tmp_path / "predictions").glob("*/*.h5"):
        if path.stem not in ("predictions", "swapped_audio"):
            path.unlink()
    expressions = pd.read_parquet(tmp_path / "index" / "expressions.parquet")
    plain = expressions.drop(columns=["sight", "sound", "time", "template"])
    result = evaluate(plain, RefAvsFolder(tmp_path / "set"), tmp_path / "predictions", "per_expression")
    assert result.details["cues"] == {} and set(result.details["controls"]) == {"swapped_audio"}
    assert result.details["controls"]["swapped_audio"]["rows"] == "all"
    assert "val" not in result.details["protocols"]["per_expression"]
    assert "all" in render_table(result.metrics, result.details)


def test_rows_with_unknown_cues_count_for_no_cue_and_need_no_sound(run):
    data, expressions = run
    hearing = expressions[expressions["sound"] & (expressions["split"] == "test_s")]
    known = expressions["row_id"] != hearing["row_id"].iloc[0]
    flags = {c: expressions[c].astype("boolean").where(known) for c in ("sight", "sound", "time")}
    partly = expressions[expressions["split"].isin(["test_s", "val"])].assign(**flags)
    details = evaluate(partly, RefAvsFolder(data / "set"), data / "predictions", "per_expression").details
    assert sum(g["n"] for g in details["cues"]["test_s"].values()) == 9 - 1
    assert details["controls"]["swapped_audio"]["test_s"]["n"] == 6 - 1


def test_a_target_that_no_frame_shows_has_no_f(tmp_path):
    expressions = make_run(tmp_path, {"test_s": 3, "test_u": 3})
    first = expressions.iloc[0]
    for path in (tmp_path / "set" / "gt_mask" / first["media_id"] / f"fid_{first['fid']}").glob("*.png"):
        Image.new("L", (40, 30)).save(path)
    result = evaluate(expressions, RefAvsFolder(tmp_path / "set"), tmp_path / "predictions", "per_expression")
    row = result.rows.iloc[0]
    assert math.isnan(row["F"]) and not math.isnan(row["J"])
    assert result.metrics["test_s"]["F"] == pytest.approx(100 * result.rows.iloc[1:3]["F"].mean(), abs=1e-3)
    assert result.metrics["test_n"] == {"S": None, "n": 0}
    write(result, tmp_path / "metrics.json", tmp_path / "evaluation")  # NaN would not be JSON


def test_missing_predictions_are_reported(run, tmp_path):
    data, expressions = run
    folder = RefAvsFolder(data / "set")
    with pytest.raises(RequestError, match=r"test_s/predictions\.h5.*dvc repro infer"):
        evaluate(expressions, folder, tmp_path, "per_expression")
    more = expressions.assign(split="test_s")
    with pytest.raises(SamloveError, match="14 are missing"):
        evaluate(more, folder, data / "predictions", "per_expression")


def test_different_bin_edges_are_refused(run, tmp_path):
    _, expressions = run
    (tmp_path / "test_s").mkdir()
    with PredictionWriter(tmp_path / "test_s" / "predictions.h5", 3, 24, EDGES * np.float32(0.5)):
        pass
    with pytest.raises(SamloveError, match="edges"):
        evaluate(expressions[expressions["split"] == "test_s"], RefAvsFolder("."), tmp_path, "per_expression")
