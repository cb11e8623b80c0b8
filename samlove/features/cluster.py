"""The Dask cluster that a feature stage computes on: workers of this machine, of a scheduler, or of SLURM.

`SAMLOVE_CLUSTER=NAME` selects configs/cluster/NAME.yaml; without it, `local`. What is computed does not depend on it,
so it is no parameter of any stage. torch's results do depend, in their last bits, on the number of its threads.
"""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask
import torch
from dask.system import CPU_COUNT
from distributed import Client, Nanny, Scheduler, SpecCluster, Worker

from samlove.config import LocalConfig, SchedulerConfig, SlurmConfig, load_cluster
from samlove.errors import RequestError, SamloveError
from samlove.features.worker import TASKS

LOOPBACK = "127.0.0.1"
DASHBOARD = f"{LOOPBACK}:8787"  # another port where that is taken
CORES_A_WORKER = 4  # of a machine without a GPU: more threads help one encoder little, more workers need more memory
QUIET = logging.CRITICAL  # a task's error is told as one line by the run; Dask's own account would come before
CONNECT_S = 10  # what a scheduler may take to answer

Cluster = LocalConfig | SchedulerConfig | SlurmConfig
LOCAL = LocalConfig(kind="local")


def chosen_cluster() -> Cluster:
    """What SAMLOVE_CLUSTER names; RequestError where there is no such file, or it holds a wrong value."""
    return load_cluster(os.environ.get("SAMLOVE_CLUSTER", "local"))


@contextmanager
def connect(config: Cluster) -> Iterator[tuple[Client, int | None]]:
    """A client of the cluster, which is started where it has to be, and torch's threads for each worker.

    Raises SamloveError where no scheduler answers, RequestError where SLURM's extra is not installed.
    """
    if isinstance(config, SchedulerConfig):
        with _client(config.address, config.address) as client:
            yield client, config.threads
    elif isinstance(config, SlurmConfig):
        with slurm_cluster(config) as cluster, _client(cluster, "SLURM") as client:
            cluster.scale(jobs=config.jobs)
            yield client, config.cores
    else:
        workers = config.workers or torch.cuda.device_count() or max(1, CPU_COUNT // CORES_A_WORKER)
        threads = config.threads or (max(1, CPU_COUNT // workers) if workers > 1 else None)
        with (
            dask.config.set({"distributed.dashboard.link": f"http://{LOOPBACK}:{{port}}/status"}),
            _local_cluster(workers, threads) as cluster,
            _client(cluster, "the local cluster") as client,
        ):
            client.wait_for_workers(workers)
            yield client, threads


@contextmanager
def _client(cluster: Any, what: str) -> Iterator[Client]:
    try:
        client = Client(cluster, timeout=CONNECT_S)
    except (OSError, ValueError) as error:  # ValueError: not an address
        raise SamloveError(
            f"{what}: no Dask scheduler answers there ({' '.join(str(error).split())}); start one, or correct address "
            "in configs/cluster/scheduler.yaml"
        ) from error
    with client:
        yield client


def _local_cluster(workers: int, threads: int | None) -> SpecCluster:
    """One worker lives in this process; several in their own, each with a GPU, restarted where they die."""
    options: dict[str, Any] = {
        "nthreads": TASKS,
        "memory_limit": 0,  # a shard is as large as it is: a worker that is paused or restarted would not help
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
    return SpecCluster(
        workers=spec, scheduler={"cls": Scheduler, "options": scheduler}, silence_logs=QUIET, name="samlove"
    )


def _environment(worker: int, threads: int | None) -> dict[str, str]:
    gpus = torch.cuda.device_count()
    return {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": str(worker % gpus)} if gpus else {})


def dask_setup(worker: Worker) -> None:
    """Dask calls it in each local worker process: an interrupt from the keyboard is for the run, which ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def slurm_cluster(config: SlurmConfig) -> Any:
    """The SLURMCluster of the configuration, without jobs yet. RequestError where dask-jobqueue is not installed."""
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise RequestError('configs/cluster/slurm.yaml: needs dask-jobqueue: pip install "samlove[slurm]"') from None
    try:
        return SLURMCluster(
            cores=TASKS, processes=1, job_cpu=config.cores, memory=config.memory, job_name="samlove", **config.options
        )
    except (TypeError, ValueError) as error:
        raise RequestError(f"configs/cluster/slurm.yaml: {' '.join(str(error).split())}") from error
