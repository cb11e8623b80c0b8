"""The runner of every feature stage: what is lacking is computed shard by shard on Dask, then published whole.

A shard is one task (samlove.features.worker), of workers of this machine or of others (samlove.features.cluster).
A finished shard stays in scratch, so a stopped run takes up where it was, and the shard of a worker that died is
computed by another. What cannot be read becomes a row of the failure ledger and the rest goes on.

Incremental: each row is kept with the content hash of what it was computed from. A row of the store made before, or
of a stopped run, is reused where that hash, the fingerprint and the encoder's code are still the same: media that were
added go into shards of their own, changed and failed ones are computed and put into their shard, removed ones are left
out, and all other shards are hard links to the files that were there. DVC removes a stage's outs before it runs the
stage, so links to the published files are kept in scratch/last; removing the scratch folder is always safe and costs
but time.
"""

import shutil
import time
from collections.abc import Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from distributed import Client, Future, KilledWorker, as_completed, wait
from tqdm import tqdm

from samlove.data.digest import code_digest, source_ids
from samlove.errors import SamloveError
from samlove.features.cluster import LOCAL, Cluster, connect
from samlove.features.encoders.base import Encoder
from samlove.features.lock import only_run
from samlove.features.worker import HERE, Extraction, Shard, Timing, compute_shard
from stores import FeatureStoreWriter
from stores.chunks import Compression
from stores.features import Failure, write_failures

# A few bad files among thousands should not cost a night; more than one in a hundred says that something is wrong with
# the whole, and results would no longer compare. Below a hundred items any failure is too many.
FAILURE_BUDGET = 0.01
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
class Report:
    """What a run did. spent: summed over all workers."""

    total: int  # items asked for
    shards: int = 0  # of the whole store
    workers: int = 0
    hash_s: float = 0.0  # of what is to be read
    spent: Timing = field(default_factory=Timing)
    warm_at: float = 0.0  # the first worker's first batch was computed
    ended_at: float = 0.0

    def add(self, done: Shard) -> None:
        self.spent.add(done.timing)
        if done.warm_at:
            self.warm_at = min(done.warm_at, self.warm_at or done.warm_at)
        self.ended_at = max(self.ended_at, done.ended_at)

    @property
    def rate(self) -> float | None:
        """Items a second after each worker's first batch; None where there was no other."""
        items, seconds = self.spent.items - self.spent.first_batch, self.ended_at - self.warm_at
        return items / seconds if items > 0 and seconds > 0 else None

    def __str__(self) -> str:
        spent = self.spent
        reused = f"{self.shards - spent.shards_written} of {self.shards} shards were finished before"
        if not spent.items:
            return f"nothing to compute; {reused}"
        rate = f"{self.rate:.1f} items/s after warm-up" if self.rate else "one batch, no rate"
        read = f"read {spent.read_s:.1f} s in threads (waited for {spent.wait_s:.1f} s)"
        size = f"{spent.bytes / spent.items / 1e3:,.1f} kB an item"
        return (
            f"{spent.items} of {self.total} items computed by {_counted(self.workers)}, {rate}; "
            f"hash {self.hash_s:.1f} s, {read}, compute {spent.compute_s:.1f} s, "
            f"write {spent.write_s:.1f} s beside it; {size}; {reused}"
        )


def extract(job: Job, cluster: Cluster = LOCAL) -> Report:
    """Make or complete the store of `job`; what happened is returned.

    Raises SamloveError where another run is at work on it, where there is nothing to encode, where a value does not
    fit the store, where the disk is full, where workers die again and again, and where more than FAILURE_BUDGET of the
    items cannot be read; then nothing is published, what was published before stays, and another run computes only
    what lacks.
    """
    if not job.sources:
        raise SamloveError(f"{job.out}: expected items to encode, found none in the index; see: samlove audit")
    try:
        return _extract(job, cluster)
    except OSError as error:  # the disk is full, most often
        raise SamloveError(
            f"{job.out}: cannot be made: {error}; what is finished stays in {job.scratch}: mend that (free space, "
            "say) and run the same command again, it computes only what lacks"
        ) from error


