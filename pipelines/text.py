"""Stage text: every different expression through RoBERTa, or CLIP's text tower, into data/features/text."""

from pathlib import Path

import pandas as pd

from samlove.config import TextConfig, load
from samlove.device import default_device
from samlove.errors import one_line_errors
from samlove.features.cluster import chosen_cluster
from samlove.features.encoders.clip_text import ClipTextEncoder
from samlove.features.encoders.roberta import RobertaEncoder
from samlove.features.extract import Job, extract

INDEX = Path("data/index/expressions.parquet")
OUT = Path("data/features/text")
SCRATCH = Path("data/.scratch/text")
ENCODERS = {"roberta": RobertaEncoder, "clip": ClipTextEncoder}
SHARD, BATCH = 1024, 64  # texts: 39 MB a shard at the paper's size


def job() -> Job:
    """All that the stage computes, from the index and the active profile."""
    config = load(TextConfig)
    encoder = ENCODERS[config.encoder](config, default_device())
    sources = {text: text for text in pd.read_parquet(INDEX)["exp"].unique()}  # normalised by the index
    return Job(encoder, sources, OUT, SCRATCH, SHARD, BATCH)


@one_line_errors
def main() -> None:
    print(f"text: {extract(job(), chosen_cluster())}")


if __name__ == "__main__":
    main()
