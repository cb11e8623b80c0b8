"""The trainer's batches, read ahead by threads of the training process.

Reading a sample means copying arrays out of mapped files. NumPy copies them without Python's lock, so threads read in
parallel, and a batch needs no copy through the shared memory (/dev/shm) that separate processes would need.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

import numpy as np

AHEAD = 2  # batches that are read ahead, per thread
END_S = 2  # how long to wait, in seconds, for threads that are still reading when no more batches are wanted

Batch = dict[str, Any]


class Items(Protocol):
    """Samples by number. Several threads may read them at the same time."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Any: ...


Numbers = Sequence[int] | np.ndarray  # of items


def split(order: Numbers, size: int) -> list[Numbers]:
    """The parts of `size` items each, in this order; the last one may be smaller."""
    return [order[start : start + size] for start in range(0, len(order), size)]


def read_batches(
    items: Items, batches: Sequence[Numbers], collate: Callable[[list], Batch], threads: int
) -> Generator[Batch, None, None]:
    """Yield `collate` of the items of each batch, in order.

    threads: how many of them read ahead; 0: each batch is read when it is asked for. The batches are the same.
    Raises what reading an item raises. Closing the iterator ends the threads, except one that does not return from a
    read: that thread ends with the process, and does not keep it alive.
    """

    def read(numbers: Numbers) -> Batch:
        return collate([items[int(i)] for i in numbers])

    if not threads:
        yield from map(read, batches)
        return
    asked: SimpleQueue[tuple[Future[Batch], Numbers] | None] = SimpleQueue()
    waiting: deque[Future[Batch]] = deque()
    readers = [Thread(target=_read_all, args=(asked, read), daemon=True) for _ in range(min(threads, len(batches)))]
    for reader in readers:
        reader.start()
    try:
        for numbers in batches:
            waiting.append(Future())
            asked.put((waiting[-1], numbers))
            if len(waiting) > AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        for _ in readers:
            asked.put(None)
        until = time.monotonic() + END_S
        for reader in readers:
            reader.join(max(0, until - time.monotonic()))


def _read_all(asked: "SimpleQueue[tuple[Future[Batch], Numbers] | None]", read: Callable[[Numbers], Batch]) -> None:
    """Read the batches that are asked for, until there is a None."""
    while (task := asked.get()) is not None:
        future, numbers = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(read(numbers))
            except BaseException as error:
                future.set_exception(error)
