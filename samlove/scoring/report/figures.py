"""Matplotlib for the report, as it is delivered: no variable, matplotlibrc or style of the user's affects a figure."""

import os
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

_BACKEND = os.environ.pop("MPLBACKEND", None)  # matplotlib cannot be imported if this is the name of an unknown backend
try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import findSystemFonts
    from matplotlib.ft2font import FT2Font
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator
finally:
    if _BACKEND is not None:
        os.environ["MPLBACKEND"] = _BACKEND

__all__ = ["Axes", "Figure", "FigureCanvasAgg", "MaxNLocator", "Rectangle", "font_with", "plain_style"]

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # comes with matplotlib


def plain_style(settings: dict[str, Any]) -> AbstractContextManager[None]:
    """Matplotlib's defaults and `settings` while the block runs; text between $ is text, not a formula.

    Make figures with `Figure`: pyplot would load the user's backend.
    """
    rc: dict[Any, Any] = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    return matplotlib.rc_context(rc | {"text.parse_math": False} | settings)


@cache
def font_with(character: str) -> str:
    """The file of a font with this character: FONT or, if it has none, a font of the system; FONT if none has it."""
    if _has(str(FONT), character):
        return str(FONT)
    return next((path for path in sorted(findSystemFonts()) if _has(path, character)), str(FONT))


def _has(path: str, character: str) -> bool:
    try:
        font = FT2Font(path)
    except Exception:  # fonts of pixels, damaged ones: matplotlib raises all kinds
        return False
    return bool(font.scalable and font.get_char_index(ord(character)))
