"""`samlove results` and `samlove picture` on a made-up run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from samlove.cli.results import render_results, write_picture
from samlove.config import AblationsConfig, DatasetConfig, load
from samlove.data.dataset import RefAvsFolder, load_mask
from samlove.errors import RequestError
from samlove.scoring.evaluate import evaluate, write
from samlove.scoring.report.ablations import write_ablations
from samlove.scoring.report.clips import FILL, FRAME_WIDTH, draw_frame
from samlove.scoring.report.picture import AREA, GAP, HEADER, MARGIN, choose_row, draw_picture, save
from stores import PredictionReader
from tests.made_ablations import make_ablation_run
from tests.made_run import make_run

ROOT = Path(__file__).parents[1]
FRAMES = 3


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository root with the configurations and the evaluated results of profile micro."""
    root = tmp_path_factory.mktemp("checkout")
    data = root / "data" / "micro"
    expressions = make_run(data, {"val": 3, "test_s": 6, "test_u": 6, "test_n": 4}, FRAMES)
    (root / "data" / "dataset").mkdir()
    shutil.move(data / "set", root / "data" / "dataset" / "micro")
    folder = RefAvsFolder(root / "data" / "dataset" / "micro")
    evaluation = evaluate(expressions, folder, data / "predictions", "per_expression")
    write(evaluation, data / "metrics.json", data / "evaluation")
    (data / "report").mkdir()
    (data / "report" / "index.html").write_text("report")
    shutil.copytree(ROOT / "configs", root / "configs")
    (root / "configs" / "profile.yaml").write_text("profile: micro\n")
    return root


def masks_of(row: dict, folder: RefAvsFolder) -> np.ndarray:
    """The object's ground-truth masks, bool (T, H, W)."""
    return np.stack([load_mask(path) for path in folder.mask_paths(row["media_id"], row["fid"], FRAMES)])


