"""Draws loudness and object scores over time, in the colours of the overlay."""

from pathlib import Path

import numpy as np

from samlove.overlay import BAR, COLOURS, ON_BAR
from samlove.scoring.report.figures import Figure, FigureCanvasAgg, MaxNLocator, plain_style

STEP = 0.05  # seconds of sound per value of the loudness
SIZE, DPI = (4.6, 3.0), 200  # inches; narrow, so that its text can be read on a phone
QUIET = "#8b949e"  # of axes, grid and loudness
SILENT = 1e-4  # loudness of the highest bar, at least


def write_plot(
    path: Path, times: np.ndarray, scores: np.ndarray, loudness: np.ndarray | None, start: float, end: float
) -> None:
    """Write a PNG of both over the seconds from `start` to `end`.

    times: (T,) seconds. scores: (K,T), logits; above 0, the object is in sight. loudness: (S,), the root mean square of
    every STEP seconds, 1 at full scale; None for a video without sound.
    """
    settings = {
        "font.size": 9, "text.color": ON_BAR, "axes.labelcolor": ON_BAR, "axes.edgecolor": QUIET, "xtick.color": ON_BAR,
        "ytick.color": ON_BAR, "axes.facecolor": BAR, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with plain_style(settings):
        figure = Figure(figsize=SIZE, facecolor=BAR, layout="constrained")
        FigureCanvasAgg(figure)
        heard, seen = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
        if loudness is None:
            heard.text(0.5, 0.5, "no sound", transform=heard.transAxes, ha="center", va="center", color=QUIET)
        else:
            peak = max(float(loudness.max(initial=0)), SILENT)
            heard.fill_between(start + (np.arange(len(loudness)) + 0.5) * STEP, loudness / peak, color=QUIET, lw=0)
        heard.set(ylim=(0, 1.05), yticks=(), ylabel="loudness")
        seen.axhline(0, color=QUIET, lw=0.8)
        for number, row in enumerate(scores):
            seen.plot(times, row, color=np.array(COLOURS[number % len(COLOURS)]) / 255, lw=1.8, marker="o", ms=3)
        low, high = min(float(scores.min()), -1.0), max(float(scores.max()), 1.0)
        margin = 0.08 * (high - low)
        seen.set(xlim=(start, end), ylim=(low - margin, high + margin), xlabel="time (s)", ylabel="object score")
        seen.yaxis.set_major_locator(MaxNLocator(5))
        figure.align_ylabels()
        figure.savefig(path, dpi=DPI)