def _extract(job: Job, cluster: Cluster) -> Report:
    with only_run(job.scratch / LOCK, job.out) as token:
        report = Report(total=len(job.sources))
        began = time.perf_counter()
        ids = source_ids(job.sources)
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
            previous=(job.out, job.scratch / LAST),
        )
        writer.clean()
        report.shards = len(writer.plan())
        failures = _compute(job, writer, token, cluster, report)
        _check_budget(failures, len(job.sources), job.scratch / LEDGER)
        writer.publish(failures, keep=job.scratch / LAST)
        _tidy(job.scratch)
    return report


def _compute(job: Job, writer: FeatureStoreWriter, token: str, cluster: Cluster, report: Report) -> list[Failure]:
    """Have the workers write all shards that lack something; the items that could not be read, in order."""
    todo = writer.todo()
    if not todo:
        return []
    run = f"samlove {job.out.name} {uuid4().hex[:8]}"
    failures: dict[int, list[Failure]] = {}
    with connect(cluster) as (client, threads):
        print(f"{job.out.name}: on {_counted(_workers(client))}; dashboard: {client.dashboard_link}")
        progress = _Progress(job, todo)
        plugin = Extraction(run, job.encoder, writer, job.batch_size, job.scratch / LOCK, token, threads)
        futures: list[Future] = []
        HERE[run] = job.encoder
        try:
            client.register_plugin(plugin, name=run)
            client.subscribe_topic(run, progress.tell)
            for number, lacking in todo:
                sources = {key: job.sources[key] for key in lacking}
                futures.append(client.submit(compute_shard, run, number, sources, key=f"{run}-{number}", pure=False))
            for future in as_completed(futures):
                done: Shard = future.result()  # never None: the run has not ended
                failures[done.number] = done.failures
                report.add(done)
                progress.finish(done.number)
            report.workers = _workers(client)
        except KilledWorker as error:
            raise SamloveError(
                f"{job.out}: {error.task} was given up, for every worker that computed it died; out of memory, most "
                f"often: use fewer workers, or smaller shards in pipelines/{job.out.name.split('_')[0]}.py"
            ) from error
        except CancelledError as error:
            raise SamloveError(
                f"{job.out}: the Dask scheduler went away; run the same command again, it computes only what lacks"
            ) from error
        finally:
            progress.close()
            del HERE[run]
            if client.status == "running":  # the scheduler is there
                client.unregister_worker_plugin(run)  # where the run ends early, workers stop after their batch
                _settle(client, futures)
    return [failure for number, _ in todo for failure in failures[number]]


def _settle(client: Client, futures: list[Future]) -> None:
    """Wait until no worker is at these tasks any more: what is being written is finished."""
    while not all(future.done() for future in futures) and _workers(client):
        with suppress(TimeoutError):
            wait(futures, timeout=1)


def _workers(client: Client) -> int:
    return len(client.scheduler_info(n_workers=-1)["workers"])


def _counted(workers: int) -> str:
    return f"{workers} worker{'s' * (workers != 1)}"


class _Progress:
    """A bar of items. Workers tell after each batch how far they are with their shard."""

    def __init__(self, job: Job, todo: list[tuple[int, list[str]]]) -> None:
        self._sizes = {number: len(lacking) for number, lacking in todo}
        self._tried: dict[int, int] = {}
        self._before = len(job.sources) - sum(self._sizes.values())
        self._bar = tqdm(total=len(job.sources), initial=self._before, desc=job.out.name, unit="item", mininterval=2)

    def close(self) -> None:
        self._bar.close()

    def tell(self, event: tuple[float, list[int]]) -> None:
        """A worker's word, which may come late: [shard, items tried]."""
        number, tried = event[1]
        self._show(number, max(tried, self._tried.get(number, 0)))

    def finish(self, number: int) -> None:
        self._show(number, self._sizes[number])

    def _show(self, number: int, tried: int) -> None:
        self._tried[number] = tried
        self._bar.update(self._before + sum(self._tried.values()) - self._bar.n)


def _tidy(scratch: Path) -> None:
    """Remove what other encoders' stopped runs and an earlier ledger left in scratch."""
    for other in scratch.iterdir():
        if other.is_dir() and other.name != LAST:
            shutil.rmtree(other)
        elif other.name == LEDGER:
            other.unlink()


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
