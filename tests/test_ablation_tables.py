"""Tables of ablations: all files agree with the runs' metrics, and say which rows they cannot tell apart."""

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pandas as pd
import pytest

from samlove.config import AblationsConfig, DatasetConfig
from samlove.errors import RequestError, SamloveError
from samlove.scoring.compare import Difference, Repeats
from samlove.scoring.report.ablations import (
    MINUS,
    difference,
    duration,
    points,
    render_short,
    score,
    write_ablations,
)
from tests.made_ablations import make_ablation_run
from tests.test_report import Page

SPLITS = {"seen": "test_s", "unseen": "test_u", "mix": "mix"}
SHIFTS = {"base": 0.0, "twin": 0.0, "worse": -0.1, "extra": 0.05}
CHANGES = {"worse": {"fusion.accumulate_cls": [True, False], "fusion.blocks": [1, 2]}}
PAPER = {"seen": [43.5, 51.9, 47.7], "unseen": [66.5, 72.3, 69.4]}
VAGUE = "does not tell apart"


def config_of(seeds: list[int]) -> AblationsConfig:
    rows = {
        "first": [("base", "the | base", PAPER), ("twin", "a <b>twin</b>", None), ("worse", "worse", PAPER)],
        "second": [("base", "base", PAPER), ("worse", "None", {"seen": [34.8, 44.8, 39.8]})],
    }
    tables = {
        name: {
            "title": f"Table {name}",
            "base": "base",
            "rows": [{"run": run, "label": label, "paper": paper} for run, label, paper in content],
        }
        for name, content in rows.items()
    }
    return AblationsConfig.model_validate({"seeds": seeds, "runs": {run: {} for run in SHIFTS}, "tables": tables})


def dataset(name: str = "LAVS-synth") -> DatasetConfig:
    return DatasetConfig(root="data/dataset/any", name=name)


def made(folder: Path, seeds: list[int]) -> tuple[AblationsConfig, Path, dict]:
    """The tables of runs with these seeds: configuration, folder with runs/ and tables/, returned metrics."""
    for run, shift in SHIFTS.items():
        for seed in seeds:
            make_ablation_run(folder / "runs", run, seed, shift + 0.001 * seed, changes=CHANGES.get(run))
    config = config_of(seeds)
    return config, folder, write_ablations(config, dataset(), "any", folder / "runs", folder / "tables")


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory: pytest.TempPathFactory) -> tuple[AblationsConfig, Path, dict]:
    return made(tmp_path_factory.mktemp("one"), [0])


@pytest.fixture(scope="module")
def three_seeds(tmp_path_factory: pytest.TempPathFactory) -> tuple[AblationsConfig, Path, dict]:
    return made(tmp_path_factory.mktemp("three"), [0, 1, 2])


def metrics_of(folder: Path, run: str, seeds: list[int]) -> list[dict]:
    return [json.loads((folder / "runs" / run / f"seed{seed}" / "metrics.json").read_text()) for seed in seeds]


