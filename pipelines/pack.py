"""Stage `pack`: features of train and val, and the masks of the frames that training reads, as WebDataset shards
-> data/<profile>/shards."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from pipelines import stage
from samlove.config import AudioConfig, DatasetConfig, PackConfig, Sam2Config, Section, TextConfig, VisualConfig, load
from samlove.data.dataset import RefAvsFolder
from samlove.data.frames import trained_frames
from samlove.data.layout import layout
from samlove.data.pack import check_asked, is_packed, pack, shards_fingerprint
from stores import FeatureStore
from stores.fingerprint import check_fingerprint

SAM2 = {"train": "sam2_train", "val": "sam2_eval"}  # the feature store with a split's embeddings


@stage
def main() -> None:
    paths = layout()
    stores = {name: paths.features / name for name in ("audio", "visual", "text", *SAM2.values())}
    asked = {"audio": load(AudioConfig), "visual": load(VisualConfig), "text": load(TextConfig)}
    write(stores, asked | {"sam2": load(Sam2Config)}, paths.shards)


def write(stores: Mapping[str, Path], asked: Mapping[str, Section], out: Path, reuse: bool = False) -> None:
    """Pack train and val of the active profile into `out`.

    stores: audio, visual, text, sam2_train and sam2_eval. asked: the sections that they must match. reuse: leave a
    shard set as it is if it was packed from the same stores, rows, frames and masks. Raises as `samlove.data.pack`.
    """
    paths, dataset, config = layout(), load(DatasetConfig), load(PackConfig)
    size = dataset.mask_size
    sam2_config = asked["sam2"]
    assert isinstance(sam2_config, Sam2Config)
    frames = trained_frames(dataset.frames, sam2_config.train_frames)
    rows = pd.read_parquet(paths.expressions)
    opened = {name: FeatureStore.open(path) for name, path in stores.items()}
    for name, store in opened.items():
        if name != "sam2_eval":  # compared with sam2_train below
            section = name.removesuffix("_train")
            check_asked(store, asked[section], section)
    train, val = (opened[SAM2[split]] for split in ("train", "val"))
    check_fingerprint(val.manifest["fingerprint"], train.manifest["fingerprint"], val.path, "dvc repro sam2")
    for split, sam2 in (("train", train), ("val", val)):
        of_split, digest = rows[rows["split"] == split], paths.mask_digest.read_text(encoding="utf-8").strip()
        sources = {**{name: opened[name] for name in ("audio", "visual", "text")}, "sam2": sam2}
        if reuse and is_packed(out / split, shards_fingerprint(of_split, sources, size, digest, frames)):
            print(f"{split}: packed already")
            continue
        folder, per_shard = RefAvsFolder(dataset.root), config.videos_per_shard
        stored = frames if split == "train" else None  # the store of val has all frames
        packed = pack(out / split, of_split, sources, folder, size, per_shard, digest, frames, stored)
        print(f"{split}: {packed}")


if __name__ == "__main__":
    main()
