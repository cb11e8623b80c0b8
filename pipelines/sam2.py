"""Stage sam2: `python -m pipelines.sam2 train|eval`, SAM2's image embeddings into data/features/sam2_{train,eval}.

train: frame 0 of the train split, all that training decodes. eval: all frames of the other splits.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from samlove.config import DatasetConfig, Sam2Config, load
from samlove.data.dataset import RefAvsFolder
from samlove.device import default_device
from samlove.errors import RequestError, one_line_errors
from samlove.features.cluster import chosen_cluster
from samlove.features.encoders.frames import frame_sources
from samlove.features.encoders.sam2_image import Sam2ImageEncoder
from samlove.features.extract import Job, extract

INDEX = Path("data/index/videos.parquet")
FEATURES = Path("data/features")
SCRATCH = Path("data/.scratch")


class Sizes(NamedTuple):
    """Clips a shard, which is held in memory until it is written, and clips a batch."""

    shard: int
    batch: int


SIZES = {"train": Sizes(128, 8), "eval": Sizes(16, 1)}  # 1.1 and 1.3 GB a shard at the paper's size, post_conv


def job(group: str) -> Job:
    """All that the stage computes for `train` or `eval`, from the index and the active profile."""
    dataset = load(DatasetConfig)
    config = load(Sam2Config)
    encoder = Sam2ImageEncoder(config, default_device())
    videos = pd.read_parquet(INDEX)
    media_ids = videos.loc[(videos["split"] == "train") == (group == "train"), "media_id"].unique()
    frames = 1 if group == "train" else dataset.frames
    sources = frame_sources(RefAvsFolder(dataset.root), media_ids, frames)
    out, scratch = FEATURES / f"sam2_{group}", SCRATCH / f"sam2_{group}"
    return Job(encoder, sources, out, scratch, *SIZES[group], chunk_rows=1, compression=config.compression)


@one_line_errors
def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in SIZES:
        raise RequestError(f"expected one of {', '.join(SIZES)}, found {' '.join(sys.argv[1:]) or 'none'}")
    group = sys.argv[1]
    print(f"sam2_{group}: {extract(job(group), chosen_cluster())}")


if __name__ == "__main__":
    main()
