"""The runner of every feature stage: read, encode, write, shard by shard, into a feature store.

Items are read by threads ahead of the encoder, and a shard is written by a thread while the next is computed. A
finished shard stays in scratch, so a stopped run takes up where it was; the store is published whole. What cannot be
read becomes a row of the failure ledger and the rest goes on.

Incremental: each row is kept with the content hash of what it was computed from. A row of the store made before, or
of a stopped run, is reused where that hash, the fingerprint and the encoder's code are still the same: media that were
added go into shards of their own, changed and failed ones are computed and put into their shard, removed ones are left
out, and all other shards are hard links to the files that were there. DVC removes a stage's outs before it runs the
stage, so links to the published files are kept in scratch/last; removing the scratch folder is always safe and costs
but time.
"""

import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from samlove.digest import code_digest, source_ids
from samlove.encoders.base import Arrays, Encoder
from samlove.errors import SamloveError
from samlove.lock import only_run
from stores import FeatureStoreWriter
from stores.chunks import Compression
from stores.features import Failure, write_failures

# A few bad files among thousands should not cost a night; more than one in a hundred says that something is wrong with
# the whole, and results would no longer compare. Below a hundred items any failure is too many.
FAILURE_BUDGET = 0.01
READERS = 4  # threads: decoding leaves Python's lock, and one encoder seldom outruns four
SHOWN = 3  # failures named in a message; the ledger has them all
LAST, LOCK, LEDGER = "last", "lock", "failures.csv"  # in the scratch folder


@dataclass(frozen=True)
class Job:
    """What one feature stage computes: every source, {key: what encoder.load takes}, into the store `out`.

    scratch: a folder on the same file system as `out`, outside every DVC out, of this store alone. shard_size,
    batch_size: items; a batch does not cross shards. chunk_rows, compression: as in FeatureStoreWriter.
    """

    encoder: Encoder
    sources: Mapping[str, Any]
    out: Path
    scratch: Path
    shard_size: int
    batch_size: int
    chunk_rows: int | None = None
    compression: Compression = "none"


@dataclass
class Timing:
    """Where a run's time went. read_s is summed over the reading threads, write_s is the writing thread's; the others
    are the main thread's."""

    total: int = 0  # items asked for
    items: int = 0  # computed in this run
    shards: int = 0  # of the whole store
    shards_written: int = 0  # in this run
    bytes: int = 0  # of their arrays
    hash_s: float = 0.0  # of what is to be read
    read_s: float = 0.0
    wait_s: float = 0.0  # the encoder idle, waiting for what is read
    compute_s: float = 0.0  # loading the network included
    write_s: float = 0.0
    first_batch: int = 0  # its items: warm-up, left out of the rate
    warm_at: float = 0.0
    ended_at: float = 0.0

    @property
    def rate(self) -> float | None:
        """Items a second after the first batch; None where there was but one."""
        items, seconds = self.items - self.first_batch, self.ended_at - self.warm_at
        return items / seconds if items > 0 and seconds > 0 else None

    def __str__(self) -> str:
        reused = f"{self.shards - self.shards_written} of {self.shards} shards were finished before"
        if not self.items:
            return f"nothing to compute; {reused}"
        rate = f"{self.rate:.1f} items/s after warm-up" if self.rate else "one batch, no rate"
        read = f"read {self.read_s:.1f} s in threads (waited for {self.wait_s:.1f} s)"
        size = f"{self.bytes / self.items / 1e3:,.1f} kB an item"
        return (
            f"{self.items} of {self.total} items computed, {rate}; hash {self.hash_s:.1f} s, {read}, "
            f"compute {self.compute_s:.1f} s, write {self.write_s:.1f} s in a thread; {size}; {reused}"
        )


def extract(job: Job) -> Timing:
    """Make or complete the store of `job`; what happened is returned.

    Raises SamloveError where another run is at work on it, where there is nothing to encode, where a value does not
    fit the store, where the disk is full, and where more than FAILURE_BUDGET of the items cannot be read; then nothing
    is published, what was published before stays, and another run computes only what lacks.
    """
    if not job.sources:
        raise SamloveError(f"{job.out}: expected items to encode, found none in the index; see: samlove audit")
    try:
        return _extract(job)
    except OSError as error:  # the disk is full, most often
        raise SamloveError(
            f"{job.out}: cannot be made: {error}; what is finished stays in {job.scratch}: mend that (free space, "
            "say) and run the same command again, it computes only what lacks"
        ) from error


def _extract(job: Job) -> Timing:
    with only_run(job.scratch / LOCK, job.out):
        timing = Timing(total=len(job.sources))
        began = time.perf_counter()
        ids = source_ids(job.sources)
        timing.hash_s = time.perf_counter() - began
        writer = FeatureStoreWriter(
            path=job.out,
            scratch=job.scratch,
            fingerprint=job.encoder.fingerprint(),
            keys=list(job.sources),
            shard_size=job.shard_size,
            chunk_rows=job.chunk_rows,
            compression=job.compression,
            ids=ids,
            code=code_digest(type(job.encoder)),
            previous=(job.out, job.scratch / LAST),
        )
        writer.clean()
        todo = writer.todo()
        timing.shards = len(writer.plan())
        failures = _compute(job, writer, todo, timing)
        _check_budget(failures, len(job.sources), job.scratch / LEDGER)
        writer.publish(failures, keep=job.scratch / LAST)
        _tidy(job.scratch)
    return timing


