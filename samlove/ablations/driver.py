"""Executes the runs of an ablation that are missing, in parallel on a Dask cluster (samlove.features.cluster).

One run is one task; a worker executes one at a time. If a worker dies, another one resumes its run from the saved
state. A run that fails does not stop the others. Finished runs are kept: a run is executed again only if something
that its result depends on has changed, and a renamed run is only moved.
"""

import os
import shutil
from concurrent.futures import CancelledError
from contextlib import suppress
from datetime import timedelta
from io import StringIO
from pathlib import Path
from threading import Event, Lock
from typing import Any
from uuid import uuid4

import torch
from distributed import Future, KilledWorker, Worker, WorkerPlugin, get_worker
from distributed.comm import CommClosedError
from tqdm import tqdm

from samlove.ablations.run import RECORD, Task, execute, read_record, targets_of
from samlove.config import ClusterConfig
from samlove.data.layout import Layout
from samlove.errors import SamloveError
from samlove.features.cluster import connect, count_workers, finished, settle
from samlove.features.lock import only_run
from samlove.features.worker import check_place
from samlove.train import ExpressionDataset
from stores.manifest import replace_folder, write_json

LOCK = "ablations.lock"
TELL_S = 2.0  # seconds between a run's reports


def execute_missing(tasks: list[Task], paths: Layout, cluster: ClusterConfig) -> None:
    """Execute all tasks that have no result yet, and remove the results that belong to no task.

    Raises SamloveError, after all other runs, if a run failed; or if the scheduler is lost or another process is
    executing these runs. KeyboardInterrupt: every run saves its state first.
    """
    with only_run(paths.scratch / LOCK, paths.ablation_runs) as token:
        paths.ablation_runs.mkdir(parents=True, exist_ok=True)
        missing = _reuse(tasks, paths.ablation_runs)
        print(f"{len(tasks)} runs: {len(tasks) - len(missing)} finished, {len(missing)} to execute", flush=True)
        unique = list({task.id: task for task in missing}.values())
        if unique:
            targets_of(unique[0]).prepare(unique[0].dataset.frames, unique[0].dataset.mask_size)
            _execute(unique, paths, cluster, token)
            if left := _reuse(tasks, paths.ablation_runs):  # runs that are equal to one that was executed
                raise SamloveError(f"{paths.ablation_runs}: expected results of all runs, found none of {left[0].run}")
        _remove_others(tasks, paths)


def _reuse(tasks: list[Task], runs: Path) -> list[Task]:
    """The tasks without a result. A result that is theirs but has another name is linked into their place."""
    found = {record["id"]: path.parent for path in runs.glob(f"*/*/{RECORD}") if (record := read_record(path))}
    missing: list[Task] = []
    linked: dict[Path, Path] = {}  # complete copies -> their places; none is replaced before all are made
    for task in tasks:
        if task.id not in found:
            missing.append(task)
            continue
        record = read_record(task.out / RECORD)
        wanted = {"id": task.id, "run": task.run.name, "seed": task.run.seed, "changes": task.run.changes}
        if record is None or any(record[name] != value for name, value in wanted.items()):
            new = task.out.with_name(f"{task.out.name}.partial")
            shutil.rmtree(new, ignore_errors=True)  # left by a killed run
            shutil.copytree(found[task.id], new, copy_function=os.link)
            record = read_record(new / RECORD)
            (new / RECORD).unlink()  # linked files are never edited
            write_json(new / RECORD, (record or {}) | wanted)
            linked[new] = task.out
    for new, out in linked.items():
        replace_folder(new, out)
    return missing


def _remove_others(tasks: list[Task], paths: Layout) -> None:
    """Remove results and unfinished runs that belong to no task."""
    wanted, unfinished = {task.out for task in tasks}, {task.work for task in tasks}
    for folder in [*paths.ablation_runs.glob("*/*"), *(paths.scratch / "ablations").glob("*")]:
        if folder not in wanted | unfinished:
            shutil.rmtree(folder)
    for folder in paths.ablation_runs.iterdir():
        if not any(folder.iterdir()):
            folder.rmdir()


def _execute(tasks: list[Task], paths: Layout, cluster: ClusterConfig, token: str) -> None:
    name = f"samlove ablations {uuid4().hex[:8]}"
    # The longest first, so that no worker waits long for the last: a run's time grows with its blocks and their width.
    tasks = sorted(tasks, key=lambda task: -task.run.sections["fusion"].blocks * task.run.sections["fusion"].dim)
    failed: list[str] = []
    with connect(cluster, cores=1, tasks=1, most=len(tasks)) as (client, threads):
        print(f"ablations: {count_workers(client)} worker(s); dashboard: {client.dashboard_link}", flush=True)
        progress = _Progress(tasks)

        def submit(number: int) -> Future:
            return client.submit(execute_task, name, number, tasks[number], key=f"{name}-{number}", pure=False)

        running: set[Future] = set()
        try:
            client.register_plugin(Runner(name, paths.scratch / LOCK, token, threads), name=name)
            client.subscribe_topic(name, progress.tell)
            for future in finished(client, submit, iter(range(len(tasks))), 1, running):
                number = int(str(future.key).rpartition("-")[2])
                try:
                    error = future.result()
                except KilledWorker:
                    error = "every worker that executed it died, usually out of memory; use fewer workers"
                if error:
                    failed.append(f"{tasks[number].run}: {error}")
                progress.finish(number, error)
        except (CancelledError, CommClosedError) as error:
            raise SamloveError(
                "ablations: lost the Dask scheduler; run the same command again, it resumes every run"
            ) from error
        finally:
            progress.close()
            if client.status == "running":
                with suppress(CommClosedError):  # the scheduler has just gone
                    client.unregister_worker_plugin(name)  # if this ends early, each run saves its state
                    settle(client, running)
    if failed:
        raise SamloveError(f"{len(failed)} of {len(tasks)} runs failed, the others are finished: {'; '.join(failed)}")


