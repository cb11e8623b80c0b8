"""The Dask cluster of feature stages and ablation runs: workers on this machine, of a scheduler, or SLURM jobs.

`SAMLOVE_CLUSTER=NAME` selects configs/cluster/NAME.yaml; the default is `local`. The cluster does not affect what is
computed, so it is not a parameter of any stage. Only the number of torch threads affects the last bits of the results.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, TypeVar

import dask
import torch
from dask.system import CPU_COUNT
from distributed import Client, Future, Nanny, Scheduler, SpecCluster, Worker, wait

from samlove.config import ClusterConfig, LocalConfig, SchedulerConfig, SlurmConfig, load_cluster
from samlove.errors import RequestError, SamloveError
from samlove.features.worker import TASKS

LOOPBACK = "127.0.0.1"
DASHBOARD = f"{LOOPBACK}:8787"  # another port if this one is taken
CORES_PER_WORKER = 4  # without a GPU: more threads barely speed up one encoder, more workers need more memory
QUIET = logging.CRITICAL  # the run reports a task's error as one line; Dask's own log would precede it
LOGGED = 10  # messages, each with the sources of a shard, that Dask keeps in its logs; by default 1,000
CONNECT_S = 10  # time limit for a scheduler to answer

LOCAL = LocalConfig(kind="local")
Item = TypeVar("Item")


def chosen_cluster() -> ClusterConfig:
    """The configuration that SAMLOVE_CLUSTER names. Raises RequestError if it is missing or invalid."""
    return load_cluster(os.environ.get("SAMLOVE_CLUSTER", "local"))


@contextmanager
def connect(
    config: ClusterConfig, cores: int = CORES_PER_WORKER, tasks: int = TASKS, most: int | None = None
) -> Iterator[tuple[Client, int | None]]:
    """A client of the cluster, which is started if necessary, and the number of torch threads per worker.

    cores, tasks: per worker of this machine without a GPU; tasks also per SLURM job. most: workers of this machine.
    Raises SamloveError if no scheduler answers; RequestError if the slurm extra is not installed or an option of
    slurm.yaml is invalid.
    """
    with dask.config.set({"distributed.admin.low-level-log-length": LOGGED}):
        if isinstance(config, SchedulerConfig):
            with _client(config.address, config.address) as client:
                yield client, config.threads
        elif isinstance(config, SlurmConfig):
            with slurm_cluster(config, tasks) as cluster, _client(cluster, "SLURM") as client:
                cluster.scale(jobs=config.jobs)
                yield client, config.cores
        else:
            workers = min(count_asked(config, cores), most or CPU_COUNT)
            threads = config.threads or (max(1, CPU_COUNT // workers) if workers > 1 else None)
            with (
                dask.config.set(
                    {
                        "distributed.dashboard.link": f"http://{LOOPBACK}:{{port}}/status",
                        "distributed.nanny.pre-spawn-environ": _worker_defaults(),
                    }
                ),
                _local_cluster(workers, threads, tasks) as cluster,
                _client(cluster, "the local cluster") as client,
            ):
                client.wait_for_workers(workers)
                yield client, threads


def count_asked(config: ClusterConfig, cores: int = CORES_PER_WORKER) -> int:
    """The number of workers that a configuration asks for; 1 for a running scheduler, whose workers may change."""
    if isinstance(config, SchedulerConfig):
        return 1
    if isinstance(config, SlurmConfig):
        return config.jobs
    return config.workers or torch.cuda.device_count() or max(1, CPU_COUNT // cores)


@contextmanager
def _client(cluster: Any, what: str) -> Iterator[Client]:
    try:
        client = Client(cluster, timeout=CONNECT_S)
    except (OSError, ValueError, TypeError, AssertionError) as error:  # all but OSError: not an address
        raise SamloveError(
            f"{what}: no Dask scheduler answers ({_line(error)}); start one, or correct the address in "
            "configs/cluster/scheduler.yaml"
        ) from error
    with client:
        yield client


@contextmanager
def _local_cluster(workers: int, threads: int | None, tasks: int) -> Iterator[SpecCluster]:
    """One worker runs in this process. Several run in their own processes, one GPU each, and restart if they die."""
    options: dict[str, Any] = {
        "nthreads": tasks,
        "memory_limit": 0,  # no limit: a shard has a fixed size, so pausing or restarting the worker would not help
        "dashboard_address": f"{LOOPBACK}:0",
    }
    scheduler: dict[str, Any] = {"dashboard": True, "dashboard_address": DASHBOARD}
    if workers == 1:
        spec = {0: {"cls": Worker, "options": options}}
        scheduler |= {"protocol": "inproc://"}
    else:
        options |= {"host": LOOPBACK, "silence_logs": QUIET, "preload": [__name__]}
        spec = {i: {"cls": Nanny, "options": options | {"env": _environment(i, threads)}} for i in range(workers)}
        scheduler |= {"protocol": "tcp://", "host": LOOPBACK, "port": 0}
    try:
        cluster = SpecCluster(
            workers=spec, scheduler={"cls": Scheduler, "options": scheduler}, silence_logs=QUIET, name="samlove"
        )
    except (RuntimeError, LookupError, ValueError, TypeError, ImportError) as error:
        raise SamloveError(
            f"the workers of this machine cannot start ({_line(error)}); correct or remove your own settings of Dask: "
            "environment variables DASK_* and files in ~/.config/dask"
        ) from error
    try:
        yield cluster
    finally:
        with suppress(AssertionError):  # from Dask, if a worker is just restarting; it ends with this process
            cluster.close()


def _environment(worker: int, threads: int | None) -> dict[str, str]:
    gpus = torch.cuda.device_count()
    return {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": str(worker % gpus)} if gpus else {})


def _worker_defaults() -> dict[str, Any]:
    """Dask's environment of a worker process without MALLOC_TRIM_THRESHOLD_.

    Dask lowers this threshold to return memory early. The C library then also maps and unmaps the memory of each larger
    tensor: in training on a CPU, the kernel took a quarter of the time.
    """
    environment: dict[str, Any] = dask.config.get("distributed.nanny.pre-spawn-environ")
    return {name: value for name, value in environment.items() if name != "MALLOC_TRIM_THRESHOLD_"}


def dask_setup(worker: Worker) -> None:
    """Called by Dask in each local worker process: ignore Ctrl-C, because the run handles it and stops the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def slurm_cluster(config: SlurmConfig, tasks: int = TASKS) -> Any:
    """A SLURMCluster without jobs. Raises RequestError if dask-jobqueue is not installed or an option is invalid."""
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise RequestError('configs/cluster/slurm.yaml: needs dask-jobqueue; run: pip install -e ".[slurm]"') from None
    try:
        return SLURMCluster(
            cores=tasks, processes=1, job_cpu=config.cores, memory=config.memory, job_name="samlove", **config.options
        )
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise RequestError(f"configs/cluster/slurm.yaml: {_line(error)}") from error


def finished(
    client: Client,
    submit: Callable[[Item], Future],
    items: Iterator[Item],
    ahead: int,
    running: set[Future],
) -> Iterator[Future]:
    """One task per item, as they end. Keeps the tasks that have not ended in `running`.

    ahead: tasks per worker that exist at a time.
    """
    while True:
        room = ahead * max(1, count_workers(client)) - len(running)
        for item in islice(items, max(0, room)):
            running.add(submit(item))
        if not running:
            return
        try:
            done = wait(running, timeout=1, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            continue  # there may be new workers
        for future in done:
            running.remove(future)
            yield future


def settle(client: Client, futures: Iterable[Future]) -> None:
    """Wait until no worker runs these tasks any more, so that nothing is being written."""
    while not all(future.done() for future in futures) and count_workers(client):
        with suppress(TimeoutError):
            wait(futures, timeout=1)


def count_workers(client: Client) -> int:
    return len(client.scheduler_info(n_workers=-1)["workers"])


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
