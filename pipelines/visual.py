"""Stage visual: every clip's frames through ViT, or CLIP's image tower, into data/features/visual."""

from pathlib import Path

import pandas as pd

from samlove.config import DatasetConfig, VisualConfig, load
from samlove.data.dataset import RefAvsFolder
from samlove.device import default_device
from samlove.errors import one_line_errors
from samlove.features.cluster import chosen_cluster
from samlove.features.encoders.clip_image import ClipImageEncoder
from samlove.features.encoders.frames import frame_sources
from samlove.features.encoders.vit import VitEncoder
from samlove.features.extract import Job, extract

INDEX = Path("data/index/videos.parquet")
OUT = Path("data/features/visual")
SCRATCH = Path("data/.scratch/visual")
ENCODERS: dict[str, type[VitEncoder] | type[ClipImageEncoder]] = {"vit": VitEncoder, "clip": ClipImageEncoder}
SHARD, BATCH = 128, 4  # clips: 0.4 GB a shard at the paper's size; 40 frames a batch


def job() -> Job:
    """All that the stage computes, from the index and the active profile."""
    config, dataset = load(VisualConfig), load(DatasetConfig)
    encoder = ENCODERS[config.encoder](config, default_device())
    media_ids = pd.read_parquet(INDEX)["media_id"].unique()
    sources = frame_sources(RefAvsFolder(dataset.root), media_ids, dataset.frames)
    return Job(encoder, sources, OUT, SCRATCH, SHARD, BATCH)


@one_line_errors
def main() -> None:
    print(f"visual: {extract(job(), chosen_cluster())}")


if __name__ == "__main__":
    main()
