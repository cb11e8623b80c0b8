"""Stage `sam2`: `python -m pipelines.sam2 train|eval`, SAM 2's image embeddings.

train: the frames of the train split that training decodes; only frame 0 unless `train_frames` in sam2.yaml asks for
more -> data/<profile>/features/sam2_train.
eval: all frames of the other splits -> data/<profile>/features/sam2_eval.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from pipelines import REHASH, stage
from samlove.config import DatasetConfig, Sam2Config, load
from samlove.data.dataset import RefAvsFolder
from samlove.data.frames import trained_frames
from samlove.data.layout import layout
from samlove.device import default_device
from samlove.errors import RequestError
from samlove.features.cluster import chosen_cluster
from samlove.features.encoders.base import Sources
from samlove.features.encoders.frames import frame_sources
from samlove.features.encoders.sam2_image import Sam2ImageEncoder
from samlove.features.extract import Job, extract


class Sizes(NamedTuple):
    """Videos per shard, which a worker holds in memory until it writes the shard, and videos per batch."""

    shard: int
    batch: int


# 1.1 and 1.3 GB per shard at the paper's size, post_conv. train: for one frame per video; fewer videos with more.
SIZES = {"train": Sizes(128, 8), "eval": Sizes(16, 1)}


def sizes_of(group: str, config: Sam2Config) -> Sizes:
    """The sizes of `train` or `eval` in this configuration: with more frames per video, as many frames as with one."""
    if group == "eval":
        return SIZES["eval"]
    shard, batch = SIZES["train"]
    return Sizes(max(1, shard // config.train_frames), max(1, batch // config.train_frames))


def job(group: str, config: Sam2Config | None = None, out: Path | None = None) -> Job:
    """What the stage computes for `train` or `eval`, from the index and the active profile, or with another
    configuration and store."""
    paths, dataset, config = layout(), load(DatasetConfig), config or load(Sam2Config)
    encoder = Sam2ImageEncoder(config, default_device())
    videos = pd.read_parquet(paths.videos, columns=["media_id", "split"])
    media_ids = videos.loc[(videos["split"] == "train") == (group == "train"), "media_id"].unique()
    whole = frame_sources(RefAvsFolder(dataset.root), media_ids, dataset.frames)
    if group == "train":
        frames = trained_frames(dataset.frames, config.train_frames)
        sources = Sources(media_ids, lambda media_id: [whole[media_id][t] for t in frames])
    else:
        sources = whole
    name, sizes = f"sam2_{group}", sizes_of(group, config)
    out = out or paths.features / name
    return Job(
        encoder,
        sources,
        out,
        paths.scratch / out.name,
        sizes.shard,
        sizes.batch,
        chunk_rows=1,
        compression=config.compression,
        elsewhere=paths.other_stores(name),
        hashes=paths.hashes,
    )


@stage
def main() -> None:
    groups = [argument for argument in sys.argv[1:] if argument != REHASH]
    if len(groups) != 1 or groups[0] not in SIZES:
        raise RequestError(f"expected one of {', '.join(SIZES)}, found {' '.join(groups) or 'none'}")
    (group,) = groups
    print(f"sam2_{group}: {extract(job(group), chosen_cluster(), rehash=REHASH in sys.argv)}")


if __name__ == "__main__":
    main()
