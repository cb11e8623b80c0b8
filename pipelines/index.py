"""Stage index: audit the dataset's folder and write the tables that every later stage starts from."""

from pathlib import Path

from samlove.config import DatasetConfig, load
from samlove.data.digest import folder_digest
from samlove.data.index import audit_folder, write_index
from samlove.errors import one_line_errors

OUT = Path("data/index")


@one_line_errors
def main() -> None:
    config = load(DatasetConfig)
    audit = audit_folder(Path(config.root), config.check_media, dict(config.policy), config.frames)
    print(audit.render())
    write_index(audit, OUT)
    for part in ("media", "gt_mask"):
        (OUT / f"{part}.sha256").write_text(folder_digest(Path(config.root) / part) + "\n")


if __name__ == "__main__":
    main()
