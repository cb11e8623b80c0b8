"""Stage `index`: audit the dataset and write the tables that all later stages start from -> data/<profile>/index."""

import sys
from pathlib import Path

from pipelines import stage, wants_rehash
from samlove.config import DatasetConfig, load
from samlove.data.hashes import FileHashes
from samlove.data.index import audit_folder, write_index
from samlove.data.layout import layout


@stage
def main(*arguments: str) -> None:
    rehash = wants_rehash(arguments)
    paths, config = layout(), load(DatasetConfig)
    audit = audit_folder(Path(config.root), config.check_media, dict(config.policy), config.frames)
    print(audit.render())
    with FileHashes(paths.hashes, rehash) as hashes:
        write_index(audit, paths.index, hashes)


if __name__ == "__main__":
    main(*sys.argv[1:])
