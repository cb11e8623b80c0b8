"""Measuring in a process of its own: time, memory and open files are those of the work, and failures are reported."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from samlove.bench.memory import Work, measure
from samlove.errors import SamloveError


def hungry(path: Path) -> Work:
    prepared = np.ones(20_000_000, np.uint8)

    def work() -> object:
        np.ones(100_000_000, np.uint8)
        mapped = np.memmap(path, np.uint8, "r")
        mapped.sum()
        time.sleep(0.2)
        return prepared, mapped, np.ones(30_000_000, np.uint8), [open(os.devnull) for _ in range(4)]

    return work


def test_memory_and_files_are_those_of_the_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10_000_000))
    found = measure(hungry, (tmp_path / "file",), limit=60)
    assert found is not None
    assert found.seconds >= 0.2
    assert 115 <= found.peak_mb < 135  # what was prepared and the largest array, of which the end keeps less
    assert 45 <= found.private_mb < 58  # without the mapped file
    assert found.files == 5  # with the mapped file


def growing(_: Path, megabytes: int) -> Work:
    return lambda: np.ones((megabytes, 1_000_000), np.uint8)


def slow(*_: object) -> Work:
    return lambda: time.sleep(600)


def failing(*_: object) -> Work:
    raise SamloveError("found a fault")


def dying(*_: object) -> Work:
    return lambda: os._exit(1)


def test_a_step_that_ends_badly() -> None:
    assert measure(slow, (), limit=0) is None
    with pytest.raises(SamloveError, match="found a fault"):
        measure(failing, (), limit=60)
    with pytest.raises(SamloveError, match="process died"):
        measure(dying, (), limit=60)
