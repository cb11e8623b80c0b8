"""Stage audio: every clip's sound through VGGish into data/features/audio."""

from pathlib import Path

import pandas as pd

from samlove.config import AudioConfig, DatasetConfig, load
from samlove.data.dataset import RefAvsFolder
from samlove.device import default_device
from samlove.errors import one_line_errors
from samlove.features.cluster import chosen_cluster
from samlove.features.encoders.vggish import VggishEncoder
from samlove.features.extract import Job, extract

INDEX = Path("data/index/videos.parquet")
OUT = Path("data/features/audio")
SCRATCH = Path("data/.scratch/audio")
SHARD, BATCH = 1024, 8  # clips: 2.6 MB a shard; 80 patches a batch


def job() -> Job:
    """All that the stage computes, from the index and the active profile."""
    dataset = load(DatasetConfig)
    encoder = VggishEncoder(load(AudioConfig), dataset.frames, default_device())
    folder = RefAvsFolder(dataset.root)
    sources = {m: folder.audio_path(m) for m in pd.read_parquet(INDEX)["media_id"].unique()}
    return Job(encoder, sources, OUT, SCRATCH, SHARD, BATCH)


@one_line_errors
def main() -> None:
    print(f"audio: {extract(job(), chosen_cluster())}")


if __name__ == "__main__":
    main()
