"""The runner of every feature stage: read, encode, write, shard by shard, into a feature store.

Items are read by threads, ahead of the encoder. A finished shard stays in scratch, so a stopped run takes up where it
was; the store is published whole. What cannot be read becomes a row of the failure ledger and the rest goes on.
"""

import hashlib
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

from samlove.encoders.base import Arrays, Encoder
from samlove.errors import SamloveError
from stores import FeatureStoreWriter
from stores.chunks import Compression
from stores.features import Failure
from stores.manifest import write_json

# A few bad files among thousands should not cost a night; more than one in a hundred says that something is wrong with
# the whole, and results would no longer compare. Below a hundred items any failure is too many.
FAILURE_BUDGET = 0.01
READERS = 4  # threads: decoding leaves Python's lock, and one encoder seldom outruns four
SHOWN = 3  # failures named in a message; the ledger has them all


@dataclass
class Timing:
    """Where a run's time went. read_s is summed over the reading threads; the others are the main thread's."""

    items: int = 0  # computed in this run
    bytes: int = 0  # of their arrays
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
        if not self.items:
            return "nothing left to compute"
        rate = f"{self.rate:.1f} items/s after warm-up" if self.rate else "one batch, no rate"
        read = f"read {self.read_s:.1f} s in threads (waited for {self.wait_s:.1f} s)"
        size = f"{self.bytes / self.items / 1e3:,.1f} kB an item"
        return (
            f"{self.items} items computed, {rate}; {read}, compute {self.compute_s:.1f} s, write {self.write_s:.1f} s; "
            f"{size}"
        )


def extract(
    encoder: Encoder,
    sources: Mapping[str, Any],
    out: Path,
    scratch: Path,
    shard_size: int,
    batch_size: int,
    chunk_rows: int | None = None,
    compression: Compression = "none",
) -> Timing:
    """Encode all `sources`, {key: what encoder.load takes}, into the feature store `out`; what happened is returned.

    scratch: a folder on the same file system as `out`, outside every DVC out; what a stopped run left there is used if
    encoder, keys and files are still the same. shard_size, batch_size: items. chunk_rows, compression: as in
    FeatureStoreWriter.
    Raises SamloveError where there is nothing to encode, where a value does not fit the store, and where more than
    FAILURE_BUDGET of the items cannot be read; then nothing is published, and another run computes only what lacks.
    """
    stage = out.name
    if not sources:
        raise SamloveError(f"{out}: expected items to encode, found none in the index; see: samlove audit")
    mine = scratch / _identity(sources)
    for other in scratch.iterdir() if scratch.exists() else ():
        if other != mine:  # of other files, or of files that have changed since
            shutil.rmtree(other)
    writer = FeatureStoreWriter(out, mine, encoder.fingerprint(), list(sources), shard_size, chunk_rows, compression)
    timing, failures = Timing(), []
    todo = writer.todo()
    keys = [key for _, planned in todo for key in planned]
    with tqdm(total=len(sources), initial=len(sources) - len(keys), desc=stage, unit="item", mininterval=2) as bar:
        reading = _read_ahead(encoder, {key: sources[key] for key in keys}, 2 * batch_size, timing)
        for number, planned in todo:
            items: dict[str, Arrays] = {}
            for batch in (planned[i : i + batch_size] for i in range(0, len(planned), batch_size)):
                read, failed = _take(reading, batch, stage, timing)
                failures += failed
                items |= _encode(encoder, read, timing)
                bar.update(len(batch))
            began = time.perf_counter()
            writer.write_shard(number, items)
            timing.write_s += time.perf_counter() - began
    timing.ended_at = time.perf_counter()
    _check_budget(failures, len(sources), mine)
    writer.publish(failures)
    shutil.rmtree(scratch, ignore_errors=True)
    return timing


def _identity(sources: Mapping[str, Any]) -> str:
    """12 hex digits that change with the keys, the paths, and the size or time of change of any file read."""
    digest = hashlib.sha256()
    for key, source in sources.items():
        digest.update(f"{key}\0".encode())
        for part in source if isinstance(source, list) else [source]:
            state = part.stat() if isinstance(part, Path) and part.exists() else None
            digest.update(f"{part}\0{(state.st_size, state.st_mtime_ns) if state else None}\n".encode())
    return digest.hexdigest()[:12]


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


def _check_budget(failures: list[Failure], items: int, scratch: Path) -> None:
    """Say which items failed; raise SamloveError where they are more than the budget."""
    if not failures:
        return
    shown = "; ".join(f"{failure.key}: {failure.error}" for failure in failures[:SHOWN])
    if len(failures) > FAILURE_BUDGET * items:
        ledger = scratch / "failures.json"
        write_json(ledger, {failure.key: failure.error for failure in failures})
        raise SamloveError(
            f"{len(failures)} of {items} items cannot be read, expected at most {FAILURE_BUDGET:.0%}: {shown}; "
            f"all are in {ledger}; mend them and run the stage again, it computes only what lacks"
        )
    tqdm.write(f"{len(failures)} of {items} items cannot be read and are left out, see failures.csv: {shown}")
