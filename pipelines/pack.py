"""Stage pack: feature stores and first-frame masks of the train and val splits into WebDataset shards."""

from pathlib import Path

import pandas as pd

from samlove.config import AudioConfig, DatasetConfig, PackConfig, Sam2Config, TextConfig, VisualConfig, load
from samlove.data.dataset import RefAvsFolder
from samlove.data.pack import check_asked, pack
from samlove.errors import one_line_errors
from stores import FeatureStore
from stores.fingerprint import check_fingerprint

INDEX = Path("data/index/expressions.parquet")
MASKS = Path("data/index/gt_mask.sha256")
FEATURES = Path("data/features")
OUT = Path("data/shards")
SAM2 = {"train": "sam2_train", "val": "sam2_eval"}  # the store that holds a split's embeddings


@one_line_errors
def main() -> None:
    dataset, config = load(DatasetConfig), load(PackConfig)
    rows = pd.read_parquet(INDEX)
    shared = {name: FeatureStore.open(FEATURES / name) for name in ("audio", "visual", "text")}
    sam2 = {split: FeatureStore.open(FEATURES / name) for split, name in SAM2.items()}
    check_asked(shared["audio"], load(AudioConfig), "audio")
    check_asked(shared["visual"], load(VisualConfig), "visual")
    check_asked(shared["text"], load(TextConfig), "text")
    check_asked(sam2["train"], load(Sam2Config), "sam2@train")
    check_fingerprint(
        sam2["val"].manifest["fingerprint"],
        sam2["train"].manifest["fingerprint"],
        sam2["val"].path,
        "dvc repro sam2@train sam2@eval",
    )
    for split, store in sam2.items():
        packed = pack(
            OUT / split,
            rows[rows["split"] == split],
            {**shared, "sam2": store},
            RefAvsFolder(dataset.root),
            dataset.mask_size,
            config.videos_per_shard,
            MASKS.read_text().strip(),
        )
        print(f"{split}: {packed}")


if __name__ == "__main__":
    main()
