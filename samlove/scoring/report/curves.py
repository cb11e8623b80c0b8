"""Learning curves, recorded by DVCLive, drawn as inline SVG: those of one run, or one metric of several runs."""

import io
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from samlove.scoring.report.figures import Axes, Figure, MaxNLocator, plain_style

COLUMNS = 3
FIRST = ("loss", "J&F", "J", "F")  # charts that come first; the others follow by name
FEW = 40  # up to this many points, each gets a marker
# Text stays text, in the page's font. No date and a fixed salt, so that equal runs give equal bytes.
SVG = {"svg.fonttype": "none", "svg.hashsalt": "samlove"}
COLOURS = ("#2b62c4", "#c8571b", "#1f8a70", "#7a4fb5")


def read_curves(dvclive: Path) -> dict[str, dict[str, pd.DataFrame]]:
    """{metric: {series: columns epoch (from 1) and value}} of `dvclive`/plots/metrics; {} if there are none.

    A metric is a file name, and a series is its folder: train/loss.tsv and val/loss.tsv share one chart. One DVCLive
    step is one epoch.
    """
    root = dvclive / "plots" / "metrics"
    found: dict[str, dict[str, pd.DataFrame]] = {}
    for path in sorted(root.rglob("*.tsv"), key=lambda p: (FIRST.index(p.stem) if p.stem in FIRST else len(FIRST), p)):
        table = pd.read_csv(path, sep="\t")
        value = table.drop(columns=["step", "timestamp"], errors="ignore").iloc[:, 0]
        series = path.parent.relative_to(root).as_posix().removeprefix(".")
        found.setdefault(path.stem, {})[series] = pd.DataFrame({"epoch": table["step"] + 1, "value": value})
    return found


def draw_curves(curves: dict[str, dict[str, pd.DataFrame]]) -> str:
    """The charts as one <svg> element; an empty string if there are no curves."""
    if not curves:
        return ""
    rows = -(-len(curves) // COLUMNS)
    with plain_style(SVG | {"font.size": 9}):
        figure = Figure(figsize=(11.6, 2.7 * rows), layout="constrained")
        axes = figure.subplots(rows, COLUMNS, squeeze=False)
        for axis, (metric, series) in zip(axes.flat, curves.items(), strict=False):
            for colour, (name, values) in zip(COLOURS, series.items(), strict=False):
                marker = "o" if len(values) <= FEW else ""
                axis.plot(values["epoch"], values["value"], color=colour, lw=1.6, marker=marker, ms=3, label=name)
            _finish(axis, metric, 10)
            if any(series):
                axis.legend(frameon=False)
        for axis in axes.flat[len(curves) :]:
            axis.set_visible(False)
        return _as_svg(figure)


class Line(NamedTuple):
    """How a run is drawn. The colours are Okabe and Ito's, which colour-blind readers can tell apart."""

    colour: str
    dash: str  # SVG's stroke-dasharray; "": solid


OKABE_ITO = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "6 2.5", "1.5 2")
LINES = tuple(Line(OKABE_ITO[i % 7], DASHES[i % 3]) for i in range(21))  # each pair once; the first is for the base


def draw_runs(metric: str, runs: list[tuple[Line, pd.DataFrame]]) -> str:
    """One metric of several runs as an <svg> element without a legend. runs: style; columns epoch and value."""
    with plain_style(SVG | {"font.size": 11}):
        figure = Figure(figsize=(6.2, 3.7), layout="constrained")
        axis = figure.subplots()
        for line, values in runs:
            style = (0, tuple(float(part) for part in line.dash.split())) if line.dash else "-"
            marker = "o" if len(values) == 1 else ""
            axis.plot(values["epoch"], values["value"], color=line.colour, linestyle=style, lw=1.8, marker=marker, ms=4)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        _finish(axis, metric, 12)
        return _as_svg(figure)


def draw_presence(points: list[dict], threshold: float) -> str:
    """S against J&F, in percent, over the threshold of the object score, as an <svg> element; the chosen one is marked.

    points: as in samlove.scoring.presence.
    """
    with plain_style(SVG | {"font.size": 9}):
        figure = Figure(figsize=(11.6, 3.2), layout="constrained")
        axis = figure.subplots()
        for colour, name in zip(COLOURS, ("seen", "unseen"), strict=False):
            known = [p for p in points if p[name] is not None and p["S"] is not None]
            axis.plot([p["S"] for p in known], [p[name] for p in known], color=colour, lw=1.6, label=name)
            chosen = [p for p in known if p["threshold"] == round(threshold, 4)]
            axis.plot([p["S"] for p in chosen], [p[name] for p in chosen], "o", color=colour, ms=6)
        axis.legend(frameon=False)
        _finish(axis, "J&F by S, over the threshold", 10, "S of null expressions (lower is better)")
        return _as_svg(figure)


def _finish(axis: Axes, metric: str, size: int, along: str = "epoch") -> None:
    axis.set_title(metric, loc="left", fontsize=size, fontweight="bold")
    axis.set_xlabel(along)
    axis.grid(color="#e4e4de", lw=0.7)
    axis.spines[["top", "right"]].set_visible(False)


def _as_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
