"""Timing that all benchmarks share."""

import time
from collections.abc import Callable, Mapping
from random import Random
from typing import NamedTuple, TypeVar

Way = TypeVar("Way")
Measurement = TypeVar("Measurement")


class Spent(NamedTuple):
    """Seconds that some work took."""

    wall: float  # elapsed time
    cpu: float  # processor time of all threads of this process


def timed(work: Callable[[], object]) -> Spent:
    """Run `work` once and time it."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def in_turns(
    ways: Mapping[Way, Callable[[], Measurement]], rounds: int, shuffle: Random | None = None
) -> dict[Way, list[Measurement]]:
    """Call every way once per round, so that changes in the machine's load affect all ways alike.

    Returns {way: one result per round}. shuffle: draws a new order of the ways for each round.
    """
    results: dict[Way, list[Measurement]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in shuffle.sample(list(ways), len(ways)) if shuffle else ways:
            results[name].append(ways[name]())
    return results
