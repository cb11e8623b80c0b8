"""Stage `pack`: features and first-frame masks of train and val as WebDataset shards -> data/<profile>/shards."""

import pandas as pd

from pipelines import stage
from samlove.config import AudioConfig, DatasetConfig, PackConfig, Sam2Config, TextConfig, VisualConfig, load
from samlove.data.dataset import RefAvsFolder
from samlove.data.layout import layout
from samlove.data.pack import check_asked, pack
from stores import FeatureStore
from stores.fingerprint import check_fingerprint

SAM2 = {"train": "sam2_train", "val": "sam2_eval"}  # the feature store with a split's embeddings


@stage
def main() -> None:
    paths, dataset, config = layout(), load(DatasetConfig), load(PackConfig)
    rows = pd.read_parquet(paths.expressions)
    shared = {name: FeatureStore.open(paths.features / name) for name in ("audio", "visual", "text")}
    sam2 = {split: FeatureStore.open(paths.features / name) for split, name in SAM2.items()}
    check_asked(shared["audio"], load(AudioConfig), "audio")
    check_asked(shared["visual"], load(VisualConfig), "visual")
    check_asked(shared["text"], load(TextConfig), "text")
    check_asked(sam2["train"], load(Sam2Config), "sam2")
    check_fingerprint(
        sam2["val"].manifest["fingerprint"],
        sam2["train"].manifest["fingerprint"],
        sam2["val"].path,
        "dvc repro sam2",
    )
    for split, store in sam2.items():
        packed = pack(
            paths.shards / split,
            rows[rows["split"] == split],
            {**shared, "sam2": store},
            RefAvsFolder(dataset.root),
            dataset.mask_size,
            config.videos_per_shard,
            paths.mask_digest.read_text(encoding="utf-8").strip(),
        )
        print(f"{split}: {packed}")


if __name__ == "__main__":
    main()
