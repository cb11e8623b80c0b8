"""Stage `report`: one self-contained page about a run -> data/<profile>/report/index.html."""

from pipelines import stage
from samlove.config import SECTIONS, AblationsConfig, DatasetConfig, ReportConfig, active_profile, load
from samlove.data.dataset import RefAvsFolder
from samlove.data.layout import layout
from samlove.scoring.report import build_report
from stores.manifest import replace_folder


@stage
def main() -> None:
    profile, paths = active_profile(), layout()
    config = {name: load(cls).model_dump() for name, cls in SECTIONS.items() if cls is not AblationsConfig}
    page = build_report(paths.root, RefAvsFolder(load(DatasetConfig).root), load(ReportConfig).clips, profile, config)
    path = paths.report
    new = path.parent.with_name(f"{path.parent.name}.partial")
    new.mkdir(parents=True, exist_ok=True)
    (new / path.name).write_text(page, encoding="utf-8")
    replace_folder(new, path.parent)
    print(f"{path}: {len(page) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
