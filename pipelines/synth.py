"""Stage synth (profile micro only): write LAVS-synth, the embedded data set, in the Ref-AVS layout."""

from pathlib import Path

from samlove.config import DatasetConfig, SynthConfig, load
from samlove.errors import one_line_errors
from samlove.synth.write import write_dataset


@one_line_errors
def main() -> None:
    config = load(SynthConfig)
    write_dataset(Path(load(DatasetConfig).root), config.seed, config.scale)


if __name__ == "__main__":
    main()