def _compute(job: Job, writer: FeatureStoreWriter, todo: list[tuple[int, list[str]]], timing: Timing) -> list[Failure]:
    """Write the shards of `todo`; the items that could not be read."""
    failures: list[Failure] = []
    keys = [key for _, lacking in todo for key in lacking]
    done = len(job.sources) - len(keys)

    def write(number: int, items: dict[str, Arrays]) -> None:
        began = time.perf_counter()
        timing.shards_written += writer.write_shard(number, items)
        timing.write_s += time.perf_counter() - began

    with (
        tqdm(total=len(job.sources), initial=done, desc=job.out.name, unit="item", mininterval=2) as bar,
        ThreadPoolExecutor(1) as pool,
    ):
        writing: Future | None = None
        reading = _read_ahead(job.encoder, {key: job.sources[key] for key in keys}, 2 * job.batch_size, timing)
        for number, lacking in todo:
            items: dict[str, Arrays] = {}
            for batch in (lacking[i : i + job.batch_size] for i in range(0, len(lacking), job.batch_size)):
                read, failed = _take(reading, batch, job.out.name, timing)
                failures += failed
                items |= _encode(job.encoder, read, timing)
                bar.update(len(batch))
            if writing:
                writing.result()  # two shards at most are in memory
            writing = pool.submit(write, number, items)
        if writing:
            writing.result()
    timing.ended_at = time.perf_counter()
    return failures


def _tidy(scratch: Path) -> None:
    """Remove what other encoders' stopped runs and an earlier ledger left in scratch."""
    for other in scratch.iterdir():
        if other.is_dir() and other.name != LAST:
            shutil.rmtree(other)
        elif other.name == LEDGER:
            other.unlink()


def _read_ahead(encoder: Encoder, sources: Mapping[str, Any], ahead: int, timing: Timing) -> Iterator[tuple[str, Any]]:
    """(key, item, or the SamloveError that reading it raised) in order, up to `ahead` items read before their turn."""

    def read(key: str, source: Any) -> tuple[Any, float]:
        began = time.perf_counter()
        try:
            item = encoder.load(source)
        except SamloveError as error:
            item = error
        except Exception as error:
            error.add_note(f"while reading {key!r}")
            raise
        return item, time.perf_counter() - began

    waiting: deque[tuple[str, Future]] = deque()
    rest = iter(sources.items())
    with ThreadPoolExecutor(READERS) as pool:
        try:
            while True:
                for key, source in islice(rest, ahead - len(waiting)):
                    waiting.append((key, pool.submit(read, key, source)))
                if not waiting:
                    return
                key, future = waiting.popleft()
                item, seconds = future.result()
                timing.read_s += seconds
                yield key, item
        finally:  # where the run ends early, what is queued need not be read
            pool.shutdown(wait=False, cancel_futures=True)


def _take(
    reading: Iterator[tuple[str, Any]], batch: list[str], stage: str, timing: Timing
) -> tuple[dict[str, Any], list[Failure]]:
    """The batch's items by key, and the failures among them."""
    began = time.perf_counter()
    read: dict[str, Any] = {}
    failures = []
    for key, item in islice(reading, len(batch)):
        if isinstance(item, SamloveError):
            failures.append(Failure(key, stage, str(item)))
        else:
            read[key] = item
    timing.wait_s += time.perf_counter() - began
    return read, failures


def _encode(encoder: Encoder, read: dict[str, Any], timing: Timing) -> dict[str, Arrays]:
    """The arrays of one batch by key."""
    if not read:
        return {}
    began = time.perf_counter()
    try:
        arrays = encoder.encode(list(read.values()))
    except SamloveError as error:
        keys = list(read)
        raise type(error)(f"{keys[0]} to {keys[-1]}: {error}") from error
    timing.compute_s += time.perf_counter() - began
    timing.items += len(arrays)
    timing.bytes += sum(array.nbytes for item in arrays for array in item.values())
    if not timing.first_batch:
        timing.first_batch, timing.warm_at = len(arrays), time.perf_counter()
    return dict(zip(read, arrays, strict=True))


def _check_budget(failures: list[Failure], items: int, ledger: Path) -> None:
    """Say which items failed; raise SamloveError where they are more than the budget."""
    if not failures:
        return
    shown = "; ".join(f"{failure.key}: {failure.error}" for failure in failures[:SHOWN])
    if len(failures) > FAILURE_BUDGET * items:
        write_failures(ledger, failures)
        raise SamloveError(
            f"{len(failures)} of {items} items cannot be read, expected at most {FAILURE_BUDGET:.0%}: {shown}; "
            f"all are in {ledger}; mend them and run the stage again, it computes only what lacks"
        )
    tqdm.write(f"{len(failures)} of {items} items cannot be read and are left out, see failures.csv: {shown}")
