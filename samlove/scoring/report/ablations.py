"""The tables of ablations as files: Markdown, CSV, learning curves, and one self-contained HTML page."""

import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from samlove.config import AblationsConfig, DatasetConfig
from samlove.scoring.ablations import (
    SCORES,
    SPLITS,
    STEPS,
    Line,
    Run,
    Table,
    all_curves,
    cost_of,
    make_tables,
    mean_scores,
    read_runs,
)
from samlove.scoring.compare import Difference, Repeats
from samlove.scoring.evaluate import number
from samlove.scoring.report.curves import LINES, draw_runs
from samlove.scoring.report.curves import Line as CurveLine
from samlove.scoring.report.page import load_template
from samlove.scoring.report.provenance import source_revision, versions
from stores.manifest import replace_folder

TEMPLATE = "ablations.html.j2"
PAPERS_DATASET = "Ref-AVS Bench"
CHARTS = {"val/J&F": "J&F on the validation split", "train/loss": "Training loss"}
MINUS = "\N{MINUS SIGN}"


def write_ablations(config: AblationsConfig, dataset: DatasetConfig, profile: str, runs: Path, out: Path) -> dict:
    """Write tables.md, <table>.csv, index.html and curves.csv into the folder `out`, replacing it as a whole.

    runs: holds {run}/seed{seed}, as the runs left them.
    Returns {run: {seen, unseen, mix: {J, F, J&F in percent}, S: fraction}}, means over seeds; None: no score.
    Raises RequestError if a run is incomplete, SamloveError if runs were scored on different expressions.
    """
    found = read_runs(config, runs)
    tables, curves = make_tables(config, found), all_curves(found)
    new = out.with_name(f"{out.name}.partial")
    shutil.rmtree(new, ignore_errors=True)  # left by a killed run
    new.mkdir(parents=True)
    for table in tables:
        pd.DataFrame([_as_record(line) for line in table.lines]).to_csv(new / f"{table.name}.csv", index=False)
    curves.to_csv(new / "curves.csv", index=False)
    texts = {
        "tables.md": render_markdown(tables, config, dataset),
        "index.html": _render_page(tables, config, dataset, profile, found, curves),
    }
    for name, text in texts.items():
        (new / name).write_text(text, encoding="utf-8")
    replace_folder(new, out)
    return {name: _as_metrics(run) for name, run in found.items()}


def _as_metrics(run: Run) -> dict[str, Any]:
    scores = mean_scores(run)
    splits = {split: {score: _rounded(scores[split][score].mean) for score in SCORES} for split in (*SPLITS, "mix")}
    return splits | {"S": _rounded(scores["null"]["S"].mean, 6)}


def _as_record(line: Line) -> dict[str, Any]:
    """A line of the CSV file. J&F is called JF, as in rows.parquet."""
    record: dict[str, Any] = {"run": line.run, "label": line.label, "seeds": line.seeds}
    for split, scores in line.scores.items():
        for score, value in scores.items():
            name = f"{split}_{score.replace('&', '')}"
            digits = 6 if score == "S" else 4
            record[name] = _rounded(value.mean, digits)
            if line.seeds > 1:
                record[f"{name}_std"] = _rounded(value.std, digits)
    for split in (*SPLITS, "mix"):
        difference = line.differences.get(split)
        for part in ("mean", "low", "high"):
            name = f"{split}_JF_difference" + ("" if part == "mean" else f"_{part}")
            record[name] = None if difference is None else _rounded(getattr(difference, part))
    for split in SPLITS:
        published = getattr(line.paper, split) or (None, None, None)
        record |= {f"paper_{split}_{s.replace('&', '')}": v for s, v in zip(SCORES, published, strict=True)}
    cost = line.cost
    record |= {f"{step}_s": round(cost.seconds[step], 1) for step in STEPS}
    record |= {"device_hours": round(cost.device_hours, 4), "device": cost.device, "parameters": cost.parameters}
    record |= {"epochs": cost.epochs, "best_epoch": round(cost.best_epoch, 1)}
    return record | {"expressions_per_s": round(cost.expressions_per_s, 1), "changes": _changes(line)}


# --- text ------------------------------------------------------------------------------------------------------------


def score(value: Repeats, digits: int = 1) -> str:
    """A mean, with its standard deviation if there are several seeds; a dash without a score."""
    mean = number(_rounded(value.mean, digits + 3), digits)  # rounded like the CSV file and the returned metrics
    return mean if math.isnan(value.std) else f"{mean} ± {value.std:.{digits}f}"


