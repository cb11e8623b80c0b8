"""Stage `train`: train on the shards -> data/<profile>/model and data/<profile>/dvclive; resumes an interrupted run."""

from pathlib import Path

from pipelines import stage
from samlove.config import FusionConfig, Sam2Config, TrainConfig, load
from samlove.data.layout import layout
from samlove.device import default_device
from samlove.environment import check_repository
from samlove.train import prepare, train


@stage
def main() -> None:
    if Path(".dvc").is_dir():
        check_repository()  # DVCLive reads the commit
    paths, device = layout(), default_device()
    origin, samples = prepare(paths.shards, load(FusionConfig), load(TrainConfig), load(Sam2Config), device)
    train(origin, samples, device, paths.checkpoint, paths.live, paths.scratch / "train")


if __name__ == "__main__":
    main()
