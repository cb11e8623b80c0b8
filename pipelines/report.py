"""Stage `report`: everything a run left behind -> data/report/index.html, one self-contained page."""

from pathlib import Path

from samlove.config import SECTIONS, DatasetConfig, ReportConfig, active_profile, load
from samlove.data.dataset import RefAvsFolder
from samlove.errors import one_line_errors
from samlove.scoring.report import build_report

DATA = Path("data")


@one_line_errors
def main() -> None:
    profile = active_profile()
    present = {name: cls for name, cls in SECTIONS.items() if (Path("configs") / profile / f"{name}.yaml").exists()}
    config = {name: load(cls).model_dump() for name, cls in present.items()}
    page = build_report(DATA, RefAvsFolder(load(DatasetConfig).root), load(ReportConfig).clips, profile, config)
    path = DATA / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    print(f"{path}: {len(page) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
