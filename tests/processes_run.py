"""A tiny training run in several processes, for tests. They are forked from one that has imported torch."""

import json
import multiprocessing
import os
import resource
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dvclive import Live

from samlove.errors import SamloveError
from samlove.model.processes import joined
from samlove.train import Trainer
from tests.tiny_training import Items, origin, samples

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "torch._dynamo"])  # the optimiser imports torch._dynamo


@dataclass(frozen=True)
class Case:
    sam2: Path
    root: Path
    settings: dict[str, Any] = field(default_factory=dict)
    broken: int | None = None  # this item has a feature that is not a number
    reads: int = 0  # the process `of` gets a signal when it reads an item of `split` for the n-th time
    of: int = 0
    number: int = signal.SIGTERM
    split: str = "train"
    apart: bool = False  # the second process has a scratch folder of its own, as on a disk that is not shared
    file_limit: int | None = None  # bytes that a file of the first process may have; simulates a full disk


class Recorded(Items):
    """Items that remember which of them were read."""

    def __init__(self, count: int, seed: int, case: Case, kills: bool) -> None:
        super().__init__(count, seed)
        self.case, self.kills, self.read = case, kills, list[int]()

    def __getitem__(self, index: int) -> dict:
        self.read.append(index)
        if self.kills and len(self.read) == self.case.reads:
            os.kill(os.getpid(), self.case.number)
        item = super().__getitem__(index)
        if index == self.case.broken:
            item["visual"][0, 1] = float("nan")
        return item


def train_in(case: Case, count: int) -> list[dict[str, Any]]:
    """Run `case` in `count` processes -> of each, its exit status (None if it hung), its error and the items it read.

    A killed process leaves only its status.
    """
    # As torchrun does, this process holds the store, which outlives the others.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    case.root.mkdir(exist_ok=True)
    for path in case.root.glob("rank*.json"):
        path.unlink()
    ranks = [FORKS.Process(target=_work, args=(case, rank, count, store.port)) for rank in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    found = []
    for rank, process in enumerate(ranks):
        if hung := process.is_alive():
            process.kill()
            process.join()
        said = case.root / f"rank{rank}.json"
        told = json.loads(said.read_text()) if said.exists() else {}
        found.append({"status": None if hung else process.exitcode, **told})
    return found


def new_trainer(case: Case, train: Items | None = None, **settings: Any) -> Trainer:
    """The trainer of a case. settings: `val` and `processes`; by default, this process alone."""
    rank = settings["processes"].rank if "processes" in settings else 0
    start = origin(case.sam2, **case.settings)
    torch.manual_seed(start.train.seed)
    scratch = case.root / ("scratch1" if case.apart and rank == 1 else "scratch")
    data = samples(train, settings.pop("val", None) or Items(5, seed=2))
    return Trainer(start.build(), start, data, torch.device("cpu"), scratch, **settings)


def _work(case: Case, rank: int, count: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    os.chdir(case.root)  # DVCLive opens the repository of its folder, whose database may exceed the file limit
    kills = rank == case.of
    items = {
        "train": Recorded(10, 1, case, kills and case.split == "train"),
        "val": Recorded(5, 2, case, kills and case.split == "val"),
    }
    if case.file_limit is not None and rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.file_limit, case.file_limit))
    told: dict[str, Any] = {}
    status = 0
    try:
        with joined() as processes:
            trainer = new_trainer(case, items["train"], val=items["val"], processes=processes)
            if processes.first:
                with Live(str(case.root / "live"), save_dvc_exp=False, dvcyaml=None) as live:
                    trainer.run(live)
            else:
                trainer.run(None)
    except (SamloveError, OSError, KeyboardInterrupt) as error:
        told |= {"error": type(error).__name__, "text": str(error)}
        status = getattr(error, "exit_status", 1)
    told |= {"train": items["train"].read, "val": items["val"].read}
    (case.root / f"rank{rank}.json").write_text(json.dumps(told))
    os._exit(status)  # closes the connections at once
