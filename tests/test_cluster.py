"""Feature stages on Dask: local workers, workers of a scheduler, a killed worker, and the job script for SLURM.

The scheduler and its workers are real processes on loopback, started with the `dask` command.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import dask.config as dask_config
import pytest
import torch
from torch import nn

from samlove.config import ClusterConfig, LocalConfig, SchedulerConfig, SlurmConfig, load_cluster
from samlove.errors import RequestError, SamloveError
from samlove.features.cluster import chosen_cluster, connect, slurm_cluster
from samlove.features.encoders.base import Arrays
from samlove.features.encoders.vggish import VggishEncoder
from samlove.features.extract import Job, Report, extract
from stores import FeatureStore
from stores.verify import verify
from tests.kill_run import write_wavs
from tests.small_encoders import audio_config
from tests.test_stores_contract import tree

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
DEADLINE = 60  # seconds to wait for something
WAVS = range(7, 12)  # none is broken
LOCAL = LocalConfig(kind="local", workers=1, threads=1)


class Watched(VggishEncoder):
    """Logs each process that loads it. The first process to begin its second batch writes `victim` and then hangs."""

    def __init__(self, inputs: Path) -> None:
        super().__init__(audio_config(inputs / "weights"), 1, CPU)
        self.folder = inputs
        self.batches = 0

    @cached_property
    def network(self) -> nn.Module:
        with open(self.folder / "loaded", "a") as file:
            file.write(f"{os.getpid()}\n")
        return VggishEncoder.network.func(self)

    def encode(self, items: list) -> list[Arrays]:
        self.batches += 1
        try:
            if self.batches == 2:
                with open(self.folder / "victim", "x") as file:
                    file.write(f"{os.getpid()}\n")
                threading.Event().wait()
        except FileExistsError:
            pass
        return super().encode(items)

    def loaded(self) -> list[int]:
        return [int(line) for line in (self.folder / "loaded").read_text().split()]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def encoder(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "inputs")


@pytest.fixture
def make(tmp_path: Path, encoder: Watched) -> Callable[[str, ClusterConfig], Report]:
    """Runs the stage on 12 wavs, in shards of two, into tmp_path/<name>."""
    sources = write_wavs(tmp_path / "inputs", range(7, 13)) | write_wavs(tmp_path / "inputs", range(21, 27))

    def run(name: str, cluster: ClusterConfig) -> Report:
        root = tmp_path / name
        return extract(Job(encoder, sources, root / "store", root / "scratch", 2, 1), cluster)

    return run


@pytest.fixture
def expected(tmp_path: Path, encoder: Watched, make: Callable[[str, ClusterConfig], Report]) -> dict[str, bytes]:
    """The files of the store that one worker inside this process writes."""
    (encoder.folder / "victim").touch()  # so that no process becomes the victim
    report = make("expected", LOCAL)
    assert (report.workers, report.shards, report.spent.items) == (1, 6, 12)
    assert encoder.loaded() == [os.getpid()]
    for name in ("victim", "loaded"):
        (encoder.folder / name).unlink()
    encoder.batches = 0
    del encoder.network
    return tree(tmp_path / "expected" / "store")


class Dask:
    """A scheduler and two workers, each in its own process, without nannies that would restart them."""

    def __init__(self, folder: Path, workers_in: Path) -> None:
        self.folder, self.started = folder, list[subprocess.Popen]()
        file = folder / "scheduler.json"
        self.start(folder, "scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0",
                   "--scheduler-file", str(file))  # fmt: skip
        self.address = wait_for(
            lambda: file.exists() and file.stat().st_size and json.loads(file.read_text())["address"]
        )
        for _ in range(2):
            self.start(workers_in, "worker", self.address, "--nthreads", "2", "--no-nanny", "--no-dashboard",
                       "--local-directory", str(folder))  # fmt: skip

    def start(self, folder: Path, *arguments: str) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "dask", *arguments]
        log = open(self.folder / f"{len(self.started)}.log", "w")
        self.started.append(subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log))

    def stop(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()

    @property
    def config(self) -> SchedulerConfig:
        return SchedulerConfig(kind="scheduler", address=self.address, threads=1)


def wait_for(found: Callable[[], Any]) -> Any:
    """Wait until the result of `found` is true and return it; fails after DEADLINE."""
    until = time.monotonic() + DEADLINE
    while not (value := found()):
        assert time.monotonic() < until, "timed out"
        time.sleep(0.05)
    return value


@pytest.fixture
def dask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dask]:
    monkeypatch.chdir(tmp_path)
    started = Dask(tmp_path, workers_in=tmp_path)
    yield started
    started.stop()


def kill_victim(encoder: Watched, killed: list[int]) -> None:
    victim = encoder.folder / "victim"
    killed.append(int(wait_for(lambda: victim.exists() and victim.read_text().endswith("\n") and victim.read_text())))
    os.kill(killed[0], signal.SIGKILL)


def test_a_killed_worker_does_not_change_the_store(
    tmp_path: Path, encoder: Watched, make: Callable, expected: dict[str, bytes], dask: Dask
) -> None:
    killed: list[int] = []
    killer = threading.Thread(target=kill_victim, args=(encoder, killed))
    killer.start()
    report = make("scheduler", dask.config)
    killer.join()
    assert tree(tmp_path / "scheduler" / "store") == expected
    assert verify(tmp_path / "scheduler" / "store", deep=True) == []
    workers = [process.pid for process in dask.started[1:]]
    assert killed[0] in workers
    assert sorted(encoder.loaded()) == sorted(workers)  # each loaded it once
    assert report.workers == 1  # at the end


@pytest.mark.slow
def test_a_killed_local_worker_does_not_change_the_store(
    tmp_path: Path, encoder: Watched, make: Callable, expected: dict[str, bytes]
) -> None:
    killed: list[int] = []
    killer = threading.Thread(target=kill_victim, args=(encoder, killed))
    killer.start()
    report = make("local", LocalConfig(kind="local", workers=2, threads=1))
    killer.join()
    assert tree(tmp_path / "local" / "store") == expected
    assert len(set(encoder.loaded())) == len(encoder.loaded()) >= 2
    assert killed[0] in encoder.loaded()
    assert os.getpid() not in encoder.loaded()
    assert report.workers >= 1


def test_a_lost_scheduler_gives_one_line_and_the_run_resumes(
    tmp_path: Path, encoder: Watched, make: Callable, expected: dict[str, bytes], dask: Dask
) -> None:
    def kill_all() -> None:
        wait_for((encoder.folder / "victim").exists)
        dask.stop()

    killer = threading.Thread(target=kill_all)
    killer.start()
    with pytest.raises(SamloveError, match=r"store: lost the Dask scheduler; run the same command again"):
        make("lost", dask.config)
    killer.join()
    assert not (tmp_path / "lost" / "store").exists()
    make("lost", LOCAL)
    assert tree(tmp_path / "lost" / "store") == expected


@pytest.mark.slow
def test_workers_started_in_another_folder_are_refused(
    tmp_path: Path, encoder: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    sources = write_wavs(tmp_path / "inputs", WAVS)
    dask = Dask(tmp_path, workers_in=tmp_path / "elsewhere")
    try:
        with pytest.raises(SamloveError, match=r"started in .*elsewhere: expected this run's lock file scratch/lock"):
            extract(Job(encoder, sources, Path("store"), Path("scratch"), 2, 1), dask.config)
    finally:
        dask.stop()
    assert not Path("store").exists()


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:9", "nonsense", "tcp://127.0.0.1:-1", "tls://127.0.0.1:9", "inproc://x"]
)
def test_a_missing_scheduler_gives_one_line(
    tmp_path: Path, make: Callable, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr("samlove.features.cluster.CONNECT_S", 1)
    with pytest.raises(SamloveError, match=f"{address}: no Dask scheduler answers") as raised:
        make("none", SchedulerConfig(kind="scheduler", address=address))
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_worker_that_always_dies_gives_one_line(tmp_path: Path) -> None:
    sources = write_wavs(tmp_path / "inputs", WAVS)
    encoder = Deadly(audio_config(tmp_path / "inputs" / "weights"), 1, CPU)
    job = Job(encoder, sources, tmp_path / "store", tmp_path / "scratch", 2, 1)
    with pytest.raises(SamloveError, match=r"every worker that ran it died, usually out of memory") as raised:
        extract(job, LocalConfig(kind="local", workers=2, threads=1))
    assert "\n" not in str(raised.value)


def test_workers_of_this_machine_allocate_memory_as_this_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    with connect(LocalConfig(kind="local", workers=2, threads=1)) as (client, _):
        for environment in client.run(lambda: dict(os.environ)).values():
            assert "MALLOC_TRIM_THRESHOLD_" not in environment and environment["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("setting", [("temporary-directory", "/proc/x"), ("distributed.scheduler.worker-ttl", "moon")])
def test_a_users_own_setting_of_dask_with_which_no_worker_starts_is_named(setting: tuple[str, str]) -> None:
    with (
        dask_config.set(dict([setting])),
        pytest.raises(SamloveError, match=rf"workers of this machine cannot start .*{setting[1]}.*DASK_\*"),
        connect(LocalConfig(kind="local", workers=1)),
    ):
        pass


class Deadly(VggishEncoder):
    def encode(self, items: list) -> list[Arrays]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []


# --- configs/cluster -------------------------------------------------------------------------------------------------


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "configs", tmp_path / "configs"))


def test_every_cluster_configuration_in_the_repository_loads(configs: Path) -> None:
    kinds = {path.stem: load_cluster(path.stem, configs).kind for path in (configs / "cluster").glob("*.yaml")}
    assert kinds == {"local": "local", "scheduler": "scheduler", "slurm": "slurm"}


def test_the_environment_selects_the_cluster(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(configs.parent)
    monkeypatch.delenv("SAMLOVE_CLUSTER", raising=False)
    assert chosen_cluster() == LocalConfig(kind="local")
    monkeypatch.setenv("SAMLOVE_CLUSTER", "scheduler")
    assert isinstance(chosen_cluster(), SchedulerConfig)
    for name in ("cloud", "", "../micro/audio", "a\nb"):
        monkeypatch.setenv("SAMLOVE_CLUSTER", name)
        with pytest.raises(RequestError) as refused:
            chosen_cluster()
        known = "expected one of local, scheduler, slurm in configs/cluster"
        assert str(refused.value) == f"SAMLOVE_CLUSTER={name!r}: {known}"


@pytest.mark.parametrize(
    ("text", "message"),
    [("kind: moon\n", "moon"), ("kind: local\nworkers: 0\n", "workers"), ("kind: scheduler\n", "address")],
)
def test_the_error_for_an_invalid_value_names_the_file(configs: Path, text: str, message: str) -> None:
    (configs / "cluster" / "local.yaml").write_text(text)
    with pytest.raises(RequestError, match=f"local.yaml: .*{message}"):
        load_cluster("local", configs)


def test_the_slurm_job_script_follows_the_configuration(configs: Path) -> None:
    config = load_cluster("slurm", configs)
    assert isinstance(config, SlurmConfig)
    with slurm_cluster(config) as cluster:
        script = cluster.job_script()
    for line in ("#SBATCH --cpus-per-task=8", "#SBATCH -t 04:00:00", "#SBATCH --gres=gpu:1", "--nthreads 2"):
        assert line in script
    for wrong in ({"options": {"moon": 1}}, {"options": {"interface": "moon"}}, {"memory": "moon"}):
        with pytest.raises(RequestError, match="slurm.yaml: .*moon"):
            slurm_cluster(config.model_copy(update=wrong))


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replacements for SLURM's commands, which are not installed: jobs run immediately on this machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {
        # Read the script first, because it is deleted once sbatch returns.
        "sbatch": 'job=$(cat "$1"); PYTHONPATH=$SOURCE bash -c "$job" >/dev/null 2>&1 & echo "Submitted batch job $!"',
        "scancel": 'pkill -P "$1"; kill "$1"',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SOURCE", str(ROOT))
    return folder


def test_slurm_jobs_write_the_same_store(
    tmp_path: Path, sbatch: Path, encoder: Watched, make: Callable, expected: dict[str, bytes]
) -> None:
    (encoder.folder / "victim").touch()
    options = {"interface": "lo", "log_directory": str(tmp_path), "local_directory": str(tmp_path)}
    report = make("slurm", SlurmConfig(kind="slurm", jobs=2, cores=1, memory="1GB", options=options))
    assert tree(tmp_path / "slurm" / "store") == expected
    assert report.spent.items == len(FeatureStore.open(tmp_path / "slurm" / "store")) == 12
