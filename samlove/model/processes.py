"""The processes of one training run, one per GPU, as torchrun starts them.

Each process computes the gradients of its share of a step's samples. `Processes.sum_gradients` adds them up in one
all-reduce per optimiser step. This is simpler than torch's DistributedDataParallel, and exact where that class is not:
DistributedDataParallel averages over processes, whose shares differ in size if the samples of a step do not divide, and
it needs every process in every backward pass, although a process has no sample if a step has fewer than processes.

If a process fails, the others end with its error (`OtherFailed`): it leaves the error in torchrun's store, and its end
closes the connections on which they wait.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from dask.system import CPU_COUNT
from torch.distributed.rendezvous import rendezvous

from samlove.errors import RequestError, SamloveError, os_error_line

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of torchrun
FAILED = "samlove/failed"  # key of the store: the first error of any process
LEAVING, LEFT = "samlove/leaving", "samlove/left"  # keys of the store: how many are about to end; whether all are
LEAVE = timedelta(seconds=30)  # the longest wait for the others at the end
AGAIN = "run the same command again to resume"
T = TypeVar("T")


class OtherFailed(SamloveError):
    """Another process of the run failed, and has printed its error."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


@dataclass(frozen=True)
class Processes:
    """The place of this process in its run; by default, it is the only one."""

    rank: int = 0
    count: int = 1
    on_machine: int = 1  # how many of them run on this machine
    store: dist.Store | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows the progress."""
        return self.rank == 0

    def exchange(self, mine: T) -> list[T]:
        """What each process passes, in order of rank; waits for all of them. Raises OtherFailed, SamloveError."""
        if self.count == 1:
            return [mine]
        found: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(found, mine)
        except RuntimeError as error:
            raise self._lost(error) from error
        return found

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Set each gradient to the sum over all processes; no gradient counts as 0. Raises OtherFailed, SamloveError.

        Every process must pass the same parameters, on one device.
        """
        if self.count == 1:
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        try:
            dist.all_reduce(flat)
        except RuntimeError as error:
            raise self._lost(error) from error
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def _lost(self, error: RuntimeError) -> SamloveError:
        with suppress(RuntimeError):  # the store is gone, too
            if self.store is not None and self.store.check([FAILED]):
                return OtherFailed(**json.loads(self.store.get(FAILED)))
        return SamloveError(
            f"process {self.rank} of {self.count}: lost contact with another one ({_line(error)}); {AGAIN}"
        )


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this run, if torchrun started this one; `ALONE` otherwise. They leave the block together.

    Selects the GPU of this process. An exception of the block is what the other processes end with. Raises SamloveError
    if the processes cannot connect.
    """
    if not _in_torchrun() or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        store, rank, count = next(iter(rendezvous("env://")))
        # Objects are exchanged over gloo, gradients on GPUs over NCCL.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=count)
    except RuntimeError as error:
        raise SamloveError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: cannot connect to the others "
            f"({_line(error)}); check the network between the machines, and torchrun's --rdzv-endpoint"
        ) from error
    processes = Processes(rank, count, int(os.environ["LOCAL_WORLD_SIZE"]), store)
    try:
        try:
            yield processes
            processes.exchange(None)
        except (KeyboardInterrupt, SystemExit):  # in all processes
            _leave_together(store, count)
            raise
        _leave_together(store, count)
    except Exception as error:
        status = error.exit_status if isinstance(error, SamloveError) else 1
        text = os_error_line(error) if isinstance(error, OSError) else str(error) or type(error).__name__
        with suppress(RuntimeError):  # the store is gone
            store.compare_set(FAILED, "", json.dumps({"message": f"process {rank}: {text}", "exit_status": status}))
        raise
    dist.destroy_process_group()


def _leave_together(store: dist.Store, count: int) -> None:
    """Wait until all processes are here: one that ended first would break connections that others still read."""
    with suppress(RuntimeError):  # nothing is left to do, so it does not matter that another one has gone
        if store.add(LEAVING, 1) == count:
            store.set(LEFT, "")
        store.wait([LEFT], LEAVE)


def _in_torchrun() -> bool:
    return all(name in os.environ for name in VARIABLES)


def _line(error: RuntimeError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def processes_to_start(asked: int | None) -> int:
    """How many processes a run needs that torchrun has not started: `asked`, or one per visible GPU; at least 1.

    1 within a process that torchrun started. Raises RequestError if there are GPUs, but fewer than `asked`.
    """
    if _in_torchrun():
        return 1
    gpus = torch.cuda.device_count()
    if gpus and asked and asked > gpus:
        raise RequestError(
            f"train.yaml: processes: expected at most one per visible GPU ({gpus}), found {asked}; to use all GPUs, "
            "leave processes out"
        )
    return asked or max(1, gpus)


def launch(module: str, count: int) -> None:
    """Run `python -m module` in `count` processes of this machine by torchrun, and wait for all of them.

    Ends this process with the exit status of one that failed, which has printed its error. Raises SamloveError if one
    was killed, KeyboardInterrupt on SIGINT or SIGTERM, after all processes have ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CPU_COUNT // count)))
    logging.disable()  # torchrun's own account of a failure, which would follow the error
    try:
        with TemporaryDirectory(prefix="samlove-torchrun-") as logs:
            run(parse_args(["--standalone", "--nproc-per-node", str(count), "--log-dir", logs, "-m", module]))
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        statuses = {rank: failure.exitcode for rank, failure in error.failures.items()}
        for rank, status in statuses.items():
            if status < 0 and -status != signal.SIGTERM:  # which torchrun sends to the other processes
                raise SamloveError(
                    f"process {rank} of {count} was killed by {signal.Signals(-status).name}, often because memory ran "
                    f"out; {AGAIN}"
                ) from None
        sys.exit(max(1, *statuses.values()))
