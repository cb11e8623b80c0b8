"""The part of a feature stage that runs on a Dask worker: each task reads, encodes and writes one whole shard.

A worker holds one encoder, whose network it loads once, and runs two tasks at a time. The tasks take turns with the
encoder, one whole shard per turn; meanwhile the other task writes its computed shard or reads its first items. So
reading, computing and writing overlap, and a worker's memory holds at most two shards.
"""

import ctypes
import sys
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch
from dask.system import CPU_COUNT
from distributed import Worker, WorkerPlugin, get_worker

from samlove.errors import SamloveError
from samlove.features.encoders.base import Arrays, Encoder
from stores.features import Failure
from stores.staging import Staging

TASKS = 2  # at a time; start each worker with this many threads
# Reader threads per task; decoding releases the GIL. Four keep up with a CPU; a GPU can use all sixteen.
READERS = min(16, max(4, CPU_COUNT))
M_ARENA_MAX = -8  # from glibc's malloc.h
# Encoders of the runs that this process started. A worker in this process uses the same object, whose network may
# already be loaded; a worker in another process uses the copy that it was sent.
HERE: dict[str, Encoder] = {}


@dataclass
class Timing:
    """Where the time of a shard or, summed, of a run went. read_s is summed over the reader threads."""

    items: int = 0  # computed
    shards_written: int = 0
    bytes: int = 0  # of the computed arrays
    read_s: float = 0.0
    wait_s: float = 0.0  # time that the encoder waited for items to be read
    compute_s: float = 0.0  # includes loading the network
    write_s: float = 0.0
    first_batch: int = 0  # items in each worker's first batch: warm-up, excluded from the rate

    def add(self, other: "Timing") -> None:
        for field in fields(other):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass
class Shard:
    """A task's result. warm_at, ended_at: time.time() after the worker's first and the shard's last batch, or 0."""

    number: int
    failures: list[Failure]
    timing: Timing
    warm_at: float = 0.0
    ended_at: float = 0.0


