"""Stage `infer`: `python -m pipelines.infer SPLIT`, masks of all frames -> data/<profile>/predictions/SPLIT."""

import sys

import pandas as pd

from pipelines import stage
from samlove.config import SPLITS, DatasetConfig, InferConfig, load
from samlove.data.dataset import RefAvsFolder
from samlove.data.layout import layout
from samlove.device import default_device
from samlove.errors import RequestError
from samlove.infer import Sources, infer

EVALUATED = SPLITS[1:]  # train has embeddings of the trained frames only


@stage
def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in EVALUATED:
        raise RequestError(f"expected one split of {', '.join(EVALUATED)}, found {' '.join(sys.argv[1:]) or 'none'}")
    paths = layout()
    if not paths.expressions.exists():
        raise RequestError(f"{paths.expressions}: no such file; run: dvc repro index")
    split = sys.argv[1]
    dataset = load(DatasetConfig)
    rows = pd.read_parquet(paths.expressions)
    counts = infer(
        split,
        rows[rows["split"] == split],
        paths.checkpoint,
        Sources.open(paths.features),
        RefAvsFolder(dataset.root),
        load(InferConfig),
        dataset.mask_size,
        paths.predictions / split,
        paths.scratch / "infer" / split,
        default_device(),
    )
    print(f"{split}: " + ", ".join(f"{name} {count} expressions" for name, count in counts.items()))


if __name__ == "__main__":
    main()
