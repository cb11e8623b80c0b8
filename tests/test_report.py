"""The report page: self-contained, complete, and rendered also if parts of a run are missing."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipelines.evaluate import main as run_evaluate
from pipelines.report import main as run_report
from samlove.data.dataset import RefAvsFolder
from samlove.errors import RequestError
from samlove.scoring.evaluate import evaluate, write
from samlove.scoring.report import build_report
from samlove.scoring.report.clips import (
    DASHES,
    FILL,
    FLOOR_DB,
    FRAME_WIDTH,
    MAX_HEIGHT,
    OUTLINE,
    choose,
    draw_frame,
    second_loudness,
)
from samlove.scoring.report.paper import TABLE_1
from tests.made_run import make_curves, make_run

ROOT = Path(__file__).parents[1]
VOID = {"meta", "img", "br", "col"}


class Page(HTMLParser):
    """Tags that are not closed, and every address that the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action") and v]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("run")
    expressions = make_run(data, {"val": 3, "test_s": 6, "test_u": 6, "test_n": 4})
    make_curves(data)
    folder = RefAvsFolder(data / "set")
    write(
        evaluate(expressions, folder, data / "predictions", "per_expression"),
        data / "metrics.json",
        data / "evaluation",
    )
    return data


def test_targets_that_appear_later_have_a_row(data, tmp_path):
    title = "target out of sight in frame 0"
    assert title not in page_of(data)
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "evaluation" / "details.json"
    details = json.loads(path.read_text())
    scores = {"J": 12.25, "F": 34.5, "J&F": 23.375, "n": 3}
    for found in ({**details, "late": {"test_u": scores}}, {**details, "late": {"test_u": scores}, "cues": {}}):
        path.write_text(json.dumps(found))
        (row,) = re.findall(rf"<tr><th scope=.row.>{title}</th>.*", page_of(tmp_path))
        assert all(f">{value}<" in row for value in (3, 12.2, 34.5, 23.4))
    path.write_text(json.dumps({name: value for name, value in details.items() if name != "late"}))  # of an older run
    assert "Seen, by cue" in page_of(tmp_path)


def page_of(data: Path, dataset: str = "LAVS-synth") -> str:
    config = {"dataset": {"name": dataset, "synth": None}, "fusion": {"dim": 192}}
    return build_report(data, RefAvsFolder(data / "set"), 4, "any", config)


def test_the_page_is_self_contained_and_complete(data):
    text = page_of(data)
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags and "link" not in page.tags
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    for heading in ("Result", "Does it use audio and text?", "Learning curves", "Breakdowns", "Examples", "Provenance"):
        assert f"<h2>{heading}</h2>" in text
    assert "different dataset" in text and "per_expression" in text and "official_batch" in text
    assert all(row.method in text for row in TABLE_1)
    assert "ab" * 32 in text and "dim: 192" in text  # fingerprint, configuration
    assert text.count("<article") == 4 and text.count("<img") == 4 * 3


def test_the_stages_write_what_the_contract_names(data, tmp_path, monkeypatch, capsys):
    for name, place in {"set": "dataset/micro", "index": "micro/index", "predictions": "micro/predictions"}.items():
        shutil.copytree(data / name, tmp_path / "data" / place)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "profile.yaml").write_text("profile: micro\n")
    monkeypatch.chdir(tmp_path)
    run_evaluate()
    assert "protocol per_expression" in capsys.readouterr().out
    run_report()
    for path in ("metrics.json", "evaluation/rows.parquet", "evaluation/details.json", "report/index.html"):
        assert (tmp_path / "data" / "micro" / path).stat().st_size > 100
    assert "root: data/dataset/micro" in (tmp_path / "data" / "micro" / "report" / "index.html").read_text()


def test_equal_runs_give_equal_pages(data):
    # Except for the source revision, which a commit or an edit in between changes.
    first, second = (re.sub(r"[0-9a-f]{12}( \+ changes)?", "", page_of(data)) for _ in range(2))
    assert first == second