def markdown_rows(folder: Path, title: str) -> dict[str, list[str]]:
    """Label -> cells of the scores of one table in tables.md."""
    section = (folder / "tables" / "tables.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    lines = section.split("\n\n")[1].splitlines()[2:]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {label: cells for label, *cells in rows}


def page_rows(folder: Path, table: str) -> list[list[str]]:
    """Text of the cells of the scores of one table on the page."""
    page = (folder / "tables" / "index.html").read_text()
    body = page.split(f'<section id="{table}">')[1].split('<table class="scores">')[1].split("</table>")[0]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", body.split("</thead>")[1], re.S)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [[unescape(re.sub(r"<[^>]*>", "", cell)).strip() for cell in row] for row in cells]


@pytest.mark.parametrize("name", ["one_seed", "three_seeds"])
def test_all_files_agree_with_the_metrics_of_the_runs(name: str, request: pytest.FixtureRequest) -> None:
    config, folder, metrics = request.getfixturevalue(name)
    table = pd.read_csv(folder / "tables" / "first.csv").set_index("run")
    text = markdown_rows(folder, "Table first")
    page = {row[0]: row[1:] for row in page_rows(folder, "first")}
    assert set(metrics) == set(SHIFTS)  # also the run that stands in no table
    for row in config.tables["first"].rows:
        stored = metrics_of(folder, row.run, config.seeds)
        shown = []
        for split, key in SPLITS.items():
            for kind in ("J", "F", "J&F"):
                values = pd.Series([run[key][kind] for run in stored])
                column = f"{split}_{kind.replace('&', '')}"
                assert metrics[row.run][split][kind] == pytest.approx(values.mean(), abs=1e-4)
                assert table.loc[row.run, column] == pytest.approx(values.mean(), abs=1e-4)
                shown.append(f"{round(values.mean(), 4):.1f}")
                if len(stored) > 1:
                    assert table.loc[row.run, f"{column}_std"] == pytest.approx(values.std(), abs=1e-4)
                    shown[-1] += f" ± {values.std():.1f}"
        null = pd.Series([run["test_n"]["S"] for run in stored])
        assert metrics[row.run]["S"] == table.loc[row.run, "null_S"] == pytest.approx(null.mean(), abs=1e-6)
        shown = [*shown[:6], shown[-1], f"{null.mean():.3f}" + (f" ± {null.std():.3f}" if len(stored) > 1 else "")]
        assert text[row.label.replace("|", "\\|")][:8] == shown
        assert page[row.label + (" base" if row.run == "base" else "")] == shown
    assert ("seen_J_std" in table) == (len(config.seeds) > 1)


def test_differences_are_those_to_the_base(one_seed: tuple[AblationsConfig, Path, dict]) -> None:
    _, folder, metrics = one_seed
    table = pd.read_csv(folder / "tables" / "first.csv").set_index("run")
    text = markdown_rows(folder, "Table first")
    for split in SPLITS:
        expected = metrics["worse"][split]["J&F"] - metrics["base"][split]["J&F"]
        mean, low, high = (table.loc["worse", f"{split}_JF_difference{part}"] for part in ("", "_low", "_high"))
        assert mean == pytest.approx(expected, abs=1e-3) and low < mean < high < 0
    assert table.filter(like="difference").loc["base"].isna().all()
    assert text["the \\| base"][8:] == ["base"] * 3
    assert all(cell.startswith(f"**{MINUS}") and cell.endswith("**") for cell in text["worse"][8:])
    assert not any("**" in cell for cell in text["a <b>twin</b>"][8:])


def test_differences_of_several_seeds_are_paired_by_seed(three_seeds: tuple[AblationsConfig, Path, dict]) -> None:
    _, folder, _ = three_seeds
    table = pd.read_csv(folder / "tables" / "first.csv").set_index("run")
    own, base = (metrics_of(folder, run, [0, 1, 2]) for run in ("worse", "base"))
    values = pd.Series([a["mix"]["J&F"] - b["mix"]["J&F"] for a, b in zip(own, base, strict=True)])
    half = 4.302653 * values.std() / 3**0.5  # Student's t at 97.5 %, two degrees of freedom
    found = table.loc["worse", ["mix_JF_difference", "mix_JF_difference_low", "mix_JF_difference_high"]].tolist()
    assert found == pytest.approx([values.mean(), values.mean() - half, values.mean() + half], abs=1e-3)


@pytest.mark.parametrize("name", ["one_seed", "three_seeds"])
def test_rows_that_cannot_be_told_apart_are_named(name: str, request: pytest.FixtureRequest) -> None:
    _, folder, _ = request.getfixturevalue(name)
    first, second = (folder / "tables" / "tables.md").read_text().split("## ")[1:]
    assert f"At 95 %, this table {VAGUE}: “the | base” and “a <b>twin</b>” (seen and unseen). 6 comparisons" in first
    assert VAGUE not in second and "tells all its rows apart. 2 comparisons" in second
    page = (folder / "tables" / "index.html").read_text()
    assert page.count(VAGUE) == page.count("tells all its rows apart") == 1
    assert ("not the randomness of training" in page) == (name == "one_seed")


def test_the_page_is_self_contained(one_seed: tuple[AblationsConfig, Path, dict]) -> None:
    _, folder, _ = one_seed
    text = (folder / "tables" / "index.html").read_text()
    page = Page(text)
    assert page.open == [] and "script" not in page.tags and "link" not in page.tags
    assert all(address.startswith("#") for address in page.addresses)
    assert "<b>twin" not in text and "a &lt;b&gt;twin" in text
    assert text.count("J&amp;F on the validation split") == text.count("Training loss") == 2
    assert "fusion.accumulate_cls: true → false" in text and "fusion.blocks: 1 → 2" in text
    for shown in ("0:02:33", "0:00:41", "0:00:10", "1,234,567", "6 of 7", "cpu, 1 thread"):
        assert shown in text
    hours = 4 * (153.4 + 41.2 + 9.6) / 3600
    assert f"<small>Device hours</small><b>{hours:.2f}</b>" in text


def test_the_papers_numbers_stand_beside_ours(one_seed: tuple[AblationsConfig, Path, dict], tmp_path: Path) -> None:
    config, folder, _ = one_seed
    write_ablations(config, dataset("Ref-AVS Bench"), "any", folder / "runs", tmp_path / "tables")
    for place, label in ((folder, "paper, Ref-AVS Bench"), (tmp_path, "paper")):
        published = [row for row in page_rows(place, "second") if row[0] == label]
        assert published[0] == [label, "43.5", "51.9", "47.7", "66.5", "72.3", "69.4", "", ""]
        assert published[1] == [label, "34.8", "44.8", "39.8", "", "", "", "", ""]
        assert markdown_rows(place, "Table second")[label][8:] == [f"{MINUS}7.9", "", ""]
        page, text = ((place / "tables" / name).read_text() for name in ("index.html", "tables.md"))
        assert ("for orientation only" in page) == ("for orientation only" in text) == (place == folder)
    table = pd.read_csv(folder / "tables" / "second.csv").set_index("run")
    assert table.loc["base", "paper_unseen_JF"] == 69.4 and pd.isna(table.loc["worse", "paper_unseen_JF"])


def test_learning_curves_are_collected(three_seeds: tuple[AblationsConfig, Path, dict]) -> None:
    _, folder, _ = three_seeds
    curves = pd.read_csv(folder / "tables" / "curves.csv")
    assert list(curves) == ["epoch", "run", "seed", "metric", "value"]
    assert set(curves["metric"]) == {"train/loss", "val/J&F"}
    assert len(curves) == 4 * 3 * 2 * 7 and set(curves["epoch"]) == set(range(1, 8))
    stored = pd.read_csv(folder / "runs/worse/seed2/dvclive/plots/metrics/val/J&F.tsv", sep="\t")
    found = curves[(curves["run"] == "worse") & (curves["seed"] == 2) & (curves["metric"] == "val/J&F")]
    assert found["value"].tolist() == pytest.approx(stored["J&F"].tolist())


@pytest.mark.parametrize("file", ["run.json", "metrics.json", "evaluation/rows.parquet", "."])
def test_an_incomplete_run_is_named(file: str, one_seed: tuple[AblationsConfig, Path, dict], tmp_path: Path) -> None:
    config, folder, _ = one_seed
    shutil.copytree(folder / "runs", tmp_path / "runs")
    missing = tmp_path / "runs" / "worse" / "seed0" / file
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    with pytest.raises(RequestError, match=r"'worse' with seed 0 of first, second .*run: make ablations"):
        write_ablations(config, dataset(), "any", tmp_path / "runs", tmp_path / "tables")
    assert not (tmp_path / "tables").exists()


def test_a_missing_seed_is_named(one_seed: tuple[AblationsConfig, Path, dict], tmp_path: Path) -> None:
    _, folder, _ = one_seed
    with pytest.raises(RequestError, match="'base' with seed 5"):
        write_ablations(config_of([0, 5]), dataset(), "any", folder / "runs", tmp_path / "tables")


def test_runs_with_different_expressions_are_refused(
    one_seed: tuple[AblationsConfig, Path, dict], tmp_path: Path
) -> None:
    config, folder, _ = one_seed
    shutil.copytree(folder / "runs", tmp_path / "runs")
    path = tmp_path / "runs" / "worse" / "seed0" / "evaluation" / "rows.parquet"
    pd.read_parquet(path).query("row_id != 'test_s_0'").to_parquet(path)
    with pytest.raises(SamloveError, match="same expressions"):
        write_ablations(config, dataset(), "any", tmp_path / "runs", tmp_path / "tables")


def test_without_curves_and_unseen_expressions_the_tables_are_written(tmp_path: Path) -> None:
    for run, shift in SHIFTS.items():
        make_ablation_run(tmp_path / "runs", run, shift=shift, splits=("test_s", "test_n"))
        shutil.rmtree(tmp_path / "runs" / run / "seed0" / "dvclive")
    metrics = write_ablations(config_of([0]), dataset(), "any", tmp_path / "runs", tmp_path / "tables")
    assert metrics["base"]["unseen"] == metrics["base"]["mix"] == {"J": None, "F": None, "J&F": None}
    assert markdown_rows(tmp_path, "Table first")["worse"][3:7] == ["-"] * 4
    text = (tmp_path / "tables" / "tables.md").read_text()
    assert "“a <b>twin</b>” (seen). 3 comparisons" in text
    page = (tmp_path / "tables" / "index.html").read_text()
    assert "validation split" not in page and not re.search(r"\bnan\b", text + page)


@pytest.mark.parametrize("name", ["one_seed", "three_seeds"])
def test_the_short_form_shows_the_means(name: str, request: pytest.FixtureRequest) -> None:
    config, folder, metrics = request.getfixturevalue(name)
    text = render_short(config, folder / "tables")
    assert text.isascii() and text.count("Table ") == 2
    line = next(line for line in text.splitlines() if line.startswith("  worse"))
    scores = [f"{metrics['worse'][split]['J&F']:.1f}" for split in SPLITS]
    assert line.split()[1:5] == [*scores, f"{metrics['worse']['S']:.3f}"]
    assert re.search(r"-\d+\.\d \(-\d+\.\d to -\d+\.\d\)$", line)
    assert next(line for line in text.splitlines() if line.startswith("  None")).split()[1:5] == line.split()[1:5]


def test_numbers_are_rounded_and_signed() -> None:
    nan = float("nan")
    assert [points(x) for x in (0.04, -0.04, -0.06, 12.26)] == ["0.0", "0.0", f"{MINUS}0.1", "+12.3"]
    assert difference(Difference(-1.04, -2.06, 0.02, 9)) == f"{MINUS}1.0 ({MINUS}2.1 to 0.0)"
    assert [difference(None), difference(Difference(nan, nan, nan, 0))] == ["base", "-"]
    assert difference(Difference(1.0, nan, nan, 1)) == "+1.0"
    assert [score(Repeats(61.26, nan, 1)), score(Repeats(0.2346, 0.0126, 3), 3)] == ["61.3", "0.235 ± 0.013"]
    assert score(Repeats(nan, nan, 1)) == "-"
    assert [duration(x) for x in (0.4, 59.6, 3599.5, 36000)] == ["0:00:00", "0:01:00", "1:00:00", "10:00:00"]
