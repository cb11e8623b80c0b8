"""Stage `audio`: encode the audio of every video with VGGish -> data/<profile>/features/audio."""

import sys

import pandas as pd

from pipelines import stage, wants_rehash
from samlove.config import AudioConfig, DatasetConfig, load
from samlove.data.dataset import RefAvsFolder
from samlove.data.layout import layout
from samlove.device import default_device
from samlove.features.cluster import chosen_cluster
from samlove.features.encoders.base import Sources
from samlove.features.encoders.vggish import VggishEncoder
from samlove.features.extract import Job, extract

NAME = "audio"
SHARD, BATCH = 1024, 8  # videos: 2.6 MB per shard, 80 VGGish patches per batch


def job() -> Job:
    """What the stage computes, from the index and the active profile."""
    paths, dataset = layout(), load(DatasetConfig)
    encoder = VggishEncoder(load(AudioConfig), dataset.frames, default_device())
    folder = RefAvsFolder(dataset.root)
    media_ids = pd.read_parquet(paths.videos, columns=["media_id"])["media_id"].unique()
    sources = Sources(media_ids, folder.audio_path)
    out, scratch = paths.features / NAME, paths.scratch / NAME
    elsewhere = paths.other_stores(NAME)
    return Job(encoder, sources, out, scratch, SHARD, BATCH, elsewhere=elsewhere, hashes=paths.hashes)


@stage
def main(*arguments: str) -> None:
    rehash = wants_rehash(arguments)
    print(f"{NAME}: {extract(job(), chosen_cluster(), rehash)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