def test_expressions_are_escaped(data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    rows = pd.read_parquet(tmp_path / "evaluation" / "rows.parquet")
    rows.assign(exp="<script>alert('1')</script>").to_parquet(tmp_path / "evaluation" / "rows.parquet")
    assert "<script" not in page_of(tmp_path)


def test_a_run_without_curves_controls_cues_and_null_rows_still_renders(tmp_path):
    expressions = make_run(tmp_path, {"test_s": 3, "test_u": 3}).drop(columns=["sight", "sound", "time", "template"])
    for path in (tmp_path / "predictions").glob("*/*.h5"):
        if path.stem != "predictions":
            path.unlink()
    folder = RefAvsFolder(tmp_path / "set")
    result = evaluate(expressions, folder, tmp_path / "predictions", "per_expression")
    write(result, tmp_path / "metrics.json", tmp_path / "evaluation")
    text = page_of(tmp_path, dataset="Ref-AVS Bench")
    assert Page(text).open == []
    assert "Learning curves" not in text and "Does it use audio" not in text and "by cue" not in text
    assert "different dataset" not in text


def test_masks_of_different_sizes_in_one_video_are_drawn(data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "set" / "gt_mask").rglob("00001.png"):
        Image.open(path).resize((10, 10)).save(path)
    assert page_of(tmp_path).count("<img") == 4 * 3


@pytest.mark.parametrize(("shape", "height"), [((1, 4000), 1), ((4000, 1), MAX_HEIGHT), ((1, 1), FRAME_WIDTH)])
def test_frames_of_any_shape_are_drawn(shape: tuple[int, int], height: int) -> None:
    frame, bins = np.zeros((*shape, 3), np.uint8), np.zeros((24, 24), np.uint8)
    assert draw_frame(frame, bins, np.ones(shape, bool)).size == (FRAME_WIDTH, height)


def test_before_evaluate_there_is_no_report(tmp_path):
    with pytest.raises(RequestError, match="dvc repro evaluate"):
        page_of(tmp_path)


def test_examples_go_from_best_to_worst_in_each_split(data):
    rows = pd.read_parquet(data / "evaluation" / "rows.parquet")
    chosen = choose(rows, 8)
    assert [row["split"] for row, _ in chosen] == ["test_s"] * 3 + ["test_u"] * 3 + ["test_n"] * 2
    assert [rank for _, rank in chosen][:3] == ["best of 6", "median of 6", "worst of 6"]
    seen = [row["JF"] for row, _ in chosen[:3]]
    assert seen == sorted(seen, reverse=True) and seen[0] == rows[rows["split"] == "test_s"]["JF"].max()
    null = [row["S"] for row, _ in chosen[6:]]
    assert null == sorted(null)
    assert len(choose(rows, 100)) == 6 + 6 + 4  # no row twice
    assert [len(choose(rows, clips)) for clips in range(4)] == [0, 1, 2, 3]


def test_loudness_is_that_of_each_second():
    rate = 1000
    sine = np.sin(2 * np.pi * 50 * np.arange(rate) / rate)
    samples = np.concatenate([sine, np.zeros(rate), 0.1 * sine]).astype(np.float32)
    assert second_loudness(samples, rate, 4) == pytest.approx([-3.01, FLOOR_DB, -23.01, FLOOR_DB], abs=0.02)


def test_masks_are_drawn_in_their_place():
    frame = np.full((30, 40, 3), 100, np.uint8)
    bins = np.zeros((8, 8), np.uint8)
    bins[:, :4] = 255  # predicted: left half
    truth = np.zeros((30, 40), bool)
    truth[:, 30:] = True  # ground truth: right quarter
    image = np.asarray(draw_frame(frame, bins, truth)).astype(int)
    height, width = image.shape[:2]
    assert height / width == pytest.approx(30 / 40, abs=0.01)
    np.testing.assert_allclose(image[height // 2, width // 8], (100 + np.array(FILL)) / 2, atol=1)
    assert (image[height // 2, width * 5 // 8] == 100).all()
    outline = image[height // 2, width * 3 // 4 - OUTLINE : width * 3 // 4]
    assert all(tuple(pixel) in DASHES for pixel in outline.tolist())
    assert (image[height // 2, width * 3 // 4 - OUTLINE - 1] == 100).all()
    assert (image[height // 2, width * 7 // 8] == 100).all()
