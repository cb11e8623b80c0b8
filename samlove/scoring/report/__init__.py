"""The report of a run: `build_report` makes the page, and the other modules make its parts."""

from samlove.scoring.report.page import build_report

__all__ = ["build_report"]