def points(value: float) -> str:
    """A difference with its sign; what rounds to 0 has none."""
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def difference(value: Difference | None) -> str:
    """Mean and 95 % interval; "base" for the row that others are compared with, a dash without a score."""
    if value is None:
        return "base"
    if math.isnan(value.mean):
        return "-"
    low, high = points(value.low), points(value.high)
    return points(value.mean) + ("" if math.isnan(value.low) else f" ({low} to {high})")


def duration(seconds: float) -> str:
    """h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def verdict(table: Table) -> str:
    """Which rows the table cannot tell apart; an empty string if nothing was compared."""
    if not table.comparisons:
        return ""
    if not table.alike:
        return "At 95 %, this table tells all its rows apart."
    pairs = [f"“{a}” and “{b}” ({' and '.join(splits)})" for (a, b), splits in table.alike.items()]
    return f"At 95 %, this table does not tell apart: {'; '.join(pairs)}."


def caution(table: Table) -> str:
    """How many comparisons the verdict rests on; an empty string if nothing was compared."""
    if not table.comparisons:
        return ""
    made = f"{table.comparisons} comparisons are made" if table.comparisons > 1 else "One comparison is made"
    return f"{made}. Of comparisons between equal runs, one in 20 appears as a difference by chance."


def coverage(seeds: int) -> str:
    """What the intervals cover."""
    if seeds > 1:
        return (
            f"Scores are means ± standard deviations over {seeds} seeds. Differences are in points of J&F, with a 95 % "
            "interval of Student's t over runs with the same seed. It covers the randomness of training, not the "
            "choice of test expressions."
        )
    return (
        "There is one seed. Differences are in points of J&F, with a 95 % interval of a paired bootstrap over "
        "expressions (protocol per_expression). It covers the choice of test expressions, not the randomness of "
        "training: another seed would also move the scores. Expressions count as independent, although some share a "
        "video."
    )


def origin(dataset: str) -> str:
    """What the paper's numbers are."""
    if dataset == PAPERS_DATASET:
        return f"The paper's numbers are for {PAPERS_DATASET}. The paper does not say which protocol it used."
    return (
        f"The paper's numbers are for {PAPERS_DATASET}, a different dataset. They are shown for orientation only; the "
        "numbers are not comparable."
    )


def paper_label(dataset: str) -> str:
    return "paper" if dataset == PAPERS_DATASET else f"paper, {PAPERS_DATASET}"


def _changes(line: Line) -> str:
    """Differences from the profile's configuration, such as "fusion.blocks: 1 → 2"."""
    return "; ".join(f"{name}: {_plain(base)} → {_plain(own)}" for name, (base, own) in line.changes.items()) or "none"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)


def _rounded(value: float, digits: int = 4) -> float | None:
    return None if math.isnan(value) else round(value, digits)


# --- Markdown and terminal -------------------------------------------------------------------------------------------


def render_markdown(tables: list[Table], config: AblationsConfig, dataset: DatasetConfig) -> str:
    """All tables. Under each row stands the paper's, if there is one."""
    parts = [f"# Ablations on {dataset.name}", coverage(len(config.seeds)), origin(dataset.name)]
    parts.append(
        "J, F and J&F are in percent; higher is better. S is a fraction; lower is better. A difference is bold if its "
        "interval excludes 0."
    )
    for table in tables:
        parts += [f"## {table.title}", " ".join((verdict(table), caution(table)))]
        parts += [_score_lines(table, dataset.name), _cost_lines(table)]
    return "\n\n".join(part for part in parts if part.strip()) + "\n"


def _score_lines(table: Table, dataset: str) -> str:
    lines = [["", *(f"{split} {s}" for split in SPLITS for s in SCORES), "mix J&F", "null S"]]
    lines[0] += [f"{split} to base (95 %)" for split in (*SPLITS, "mix")]
    for line in table.lines:
        cells = [line.label, *(score(line.scores[split][s]) for split in SPLITS for s in SCORES)]
        cells += [score(line.scores["mix"]["J&F"]), score(line.scores["null"]["S"], 3)]
        for split in (*SPLITS, "mix"):
            found = line.differences.get(split)
            cells.append(f"**{difference(found)}**" if found and found.distinct else difference(found))
        lines.append(cells)
        if line.paper.seen or line.paper.unseen:
            triples = [getattr(line.paper, split) or (None, None, None) for split in SPLITS]
            changed = [points(line.paper_differences[s]) if s in line.paper_differences else "" for s in SPLITS]
            lines.append([paper_label(dataset), *(number(v) for t in triples for v in t), "", "", *changed, ""])
    return _markdown(lines)