def _share_one_heap() -> None:
    """Let all threads allocate from the main thread's heap, if the C library is glibc.

    By default, glibc gives each thread its own heap, which returns large activations to the system and requests them
    again: on two cores, SAM 2 Hiera-L took 9% longer in a thread than in the main thread (docs/benchmarks.md).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_ARENA_MAX, 1)


class ReadAhead:
    """Items read by threads, in order, up to `ahead` items before they are taken. Reading starts immediately."""

    def __init__(self, encoder: Encoder, sources: Mapping[str, Any], ahead: int) -> None:
        self._encoder, self._rest = encoder, iter(sources.items())
        self._pool = ThreadPoolExecutor(READERS)
        self._waiting: deque[tuple[str, Future]] = deque()
        for _ in range(ahead):
            self._submit()

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:  # if the run ends early, queued items need not be read
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self) -> None:
        for key, source in self._rest:
            self._waiting.append((key, self._pool.submit(self._read, key, source)))
            return

    def _read(self, key: str, source: Any) -> tuple[Any, float]:
        """The item, or the SamloveError that reading it raised; and the seconds taken."""
        began = time.perf_counter()
        try:
            item = self._encoder.load(source)
        except SamloveError as error:
            item = error
        except Exception as error:
            error.add_note(f"while reading {key!r}")
            raise
        return item, time.perf_counter() - began

    def take(self, count: int, timing: Timing) -> dict[str, Any]:
        """The next `count` items by key; a SamloveError in place of each item that cannot be read."""
        began = time.perf_counter()
        taken = {}
        for key, future in [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]:
            taken[key], seconds = future.result()
            timing.read_s += seconds
            self._submit()
        timing.wait_s += time.perf_counter() - began
        return taken


class Extraction(WorkerPlugin):
    """One run of a feature stage, as held by each of its workers, including workers that join later.

    name: unique to the run. token: the text in the run's lock file. threads: torch threads; None keeps the default.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        staging: Staging,
        batch_size: int,
        lock: Path,
        token: str,
        threads: int | None,
    ) -> None:
        self.name, self.encoder, self.staging, self.batch_size = name, encoder, staging, batch_size
        self.lock, self.token, self.threads = lock, token, threads

    def setup(self, worker: Worker) -> None:
        self.worker = worker
        self.encoder = HERE.get(self.name, self.encoder)
        self.turn, self.stopped, self.warm = Lock(), Event(), False
        if not torch.cuda.is_available():
            _share_one_heap()
        if self.threads:
            torch.set_num_threads(self.threads)

    def teardown(self, worker: Worker) -> None:
        """The run has ended, perhaps early: a task that is computing stops after its current batch."""
        self.stopped.set()

    def shard(self, number: int, planned: Mapping[str, str], sources: Mapping[str, Any]) -> Shard | None:
        """Compute and write the items of shard `number` that are still missing; returns None if the run has ended.

        planned: {key: id} of the shard's items; of several with the same id, such as the frames of a video and of its
        null versions, one is computed. sources: {key: what encoder.load takes} of the same items. Raises SamloveError
        if this worker does not see the run's files or a value does not fit the store, OSError if the shard cannot be
        written.
        """
        check_place(self.worker, self.lock, self.token)
        # A worker that died may have written the shard, or have removed the rows that it had.
        missing = self.staging.missing(number, planned)
        first = {planned[key] or key: key for key in reversed(missing)}  # of each id; an unreadable source has none
        alike = {key: first[planned[key] or key] for key in missing}
        done = Shard(number, [], Timing())
        ahead = max(2 * self.batch_size, self.batch_size + READERS)
        computed = {key: sources[key] for key in missing if alike[key] == key}
        with ReadAhead(self.encoder, computed, ahead) as reading, self.turn:
            items = self._compute(reading, done)
        if self.stopped.is_set():
            return None
        errors = {failure.key: failure for failure in done.failures}
        done.failures = [errors[alike[key]]._replace(key=key) for key in missing if alike[key] in errors]
        items = {key: items[alike[key]] for key in missing if alike[key] in items}
        began = time.perf_counter()
        done.timing.shards_written += self.staging.write(number, planned, items)
        done.timing.write_s += time.perf_counter() - began
        return done

    def _compute(self, reading: ReadAhead, done: Shard) -> dict[str, Arrays]:
        items: dict[str, Arrays] = {}
        tried = 0
        while not self.stopped.is_set() and (batch := reading.take(self.batch_size, done.timing)):
            read = {key: item for key, item in batch.items() if not isinstance(item, SamloveError)}
            stage = self.staging.path.name
            done.failures += [Failure(key, stage, str(item)) for key, item in batch.items() if key not in read]
            items |= self._encode(read, done)
            tried += len(batch)
            self.worker.log_event(self.name, [done.number, tried])
        return items

    def _encode(self, read: dict[str, Any], done: Shard) -> dict[str, Arrays]:
        """The arrays of one batch by key."""
        if not read:
            return {}
        began = time.perf_counter()
        try:
            arrays = self.encoder.encode(list(read.values()))
        except SamloveError as error:
            keys = list(read)
            raise type(error)(f"{keys[0]} to {keys[-1]}: {error}") from error
        done.timing.compute_s += time.perf_counter() - began
        done.timing.items += len(arrays)
        done.timing.bytes += sum(array.nbytes for item in arrays for array in item.values())
        done.ended_at = time.time()
        if not self.warm:
            self.warm, done.timing.first_batch, done.warm_at = True, len(arrays), done.ended_at
        return dict(zip(read, arrays, strict=True))


def check_place(worker: Worker, lock: Path, token: str) -> None:
    """Check that a worker sees the run's files: it must find the run's lock file from its own working folder.

    Raises SamloveError otherwise. token: the text in the lock file.
    """
    try:
        found = lock.read_text(encoding="utf-8")
    except OSError:
        found = "none"
    if found != token:
        raise SamloveError(
            f"worker {worker.address}, started in {Path.cwd()}: expected this run's lock file {lock} "
            f"({token.strip()}), found {found.strip()}; start workers in the folder of the run, on a file "
            "system that all of them share"
        )


def compute_shard(run: str, number: int, planned: Mapping[str, str], sources: Mapping[str, Any]) -> Shard | None:
    """The Dask task: compute shard `number` of a run, see Extraction.shard. Also None if the run has ended."""
    held = get_worker().plugins.get(run)
    return held.shard(number, planned, sources) if isinstance(held, Extraction) else None
