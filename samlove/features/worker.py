"""What a Dask worker does for a feature stage: one whole shard a task, read, encoded and written.

A worker holds one encoder, whose network it loads once, and takes two tasks at a time. The encoder's turn goes to one
of them, for a whole shard; meanwhile the other writes the shard that it has computed, or reads the first items of the
next. So reading, computing and writing overlap, and two shards at most are in a worker's memory.
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
from stores import FeatureStoreWriter
from stores.features import Failure

TASKS = 2  # at a time, the threads that a worker is to be started with
# Threads of a task; decoding leaves Python's lock. Four keep up with a processor, a GPU takes what sixteen can give.
READERS = min(16, max(4, CPU_COUNT))
M_ARENA_MAX = -8  # of glibc's malloc.h
# The encoders of runs that this process started: where the worker lives in it too, it takes the very object, whose
# network may be loaded; elsewhere it has the copy that it was sent.
HERE: dict[str, Encoder] = {}


@dataclass
class Timing:
    """Where the time went, of a shard or, added up, of a run. read_s is summed over the reading threads."""

    items: int = 0  # computed
    shards_written: int = 0
    bytes: int = 0  # of their arrays
    read_s: float = 0.0
    wait_s: float = 0.0  # the encoder idle, waiting for what is read
    compute_s: float = 0.0  # loading the network included
    write_s: float = 0.0
    first_batch: int = 0  # items of each worker's first batch: warm-up, left out of the rate

    def add(self, other: "Timing") -> None:
        for field in fields(other):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass
class Shard:
    """One task's outcome. warm_at, ended_at: of its first batch's and its last's end, time.time(); 0 without any."""

    number: int
    failures: list[Failure]
    timing: Timing
    warm_at: float = 0.0
    ended_at: float = 0.0


def _share_one_heap() -> None:
    """Let all threads allocate from the main thread's heap, where the C library is glibc.

    It gives each thread one of its own, which gives large activations back to the system and asks for them again: on
    two cores SAM 2-L took 9 % longer in a thread than in the main one (docs/benchmarks.md).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_ARENA_MAX, 1)


class ReadAhead:
    """Items read by threads, in order, up to `ahead` of them before they are taken; reading begins at once."""

    def __init__(self, encoder: Encoder, sources: Mapping[str, Any], ahead: int) -> None:
        self._encoder, self._rest = encoder, iter(sources.items())
        self._pool = ThreadPoolExecutor(READERS)
        self._waiting: deque[tuple[str, Future]] = deque()
        for _ in range(ahead):
            self._submit()

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:  # where the run ends early, what is queued need not be read
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self) -> None:
        for key, source in self._rest:
            self._waiting.append((key, self._pool.submit(self._read, key, source)))
            return

    def _read(self, key: str, source: Any) -> tuple[Any, float]:
        """The item, or the SamloveError that reading it raised; seconds."""
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
        """The next `count` items by key; a SamloveError where one cannot be read."""
        began = time.perf_counter()
        taken = {}
        for key, future in [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]:
            taken[key], seconds = future.result()
            timing.read_s += seconds
            self._submit()
        timing.wait_s += time.perf_counter() - began
        return taken


class Extraction(WorkerPlugin):
    """One run of a feature stage, as each of its workers holds it; those that come later get it too.

    name: of this run alone. token: what the run's lock file holds. threads: of torch; None leaves them as they are.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        writer: FeatureStoreWriter,
        batch_size: int,
        lock: Path,
        token: str,
        threads: int | None,
    ) -> None:
        self.name, self.encoder, self.writer, self.batch_size = name, encoder, writer, batch_size
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
        """The run has ended, perhaps early: what computes a shard stops after its batch."""
        self.stopped.set()

    def shard(self, number: int, sources: Mapping[str, Any]) -> Shard | None:
        """Compute and write those of the sources' items that shard `number` still lacks; None where the run has ended.

        Raises SamloveError where this worker sees other files than the run, or a value does not fit the store; OSError
        where it cannot be written.
        """
        self._check_place()
        lacking = {key: sources[key] for key in self.writer.lacking(number)}  # fewer than at first, after a lost worker
        done = Shard(number, [], Timing())
        ahead = max(2 * self.batch_size, self.batch_size + READERS)
        with ReadAhead(self.encoder, lacking, ahead) as reading, self.turn:
            items = self._compute(reading, done)
        if self.stopped.is_set():
            return None
        began = time.perf_counter()
        done.timing.shards_written += self.writer.write_shard(number, items)
        done.timing.write_s += time.perf_counter() - began
        return done

    def _compute(self, reading: ReadAhead, done: Shard) -> dict[str, Arrays]:
        items: dict[str, Arrays] = {}
        tried = 0
        while not self.stopped.is_set() and (batch := reading.take(self.batch_size, done.timing)):
            read = {key: item for key, item in batch.items() if not isinstance(item, SamloveError)}
            stage = self.writer.path.name
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

    def _check_place(self) -> None:
        """That the worker sees the run's files: its lock, found from where the worker was started."""
        try:
            found = self.lock.read_text()
        except OSError:
            found = "none"
        if found != self.token:
            raise SamloveError(
                f"worker {self.worker.address}, started in {Path.cwd()}: expected to find {self.lock} of this run "
                f"({self.token.strip()}), found {found.strip()}; start workers in the folder that the run is started "
                "in, on a file system that they share"
            )


def compute_shard(run: str, number: int, sources: Mapping[str, Any]) -> Shard | None:
    """The task: shard `number` of a run; see Extraction.shard. None, too, where the run has ended."""
    held = get_worker().plugins.get(run)
    return held.shard(number, sources) if isinstance(held, Extraction) else None
