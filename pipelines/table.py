"""No stage: print the result table of the last run and where its report lies."""

import json
from pathlib import Path

from samlove.errors import RequestError, one_line_errors
from samlove.scoring.evaluate import render_table

METRICS, DETAILS, REPORT = (
    Path("data/metrics.json"),
    Path("data/evaluation/details.json"),
    Path("data/report/index.html"),
)


@one_line_errors
def main() -> None:
    for path in (METRICS, DETAILS, REPORT):
        if not path.exists():
            raise RequestError(f"{path}: no such file; make it with: dvc repro")
    print(f"\n{render_table(json.loads(METRICS.read_text()), json.loads(DETAILS.read_text()))}\n")
    print(f"report: {REPORT.resolve()}")


if __name__ == "__main__":
    main()
