"""Runs every feature stage: computes missing shards on Dask, then publishes the whole store.

One shard is one task (samlove.features.worker), on workers of this machine or of others (samlove.features.cluster).
Finished shards stay in scratch, so an interrupted run resumes there, and another worker recomputes the shard of a
worker that died. An item that cannot be read becomes a row of the failure log, and the run continues. A task carries
all that its worker must know about the shard, and only a few tasks per worker exist at a time. So the memory that the
run and the scheduler need for an item is little more than its key.

Extraction is incremental: a store keeps, for each item, the content hash of its source. An item is reused if this
hash, the fingerprint and the encoder's code are unchanged. It may come from the previously published store, from an
interrupted run, or from the store of another profile. Added videos go into new shards; changed and failed items are
recomputed in their shard; removed items are left out; all other shards are hard links to the existing files. DVC
removes a stage's outputs before it runs the stage, so scratch/last keeps links to the published files. Deleting the
scratch folder is always safe and costs only time.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from distributed import Future, KilledWorker
from distributed.comm import CommClosedError
from tqdm import tqdm

from samlove.config import ClusterConfig
from samlove.data.digest import code_digest, source_ids
from samlove.data.hashes import FileHashes
from samlove.errors import SamloveError
from samlove.features.cluster import LOCAL, connect, count_workers, finished, settle
from samlove.features.encoders.base import Encoder
from samlove.features.lock import only_run
from samlove.features.worker import HERE, Extraction, Shard, Timing, compute_shard
from stores import FeatureStoreWriter
from stores.chunks import Compression
from stores.features import Failure, write_failures

# A few bad files among thousands should not cost a night. More than one in a hundred means that something is wrong with
# the dataset, and results would not be comparable. Below a hundred items any failure is too many.
FAILURE_BUDGET = 0.01
SHOWN = 3  # failures in a message; the failure log has all of them
AHEAD = 4  # tasks per worker that exist at a time: two that it runs, two that it can start at once
LAST, LOCK, FAILURE_LOG = "last", "lock", "failures.csv"  # in the scratch folder


@dataclass(frozen=True)
class Job:
    """What one feature stage computes: every source, {key: argument of encoder.load}, into the store `out`.

    scratch: a folder for this store only, on the file system of `out` and outside every DVC output. shard_size,
    batch_size: items; a batch does not cross shards. chunk_rows, compression: as in FeatureStoreWriter. elsewhere:
    stores of other profiles, to reuse items from. hashes: the cache of file hashes; None: hash every file.
    """

    encoder: Encoder
    sources: Mapping[str, Any]
    out: Path
    scratch: Path
    shard_size: int
    batch_size: int
    chunk_rows: int | None = None
    compression: Compression = "none"
    elsewhere: Sequence[Path] = ()
    hashes: Path | None = None


@dataclass
class Report:
    """What a run did. spent: the sum over all workers."""

    total: int  # items in the store, if none fail
    shards: int = 0  # of the store
    workers: int = 0
    hash_s: float = 0.0  # seconds to hash the sources
    spent: Timing = field(default_factory=Timing)
    warm_at: float = 0.0  # when the first worker finished its first batch
    ended_at: float = 0.0

    def add(self, done: Shard) -> None:
        self.spent.add(done.timing)
        if done.warm_at:
            self.warm_at = min(done.warm_at, self.warm_at or done.warm_at)
        self.ended_at = max(self.ended_at, done.ended_at)

    @property
    def rate(self) -> float | None:
        """Items per second after each worker's first batch; None if there was no other batch."""
        items, seconds = self.spent.items - self.spent.first_batch, self.ended_at - self.warm_at
        return items / seconds if items > 0 and seconds > 0 else None

    def __str__(self) -> str:
        spent = self.spent
        reused = f"{self.shards - spent.shards_written} of {self.shards} shards reused"
        if not spent.items:
            return f"nothing to compute; {reused}"
        rate = f"{self.rate:.1f} items/s after warm-up" if self.rate else "one batch, no rate"
        read = f"read {spent.read_s:.1f} s in threads (waited for {spent.wait_s:.1f} s)"
        size = f"{spent.bytes / spent.items / 1e3:,.1f} kB per item"
        return (
            f"{spent.items} of {self.total} items computed by {self.workers} worker(s), {rate}; "
            f"hash {self.hash_s:.1f} s, {read}, compute {spent.compute_s:.1f} s, "
            f"write {spent.write_s:.1f} s in parallel; {size}; {reused}"
        )


def extract(job: Job, cluster: ClusterConfig = LOCAL, rehash: bool = False) -> Report:
    """Build the store of `job`, or complete it. Returns what the run did.

    rehash: hash every file, even if its size, modification time and inode are unchanged.

    Raises SamloveError if another run is using the store, if there is nothing to encode, if a value does not fit the
    store, if the disk is full, if workers keep dying, or if more than FAILURE_BUDGET of the items cannot be read.
    Then nothing is published, the previously published store stays, and the next run computes only missing items.
    """
    if not job.sources:
        raise SamloveError(f"{job.out}: expected items to encode, found none in the index; run: samlove audit DIR")
    try:
        return _extract(job, cluster, rehash)
    except OSError as error:  # usually a full disk
        raise SamloveError(
            f"{job.out}: cannot be written: {error}; fix that (e.g. free disk space) and run the same command again. "
            f"Finished shards are kept in {job.scratch}; only missing items are computed"
        ) from error