def _cost_lines(table: Table) -> str:
    lines = [["", "differs from the profile", "training", "inference", "scoring", "device hours", "parameters"]]
    for line in table.lines:
        cells = [line.label, _changes(line), *(duration(line.cost.seconds[step]) for step in STEPS)]
        lines.append([*cells, f"{line.cost.device_hours:.2f}", f"{line.cost.parameters:,}"])
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    escaped.insert(1, ["---"] + ["---:"] * (len(lines[0]) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def render_short(config: AblationsConfig, tables: Path) -> str:
    """The tables in the folder `tables` for a terminal: J&F, S, and the difference of mix to the base."""
    parts = []
    for name, table in config.tables.items():
        path = tables / f"{name}.csv"
        if not path.exists():  # added since
            continue
        rows = pd.read_csv(path, keep_default_na=False, na_values=[""])  # a label may be None or nan
        width = int(rows["label"].str.len().max()) + 2
        lines = [table.title, f"  {'J&F':<{width}}{'seen':>8}{'unseen':>8}{'mix':>8}{'null S':>8}  mix, to base (95 %)"]
        for row in rows.to_dict("records"):
            cells = [number(None if pd.isna(v := row[f"{split}_JF"]) else v) for split in (*SPLITS, "mix")]
            cells.append(number(None if pd.isna(row["null_S"]) else row["null_S"], 3))
            mean, low, high = (row["mix_JF_difference" + part] for part in ("", "_low", "_high"))
            found = None if row["run"] == table.base else Difference(mean, low, high, n=0)
            lines.append(f"  {row['label']:<{width}}{''.join(f'{cell:>8}' for cell in cells)}  {difference(found)}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts).replace(MINUS, "-")


# --- page ------------------------------------------------------------------------------------------------------------


def _render_page(
    tables: list[Table],
    config: AblationsConfig,
    dataset: DatasetConfig,
    profile: str,
    runs: dict[str, Run],
    curves: pd.DataFrame,
) -> str:
    template = load_template(TEMPLATE)
    first = next(iter(next(iter(runs.values())).values())).metrics
    costs = [cost_of(run) for run in runs.values()]
    return template.render(
        tables=tables,
        charts={table.name: _draw_charts(table, curves) for table in tables},
        styles={table.name: _styles(table) for table in tables},
        scales={table.name: _scale(table) for table in tables},
        config=config.model_dump(),
        dataset=dataset.name,
        synth=dataset.synth is not None,
        profile=profile,
        protocol=first["protocol"],
        expressions={split: first[name]["n"] for split, name in {**SPLITS, "null": "test_n"}.items()},
        seeds=len(config.seeds),
        device_hours=sum(cost.device_hours for cost in costs),
        devices=", ".join(sorted({cost.device for cost in costs})),
        splits=(*SPLITS, "mix"),
        scores=SCORES,
        steps=STEPS,
        score=score,
        points=points,
        difference=difference,
        duration=duration,
        changes=_changes,
        verdict=verdict,
        caution=caution,
        coverage=coverage,
        origin=origin,
        paper_label=paper_label(dataset.name),
        revision=source_revision(),
        versions=versions(),
    )


def _styles(table: Table) -> dict[str, CurveLine]:
    """How each run of a table is drawn; the base, which stands in several tables, is always the same."""
    runs = [table.base, *(line.run for line in table.lines if line.run != table.base)]
    return {run: LINES[i % len(LINES)] for i, run in enumerate(runs)}


def _draw_charts(table: Table, curves: pd.DataFrame) -> list[Markup]:
    """A chart per metric of CHARTS, one line per run, means over seeds; those without values are left out."""
    charts = []
    for metric, title in CHARTS.items():
        of_metric = curves[curves["metric"] == metric]
        means = [
            (style, of_metric[of_metric["run"] == run].groupby("epoch")[["value"]].mean().reset_index())
            for run, style in _styles(table).items()
        ]
        if any(len(values) for _, values in means):
            charts.append(Markup(draw_runs(title, means)))  # our own SVG
    return charts


def _scale(table: Table) -> float:
    """Half the width of the charts of differences, in points: the whole number that contains all intervals."""
    ends = [abs(end) for line in table.lines for d in line.differences.values() for end in d[:3] if not math.isnan(end)]
    ends += [abs(value) for line in table.lines for value in line.paper_differences.values()]
    return math.ceil(max(ends, default=0)) or 1
