"""Stage `text`: encode every distinct expression with a text encoder -> data/<profile>/features/text."""

import sys
from pathlib import Path

import pandas as pd

from pipelines import stage, wants_rehash
from samlove.config import TextConfig, load
from samlove.data.layout import layout
from samlove.device import default_device
from samlove.features.cluster import chosen_cluster
from samlove.features.encoders.base import Sources
from samlove.features.encoders.text import TextEncoder
from samlove.features.extract import Job, extract

NAME = "text"
SHARD, BATCH = 1024, 64  # expressions: 39 MB per shard at the paper's size


def job(config: TextConfig | None = None, out: Path | None = None) -> Job:
    """What the stage computes, from the index and the active profile, or with another configuration and store."""
    paths, config = layout(), config or load(TextConfig)
    encoder = TextEncoder(config, default_device())
    texts = pd.read_parquet(paths.expressions, columns=["exp"])["exp"].unique()  # normalised by the index
    sources = Sources(texts, str)
    out = out or paths.features / NAME
    elsewhere = paths.other_stores(NAME)
    return Job(encoder, sources, out, paths.scratch / out.name, SHARD, BATCH, elsewhere=elsewhere, hashes=paths.hashes)


@stage
def main(*arguments: str) -> None:
    rehash = wants_rehash(arguments)
    print(f"{NAME}: {extract(job(), chosen_cluster(), rehash)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