def _extract(job: Job, cluster: ClusterConfig, rehash: bool) -> Report:
    with only_run(job.scratch / LOCK, job.out) as token:
        report = Report(total=len(job.sources))
        began = time.perf_counter()
        with FileHashes(job.hashes, rehash) as hashes:
            ids = source_ids(job.sources, hashes, f"{job.out.name}: hash")
        report.hash_s = time.perf_counter() - began
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
            previous=(job.out, job.scratch / LAST, *job.elsewhere),
        )
        writer.clean()
        report.shards = len(writer.plan())
        failures = _compute(job, writer, token, cluster, report)
        _check_budget(failures, len(job.sources), job.scratch / FAILURE_LOG)
        writer.publish(failures, keep=job.scratch / LAST)
        _tidy(job.scratch)
    return report


def _compute(job: Job, writer: FeatureStoreWriter, token: str, cluster: ClusterConfig, report: Report) -> list[Failure]:
    """Have the workers write all incomplete shards. Returns the items that could not be read, in order."""
    todo = writer.todo()
    if not todo:
        return []
    run = f"samlove {job.out.name} {uuid4().hex[:8]}"
    failures: dict[int, list[Failure]] = {}
    with connect(cluster) as (client, threads):
        print(f"{job.out.name}: {count_workers(client)} worker(s); dashboard: {client.dashboard_link}")
        progress = _Progress(job, todo)
        plugin = Extraction(run, job.encoder, writer.staging, job.batch_size, job.scratch / LOCK, token, threads)

        def submit(number: int) -> Future:
            planned = writer.planned(number)
            sources = {key: job.sources[key] for key in planned}
            return client.submit(compute_shard, run, number, planned, sources, key=f"{run}-{number}", pure=False)

        HERE[run] = job.encoder
        running: set[Future] = set()
        try:
            client.register_plugin(plugin, name=run)
            client.subscribe_topic(run, progress.tell)
            for future in finished(client, submit, (number for number, _ in todo), AHEAD, running):
                done: Shard = future.result()  # never None before the run has ended
                failures[done.number] = done.failures
                report.add(done)
                progress.finish(done.number)
            report.workers = count_workers(client)
        except KilledWorker as error:
            raise SamloveError(
                f"{job.out}: gave up on {error.task} because every worker that ran it died, usually out of memory: "
                f"use fewer workers, or smaller shards in pipelines/{job.out.name.split('_')[0]}.py"
            ) from error
        except (CancelledError, CommClosedError) as error:
            raise SamloveError(
                f"{job.out}: lost the Dask scheduler; run the same command again, it computes only missing items"
            ) from error
        finally:
            progress.close()
            del HERE[run]
            if client.status == "running":
                with suppress(CommClosedError):  # the scheduler has just gone
                    client.unregister_worker_plugin(run)  # if the run ends early, workers stop after their batch
                    settle(client, running)
    return [failure for number, _ in todo for failure in failures[number]]


class _Progress:
    """A progress bar over items. Workers report after each batch how far they are in their shard."""

    def __init__(self, job: Job, todo: list[tuple[int, list[str]]]) -> None:
        self._sizes = {number: len(missing) for number, missing in todo}
        self._tried = dict.fromkeys(self._sizes, 0)
        before = len(job.sources) - sum(self._sizes.values())
        self._bar = tqdm(total=len(job.sources), initial=before, desc=job.out.name, unit="item", mininterval=2)

    def close(self) -> None:
        self._bar.close()

    def tell(self, event: tuple[float, list[int]]) -> None:
        """Handle a worker's report, [shard, items tried], which may arrive late."""
        number, tried = event[1]
        self._show(number, min(max(tried, self._tried[number]), self._sizes[number]))

    def finish(self, number: int) -> None:
        self._show(number, self._sizes[number])

    def _show(self, number: int, tried: int) -> None:
        self._bar.update(tried - self._tried[number])
        self._tried[number] = tried


def _tidy(scratch: Path) -> None:
    """Remove the leftovers of other encoders' interrupted runs and an old failure log from scratch."""
    for other in scratch.iterdir():
        if other.is_dir() and other.name != LAST:
            shutil.rmtree(other)
        elif other.name == FAILURE_LOG:
            other.unlink()


def _check_budget(failures: list[Failure], items: int, log: Path) -> None:
    """Print which items failed. Raises SamloveError if there are more than the budget allows."""
    if not failures:
        return
    shown = "; ".join(f"{failure.key}: {failure.error}" for failure in failures[:SHOWN])
    if len(failures) > FAILURE_BUDGET * items:
        write_failures(log, failures)
        raise SamloveError(
            f"{len(failures)} of {items} items cannot be read, expected at most {FAILURE_BUDGET:.0%}: {shown}; "
            f"all are in {log}; fix them and run the stage again, it computes only missing items"
        )
    tqdm.write(f"{len(failures)} of {items} items cannot be read and are left out; see failures.csv: {shown}")
