"""Stage `train`: train on the shards -> data/<profile>/model and data/<profile>/dvclive; resumes an interrupted run.

With more than one GPU, it starts one process per GPU by torchrun (`processes` in train.yaml). It can also be started by
torchrun itself, for example on several machines: docs/cluster.md.
"""

import sys
from pathlib import Path

from pipelines import stage
from samlove.config import FusionConfig, Sam2Config, TrainConfig, load
from samlove.data.layout import layout
from samlove.device import default_device
from samlove.environment import check_repository
from samlove.model.processes import OtherFailed, Processes, joined, launch, processes_to_start
from samlove.train import prepare, train


@stage
def main() -> None:
    if Path(".dvc").is_dir():
        check_repository()  # DVCLive reads the commit
    config = load(TrainConfig)
    if (count := processes_to_start(config.processes)) > 1:
        launch("pipelines.train", count)
        return
    try:
        with joined() as processes:
            run(config, processes)
    except OtherFailed as error:  # the other process has printed it
        sys.exit(error.exit_status)


def run(config: TrainConfig, processes: Processes) -> None:
    paths, device = layout(), default_device()
    say = print if processes.first else str
    origin, samples = prepare(paths.shards, load(FusionConfig), config, load(Sam2Config), device, say)
    try:
        train(origin, samples, device, paths.checkpoint, paths.live, paths.scratch / "train", processes=processes)
    except KeyboardInterrupt:
        if processes.count > 1:  # the process that started them says so
            sys.exit(1)
        raise


if __name__ == "__main__":
    main()
