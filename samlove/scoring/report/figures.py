"""Matplotlib for the report, as it is delivered: no variable, matplotlibrc or style of the user's affects a figure."""

import os
from contextlib import AbstractContextManager
from typing import Any

_BACKEND = os.environ.pop("MPLBACKEND", None)  # matplotlib cannot be imported if this is the name of an unknown backend
try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator
finally:
    if _BACKEND is not None:
        os.environ["MPLBACKEND"] = _BACKEND

__all__ = ["Axes", "Figure", "FigureCanvasAgg", "MaxNLocator", "Rectangle", "plain_style"]


def plain_style(settings: dict[str, Any]) -> AbstractContextManager[None]:
    """Matplotlib's defaults and `settings` while the block runs; text between $ is text, not a formula.

    Make figures with `Figure`: pyplot would load the user's backend.
    """
    rc: dict[Any, Any] = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    return matplotlib.rc_context(rc | {"text.parse_math": False} | settings)
