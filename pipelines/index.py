"""Stage `index`: audit the dataset and write the tables that all later stages start from -> data/<profile>/index."""

from pathlib import Path

from pipelines import stage
from samlove.config import DatasetConfig, load
from samlove.data.digest import folder_digest
from samlove.data.index import audit_folder, write_index
from samlove.data.layout import layout


@stage
def main() -> None:
    out, config = layout().index, load(DatasetConfig)
    audit = audit_folder(Path(config.root), config.check_media, dict(config.policy), config.frames)
    print(audit.render())
    write_index(audit, out)
    for part in ("media", "gt_mask"):
        (out / f"{part}.sha256").write_text(folder_digest(Path(config.root) / part) + "\n")


if __name__ == "__main__":
    main()