# --- on a worker -----------------------------------------------------------------------------------------------------


class Runner(WorkerPlugin):
    """What each worker holds while runs are executed. lock, token: as in samlove.features.worker.check_place."""

    def __init__(self, name: str, lock: Path, token: str, threads: int | None) -> None:
        self.name, self.lock, self.token, self.threads = name, lock, token, threads

    def setup(self, worker: Worker) -> None:
        self.worker, self.turn, self.stop = worker, Lock(), Event()
        if self.threads:
            torch.set_num_threads(self.threads)

    def teardown(self, worker: Worker) -> None:
        self.stop.set()

    def execute(self, number: int, task: Task) -> str:
        check_place(self.worker, self.lock, self.token)

        def bar(**settings: Any) -> tqdm:
            return _Reports(lambda **state: self.worker.log_event(self.name, [number, state]), settings)

        with self.turn:  # a user's worker may have several threads, but torch's random state is the process's
            try:
                execute(task, bar, self.stop)
            except SamloveError as error:
                return str(error)
            except KeyboardInterrupt:
                return "stopped"
        return ""


def execute_task(name: str, number: int, task: Task) -> str:
    """The Dask task: execute run `number`. Returns the reason if it failed, else an empty text."""
    held = get_worker().plugins.get(name)
    return held.execute(number, task) if isinstance(held, Runner) else "stopped"


class _Reports(tqdm):
    """A progress bar that reports to the driver instead of drawing. state: desc, n, total and seconds left; or text."""

    def __init__(self, tell: Any, settings: dict[str, Any]) -> None:
        self._tell = tell
        super().__init__(**settings | {"mininterval": TELL_S, "file": StringIO()})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        state = self.format_dict
        left = (state["total"] - state["n"]) / state["rate"] if state["rate"] else None
        self._tell(desc=self.desc.removesuffix(": "), n=state["n"], total=state["total"], left=left)
        return True

    def write(self, s: str) -> None:
        self._tell(text=s)


# --- progress --------------------------------------------------------------------------------------------------------


class _Progress:
    """A bar over the training samples of all runs, and a line for each epoch of each run."""

    def __init__(self, tasks: list[Task]) -> None:
        self._tasks, self._states = tasks, dict[int, dict[str, Any]]()
        sizes = {path: ExpressionDataset(path).expressions for path in {t.run.shards(t.paths) / "train" for t in tasks}}
        self._totals = [
            task.run.sections["train"].epochs * sizes[task.run.shards(task.paths) / "train"] for task in tasks
        ]
        self._trained = [0] * len(tasks)
        self._done = 0
        self._bar = tqdm(total=sum(self._totals), desc="ablations", unit="expr", mininterval=TELL_S, smoothing=0.05)

    def close(self) -> None:
        self._bar.close()

    def tell(self, event: tuple[float, tuple[int, dict[str, Any]]]) -> None:
        """Handle a worker's report, which may arrive late."""
        number, state = event[1]
        if "text" in state:
            self._bar.write(f"{self._tasks[number].run}: {state['text']}")
            return
        self._states[number] = state
        if state["desc"] == "train":
            self._advance(number, state["n"])
        self._show()

    def finish(self, number: int, error: str) -> None:
        self._states.pop(number, None)
        self._advance(number, self._totals[number])
        self._done += 1
        if not error:
            self._bar.write(f"{self._tasks[number].run}: finished, {self._done} of {len(self._tasks)}")
        elif error != "stopped":
            self._bar.write(f"{self._tasks[number].run}: failed: {error}")
        self._show()

    def _advance(self, number: int, trained: int) -> None:
        self._bar.update(max(0, trained - self._trained[number]))
        self._trained[number] = max(trained, self._trained[number])

    def _show(self) -> None:
        """For each running run its epoch or the split it predicts, and the time left in this step."""
        self._bar.set_postfix_str("; ".join(map(self._state, sorted(self._states))), refresh=False)

    def _state(self, number: int) -> str:
        task, state = self._tasks[number], self._states[number]
        step, epochs = state["desc"], task.run.sections["train"].epochs
        if step == "train":
            step = f"epoch {min(epochs, int(epochs * state['n'] / state['total']) + 1)}/{epochs}"
        left = "" if state["left"] is None else f", {timedelta(seconds=round(state['left']))} left"
        return f"{task.run.name} {step}{left}"
