"""Stage `visual`: encode the frames of every video with a model of timm or CLIP -> data/<profile>/features/visual."""

import sys
from pathlib import Path

import pandas as pd

from pipelines import stage, wants_rehash
from samlove.config import DatasetConfig, VisualConfig, load
from samlove.data.dataset import RefAvsFolder
from samlove.data.layout import layout
from samlove.device import default_device
from samlove.features.cluster import chosen_cluster
from samlove.features.encoders.frames import frame_sources
from samlove.features.encoders.visual import ENCODERS
from samlove.features.extract import Job, extract

NAME = "visual"
SHARD, BATCH = 128, 4  # videos: 0.4 GB per shard at the paper's size, 40 frames per batch


def job(config: VisualConfig | None = None, out: Path | None = None) -> Job:
    """What the stage computes, from the index and the active profile, or with another configuration and store."""
    paths, dataset, config = layout(), load(DatasetConfig), config or load(VisualConfig)
    encoder = ENCODERS[config.encoder](config, default_device())
    media_ids = pd.read_parquet(paths.videos, columns=["media_id"])["media_id"].unique()
    sources = frame_sources(RefAvsFolder(dataset.root), media_ids, dataset.frames)
    out = out or paths.features / NAME
    elsewhere = paths.other_stores(NAME)
    return Job(encoder, sources, out, paths.scratch / out.name, SHARD, BATCH, elsewhere=elsewhere, hashes=paths.hashes)


@stage
def main(*arguments: str) -> None:
    rehash = wants_rehash(arguments)
    print(f"{NAME}: {extract(job(), chosen_cluster(), rehash)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
