"""Stage `dataset`: write LAVS-synth if the profile has `synth` set, otherwise check that the user's dataset is there.

The output, data/dataset/<profile>, is one that DVC neither deletes nor caches: it may be a link to the user's folder.
"""

from pathlib import Path

from pipelines import stage
from samlove.config import DatasetConfig, load
from samlove.data.dataset import RefAvsFolder
from samlove.synth.write import rewrite_dataset


@stage
def main() -> None:
    config = load(DatasetConfig)
    root = Path(config.root)
    if config.synth is None:
        folder = RefAvsFolder(root)
        folder.check_exists()
        folder.check_links()
        folder.metadata()
    else:
        rewrite_dataset(root, config.synth.seed, config.synth.scale)


if __name__ == "__main__":
    main()
