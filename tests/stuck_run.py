"""A training run in which a sample of the second step never comes: python -m tests.stuck_run SAM2 SCRATCH WORKERS.

Prints a line after the first step.
"""

import sys
import time
from pathlib import Path

import torch
from dvclive import Live

from samlove.errors import one_line_errors
from samlove.train import Trainer
from tests.tiny_training import Items, order, origin, samples


class StuckItems(Items):
    def __getitem__(self, index: int) -> dict:
        if index == order(0)[8]:
            time.sleep(3600)
        return super().__getitem__(index)


if __name__ == "__main__":
    sam2, scratch, workers = sys.argv[1:]
    start = origin(Path(sam2), workers=int(workers))
    torch.manual_seed(start.train.seed)
    trainer = Trainer(start.build(), start, samples(StuckItems(10, seed=1)), torch.device("cpu"), Path(scratch))
    trainer.optimizer.parts[0].register_step_post_hook(lambda *_: print("first step", flush=True))
    with Live(f"{scratch}_live", save_dvc_exp=False, dvcyaml=None) as live:
        one_line_errors(trainer.run)(live)
