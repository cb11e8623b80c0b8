"""Stage infer: `python -m pipelines.infer SPLIT`, masks of all frames for every expression of a split."""

import sys
from pathlib import Path

import pandas as pd

from samlove.config import SPLITS, DatasetConfig, InferConfig, load
from samlove.data.dataset import RefAvsFolder
from samlove.device import default_device
from samlove.errors import RequestError, one_line_errors
from samlove.infer import infer

INDEX = Path("data/index/expressions.parquet")
FEATURES = Path("data/features")
CHECKPOINT = Path("data/model/best.safetensors")
OUT = Path("data/predictions")
SCRATCH = Path("data/.scratch/infer")
EVALUATED = SPLITS[1:]  # train has embeddings of frame 0 only


@one_line_errors
def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in EVALUATED:
        raise RequestError(f"expected one split of {', '.join(EVALUATED)}, found {' '.join(sys.argv[1:]) or 'none'}")
    if not INDEX.exists():
        raise RequestError(f"{INDEX}: no such file; make it with: dvc repro index")
    split = sys.argv[1]
    dataset = load(DatasetConfig)
    rows = pd.read_parquet(INDEX)
    counts = infer(
        split,
        rows[rows["split"] == split],
        CHECKPOINT,
        FEATURES,
        RefAvsFolder(dataset.root),
        load(InferConfig),
        dataset.mask_size,
        OUT / split,
        SCRATCH / split,
        default_device(),
    )
    print(f"{split}: " + ", ".join(f"{name} {count} expressions" for name, count in counts.items()))


if __name__ == "__main__":
    main()
