"""Tables of ablations as numbers: finished runs, their means over seeds, and which rows of a table differ."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pandas as pd

from samlove.config import AblationsConfig, AblationTable, PaperScores
from samlove.errors import RequestError
from samlove.scoring.compare import Difference, Repeats, paired_bootstrap, paired_bootstrap_mix, paired_t, repeats
from samlove.scoring.report.curves import read_curves

SPLITS = {"seen": "test_s", "unseen": "test_u"}
SCORES = ("J", "F", "J&F")
STEPS = ("train", "infer", "evaluate")
FILES = ("run.json", "metrics.json", "evaluation/rows.parquet")


@dataclass(frozen=True)
class SeedRun:
    """What one training run left in its folder."""

    record: dict[str, Any]  # run.json
    metrics: dict[str, Any]  # metrics.json
    rows: pd.DataFrame  # row_id, split and JF (a fraction) per expression
    curves: dict[tuple[str, str], pd.DataFrame]  # (series, metric), such as ("val", "J&F") -> columns epoch and value


Run = dict[int, SeedRun]  # by seed


@dataclass(frozen=True)
class Cost:
    seconds: dict[str, float]  # training, inference and scoring; means over seeds
    device_hours: float  # all seeds together
    device: str
    parameters: int  # trained
    best_epoch: float  # means over seeds
    epochs: int
    expressions_per_s: float


@dataclass(frozen=True)
class Line:
    """A row of a table. Scores are in percent, but S is a fraction; NaN: no score."""

    run: str
    label: str
    seeds: int
    scores: dict[str, dict[str, Repeats]]  # seen, unseen and mix -> J, F and J&F; null -> S
    differences: dict[str, Difference]  # of J&F to the table's base, in points, for seen, unseen and mix; base: {}
    paper: PaperScores
    paper_differences: dict[str, float]  # of J&F, for the splits that the paper has
    changes: dict[str, list]  # setting -> [value of the profile, of this run]
    cost: Cost


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    base: str
    lines: list[Line]
    # pairs of labels -> the splits (of seen and unseen) in which the 95 % interval of their difference includes 0
    alike: dict[tuple[str, str], list[str]]
    comparisons: int  # pairs of rows times splits


Compare = Callable[[str, str, str], Difference]  # run, base, and seen, unseen or mix


def read_runs(config: AblationsConfig, folder: Path) -> dict[str, Run]:
    """All runs of the configuration with all their seeds, from {folder}/{run}/seed{seed}.

    Raises RequestError if a file is missing.
    """
    return {name: {seed: _read_run(config, folder, name, seed) for seed in config.seeds} for name in config.runs}


def _read_run(config: AblationsConfig, folder: Path, name: str, seed: int) -> SeedRun:
    place = folder / name / f"seed{seed}"
    for file in FILES:
        if not (place / file).exists():
            tables = [table for table, content in config.tables.items() if name in {row.run for row in content.rows}]
            where = f" of {', '.join(tables)}" if tables else ""
            raise RequestError(
                f"{place / file}: no such file; run {name!r} with seed {seed}{where} has not finished; "
                "run: make ablations"
            )
    record, metrics = (json.loads((place / file).read_text(encoding="utf-8")) for file in FILES[:2])
    rows = pd.read_parquet(place / FILES[2], columns=["row_id", "split", "JF"])
    charts = read_curves(place / "dvclive")
    curves = {(series, metric): values for metric, chart in charts.items() for series, values in chart.items()}
    return SeedRun(record, metrics, rows, curves)


def make_tables(config: AblationsConfig, runs: dict[str, Run]) -> list[Table]:
    """The tables of the configuration.

    Differences: of runs with the same seed if there are several seeds, otherwise over expressions (samlove.scoring.
    compare). Raises SamloveError if runs were scored on different expressions.
    """
    compare = cache(lambda run, base, split: _difference(runs[run], runs[base], split))
    return [_make_table(name, table, runs, compare) for name, table in config.tables.items()]


def _make_table(name: str, table: AblationTable, runs: dict[str, Run], compare: Compare) -> Table:
    paper = {row.run: row.paper or PaperScores() for row in table.rows}
    lines = []
    for row in table.rows:
        run, is_base = runs[row.run], row.run == table.base
        differences = {} if is_base else {split: compare(row.run, table.base, split) for split in (*SPLITS, "mix")}
        own, base = paper[row.run], paper[table.base]
        pairs = {} if is_base else {"seen": (own.seen, base.seen), "unseen": (own.unseen, base.unseen)}
        published = {split: round(a[2] - b[2], 1) for split, (a, b) in pairs.items() if a and b}
        changes = next(iter(run.values())).record["changes"]
        scores = mean_scores(run)
        lines.append(Line(row.run, row.label, len(run), scores, differences, own, published, changes, cost_of(run)))
    alike: dict[tuple[str, str], list[str]] = {}
    comparisons = 0
    for (a, b), split in product(combinations(table.rows, 2), SPLITS):
        difference = compare(b.run, a.run, split)
        if math.isnan(difference.mean):  # a split without scores
            continue
        comparisons += 1
        if not difference.distinct:
            alike.setdefault((a.label, b.label), []).append(split)
    return Table(name, table.title, table.base, lines, alike, comparisons)


def mean_scores(run: Run) -> dict[str, dict[str, Repeats]]:
    """Means and standard deviations over seeds: {seen, unseen, mix: {J, F, J&F}, null: {S}}."""
    names = SPLITS | {"mix": "mix"}
    scores = {split: {score: repeats(_by_seed(run, name, score)) for score in SCORES} for split, name in names.items()}
    return scores | {"null": {"S": repeats(_by_seed(run, "test_n", "S"))}}


def _by_seed(run: Run, split: str, score: str) -> dict[int, float]:
    found = {seed: seed_run.metrics[split][score] for seed, seed_run in run.items()}
    return {seed: float("nan") if value is None else value for seed, value in found.items()}


def _difference(run: Run, base: Run, split: str) -> Difference:
    if len(run) > 1:
        name = SPLITS.get(split, split)
        return paired_t(_by_seed(run, name, "J&F"), _by_seed(base, name, "J&F"))
    pairs = {name: (_percent_by_row(run, name), _percent_by_row(base, name)) for name in SPLITS.values()}
    if split == "mix":
        return paired_bootstrap_mix(*pairs.values())
    return paired_bootstrap(*pairs[SPLITS[split]])


def _percent_by_row(run: Run, split: str) -> pd.Series:
    (rows,) = (seed_run.rows for seed_run in run.values())
    return 100 * rows[rows["split"] == split].set_index("row_id")["JF"]


def cost_of(run: Run) -> Cost:
    records = [seed_run.record for seed_run in run.values()]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return Cost(
        seconds={step: mean([record["seconds"][step] for record in records]) for step in STEPS},
        device_hours=sum(sum(record["seconds"].values()) * record["devices"] for record in records) / 3600,
        device=", ".join(sorted({record["device"] for record in records})),
        parameters=records[0]["parameters"],
        best_epoch=mean([record["best_epoch"] for record in records]),
        epochs=records[0]["epochs"],
        expressions_per_s=mean([record["expressions_per_s"] for record in records]),
    )


def all_curves(runs: dict[str, Run]) -> pd.DataFrame:
    """Learning curves of all runs, columns epoch (from 1), run, seed, metric (such as val/J&F) and value."""
    parts = [
        values.assign(run=name, seed=seed, metric=f"{series}/{metric}".removeprefix("/"))
        for name, run in runs.items()
        for seed, seed_run in run.items()
        for (series, metric), values in seed_run.curves.items()
    ]
    columns = ["epoch", "run", "seed", "metric", "value"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
