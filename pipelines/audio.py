"""Stage `audio`: encode the audio of every video with VGGish or another encoder -> data/<profile>/features/audio."""

import sys
from pathlib import Path

import pandas as pd

from pipelines import stage, wants_rehash
from samlove.config import AudioConfig, DatasetConfig, load
from samlove.data.dataset import RefAvsFolder
from samlove.data.layout import layout
from samlove.device import default_device
from samlove.features.cluster import chosen_cluster
from samlove.features.encoders.audio import ENCODERS
from samlove.features.encoders.base import Sources
from samlove.features.extract import Job, extract

NAME = "audio"
SHARD, BATCH = 1024, 8  # videos: 2.6 MB per shard, 80 VGGish patches per batch


def job(config: AudioConfig | None = None, out: Path | None = None) -> Job:
    """What the stage computes, from the index and the active profile, or with another configuration and store."""
    paths, dataset, config = layout(), load(DatasetConfig), config or load(AudioConfig)
    encoder = ENCODERS[config.encoder](config, dataset.frames, default_device())
    folder = RefAvsFolder(dataset.root)
    media_ids = pd.read_parquet(paths.videos, columns=["media_id"])["media_id"].unique()
    sources = Sources(media_ids, folder.audio_path)
    out = out or paths.features / NAME
    elsewhere = paths.other_stores(NAME)
    return Job(encoder, sources, out, paths.scratch / out.name, SHARD, BATCH, elsewhere=elsewhere, hashes=paths.hashes)


@stage
def main(*arguments: str) -> None:
    rehash = wants_rehash(arguments)
    print(f"{NAME}: {extract(job(), chosen_cluster(), rehash)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