@pytest.fixture
def inside(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(checkout)
    return checkout


@pytest.fixture
def rows(inside: Path) -> pd.DataFrame:
    return pd.read_parquet("data/micro/evaluation/rows.parquet")


def test_results_show_the_scores_and_the_report(inside: Path) -> None:
    text = render_results()
    metrics = json.loads((inside / "data/micro/metrics.json").read_text())
    errors = json.loads((inside / "data/micro/evaluation/details.json").read_text())["standard_errors"]
    for split, name in (("test_s", "seen"), ("test_u", "unseen"), ("mix", "mix")):
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        scores = [f"{metrics[split][k]:.1f}" for k in ("J", "F", "J&F")]
        assert line.split()[1:] == [str(metrics[split]["n"]), *scores, f"±{errors[split]['J&F']:.1f}"]
    assert text.splitlines()[-1] == f"report: {inside / 'data/micro/report/index.html'}"


def test_results_show_the_tables_of_ablations(inside: Path) -> None:
    tables, runs = inside / "data/micro/ablations/tables", inside / "data/micro/ablations/runs"
    config = load(AblationsConfig)
    for run in config.runs:
        make_ablation_run(runs, run, expressions=9, epochs=1)
    write_ablations(config, load(DatasetConfig), "micro", runs, tables)
    text = render_results()
    shutil.rmtree(tables.parent)
    plain, shown = render_results(), [table.title for table in config.tables.values()]
    assert text.startswith(plain + "\n") and not any(title in plain for title in shown)
    assert [line for line in text.splitlines() if line in shown] == shown
    assert text.splitlines()[-1] == f"ablations: {tables / 'index.html'}"


def test_without_a_run_the_error_names_the_command(checkout: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(checkout / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for ask in (render_results, lambda: write_picture(tmp_path / "a.png", None)):
        with pytest.raises(RequestError, match=r"data/micro/.*run: dvc repro"):
            ask()


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.jpg", "JPEG")])
def test_a_picture_has_the_kind_of_its_suffix(inside: Path, tmp_path: Path, name: str, kind: str) -> None:
    write_picture(tmp_path / name, None)
    with Image.open(tmp_path / name) as image:
        assert image.format == kind
        assert image.width == 2 * MARGIN + FRAMES * FRAME_WIDTH + (FRAMES - 1) * GAP


def test_equal_runs_give_equal_pictures(inside: Path, tmp_path: Path) -> None:
    said = [write_picture(tmp_path / f"{i}.png", None).partition(":")[2] for i in range(2)]
    assert said[0] == said[1]
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()


def test_a_picture_shows_the_frames_with_their_masks(rows: pd.DataFrame) -> None:
    folder = RefAvsFolder("data/dataset/micro")
    row = choose_row(rows, folder, FRAMES)
    reader = PredictionReader(Path("data/micro/predictions") / row["split"] / "predictions.h5")
    picture = np.asarray(draw_picture(row, folder, reader)).astype(int)
    bins, masks = reader.read(row["row_id"]), masks_of(row, folder)
    for t, path in enumerate(folder.frame_paths(row["media_id"], FRAMES)):
        frame = np.asarray(draw_frame(np.asarray(Image.open(path)), bins[t], masks[t])).astype(int)
        left = MARGIN + t * (FRAME_WIDTH + GAP)
        shown = picture[HEADER : HEADER + len(frame), left : left + FRAME_WIDTH]
        assert np.abs(shown - frame).mean() < 1
        assert ((shown - FILL) ** 2).sum(-1).min() < 3 * 128**2  # some pixels are tinted
    assert (picture[0] == 255).all() and (picture[:, 0] == 255).all()  # white margins suit light and dark pages


def test_the_default_row_is_a_seen_expression_that_needs_sound_but_not_sight(rows: pd.DataFrame) -> None:
    folder = RefAvsFolder("data/dataset/micro")
    row = choose_row(rows, folder, FRAMES)
    masks = masks_of(row, folder)
    assert row["split"] == "test_s" and row["sound"] and not row["sight"] and AREA[0] <= masks.mean() <= AREA[1]
    better = rows[(rows["split"] == "test_s") & rows["sound"] & ~rows["sight"] & (rows["JF"] > row["JF"])]
    for other in better.to_dict("records"):
        area = masks_of(other, folder).mean()
        assert not AREA[0] <= area <= AREA[1]
    assert choose_row(rows.sample(frac=1, random_state=1), folder, FRAMES)["row_id"] == row["row_id"]


def test_without_cues_and_seen_expressions_the_best_row_is_drawn(rows: pd.DataFrame) -> None:
    bare = rows[rows["split"] == "test_u"].drop(columns=["sight", "sound", "time"])
    row = choose_row(bare, RefAvsFolder("data/dataset/micro"), FRAMES)
    assert row["JF"] == bare["JF"].max()
    with pytest.raises(RequestError, match="J&F"):
        choose_row(rows[rows["null"]], RefAvsFolder("data/dataset/micro"), FRAMES)


def test_a_null_expression_can_be_drawn(rows: pd.DataFrame, tmp_path: Path) -> None:
    row_id = rows.loc[rows["null"], "row_id"].iloc[0]
    assert row_id in write_picture(tmp_path / "null.png", row_id)


@pytest.mark.parametrize(
    ("name", "row_id", "message"),
    [("a.gif", None, ".png"), ("no/a.png", None, "no such folder"), ("a.png", "nothing", "no such row_id")],
)
def test_wrong_requests_are_refused(inside: Path, tmp_path: Path, name: str, row_id: str | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        write_picture(tmp_path / name, row_id)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_even_noise_stays_below_300_kb(tmp_path: Path, name: str) -> None:
    data = tmp_path / "data"
    make_run(data, {"test_s": 3}, frames=10, size=128, width=172)
    noise = np.random.default_rng(0)
    for path in (data / "set" / "media").rglob("*.jpg"):
        Image.fromarray(noise.integers(0, 256, (129, 172, 3), dtype=np.uint8)).save(path)
    table = pd.read_parquet(data / "index" / "expressions.parquet").assign(J=0.5, F=0.5)
    reader = PredictionReader(data / "predictions" / "test_s" / "predictions.h5")
    save(draw_picture(table.iloc[0].to_dict(), RefAvsFolder(data / "set"), reader), tmp_path / name)
    assert (tmp_path / name).stat().st_size < 300_000
