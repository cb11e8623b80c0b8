"""Learning curves, recorded by DVCLive, drawn as one inline SVG."""

import io
from pathlib import Path

import pandas as pd

from samlove.scoring.report.figures import Figure, plain_style

COLUMNS = 3
FIRST = ("loss", "J&F", "J", "F")  # charts that come first; the others follow by name
FEW = 40  # up to this many points, each gets a marker
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
    # Text stays text, in the page's font. No date and a fixed salt, so that equal runs give equal bytes.
    with plain_style({"svg.fonttype": "none", "svg.hashsalt": "samlove", "font.size": 9}):
        figure = Figure(figsize=(11.6, 2.7 * rows), layout="constrained")
        axes = figure.subplots(rows, COLUMNS, squeeze=False)
        for axis, (metric, series) in zip(axes.flat, curves.items(), strict=False):
            for colour, (name, values) in zip(COLOURS, series.items(), strict=False):
                marker = "o" if len(values) <= FEW else ""
                axis.plot(values["epoch"], values["value"], color=colour, lw=1.6, marker=marker, ms=3, label=name)
            axis.set_title(metric, loc="left", fontsize=10, fontweight="bold")
            axis.set_xlabel("epoch")
            axis.grid(color="#e4e4de", lw=0.7)
            axis.spines[["top", "right"]].set_visible(False)
            if any(series):
                axis.legend(frameon=False)
        for axis in axes.flat[len(curves) :]:
            axis.set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
