"""Stage `train`: train on the shards -> data/<profile>/model and data/<profile>/dvclive; resumes an interrupted run."""

from pathlib import Path

from pipelines import stage
from samlove.config import FusionConfig, Sam2Config, TrainConfig, load
from samlove.data.layout import layout
from samlove.data.loader import ExpressionDataset, PoolSampler, collate, make_resident
from samlove.device import default_device
from samlove.environment import check_repository
from samlove.model.checkpoint import Origin
from samlove.model.sam2_build import checkpoint_path
from samlove.train import Samples, train
from stores.fingerprint import check_fingerprint, sha256_file


@stage
def main() -> None:
    if Path(".dvc").is_dir():
        check_repository()  # DVCLive reads the commit
    paths, config, sam2 = layout(), load(TrainConfig), load(Sam2Config)
    shards = {split: paths.shards / split for split in ("train", "val")}
    train_set, val_set = ExpressionDataset(shards["train"]), ExpressionDataset(shards["val"])
    features = train_set.features
    check_fingerprint(val_set.made_from, train_set.made_from, shards["val"], "dvc repro pack")
    origin = Origin(
        fusion=load(FusionConfig),
        train=config,
        sam2=sam2,
        sam2_sha256=sha256_file(checkpoint_path(sam2.checkpoint)),
        dims=train_set.dims,
        features=features,
        shards={"train": train_set.id, "val": val_set.id},
    )
    wanted = {"weights_sha256": origin.sam2_sha256, "cache_point": sam2.cache_point}
    found = {name: features["sam2"].get(name) for name in wanted}
    check_fingerprint(found, wanted, f"{shards['train']}: its SAM 2 embeddings", "dvc repro pack")
    videos = train_set.videos
    device = default_device()
    resident = make_resident([train_set, val_set], config.resident, device)
    samples = Samples(
        train_set,
        val_set,
        collate,
        order=lambda epoch: PoolSampler(videos, config.pool, config.seed, epoch).order(),
        on_gpu=resident == "gpu",
    )
    train(origin, samples, device, paths.checkpoint, paths.live, paths.scratch / "train")


if __name__ == "__main__":
    main()
