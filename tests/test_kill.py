"""Extraction that is really killed at many points, or whose disk fills up, ends with the same store.

A point is the number of a change to the file system, so every kill is repeatable whatever else the machine does.
"""

import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from stores import FeatureStore
from stores.verify import verify
from tests.kill_run import run_apart, write_wavs
from tests.small_encoders import audio_config
from tests.store_kinds import tree

FIRST, MORE = range(22), range(22, 33)  # the first wavs, and those added later


class Trial:
    """Makes one store, from scratch or from a previous store after videos were added, changed and removed."""

    def __init__(self, root: Path, incremental: bool) -> None:
        self.root, self.incremental = root, incremental
        self.inputs, self.config = root / "inputs", audio_config(root / "weights")
        write_wavs(self.inputs, FIRST)
        if incremental:
            self.run(root / "base")
            write_wavs(self.inputs, MORE)
            shutil.copy(self.inputs / "01.wav", self.inputs / "02.wav")  # a changed video
            (self.inputs / "10.wav").unlink()  # a removed video
        for _ in range(2):  # the first process also waits for imports, which later ones share
            started = time.monotonic()
            whole = self.run(self.fresh("whole"))
            self.seconds = time.monotonic() - started
        assert whole is not None
        self.events, self.expected = whole["events"], tree(root / "whole" / "store")
        assert len(FeatureStore.open(root / "whole" / "store").failures) == (4 if incremental else 3)

    def fresh(self, name: str) -> Path:
        """A folder in which the store is not made yet."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        if self.incremental:
            shutil.copytree(self.root / "base", self.root / name)
        return self.root / name

    def run(self, root: Path, **kill: float) -> dict | None:
        return run_apart(self.inputs, self.config, root, **kill)  # type: ignore[arg-type]

    def finished(self, root: Path) -> int:
        """Number of complete shards, which need not be recomputed."""
        if (root / "store").exists() and tree(root / "store") == self.expected:
            return len(FeatureStore.open(root / "store").shards)
        staged = [path for path in root.glob("scratch/*/shard-*.zarr") if path.parent.name not in ("partial", "last")]
        return len(staged)


@pytest.fixture(
    params=[pytest.param(False, id="from_nothing", marks=pytest.mark.slow), pytest.param(True, id="incremental")]
)
def trial(request: pytest.FixtureRequest, tmp_path: Path) -> Trial:
    return Trial(tmp_path, request.param)


def kill_and_finish(trial: Trial, seed: int, times: int, by_clock: bool = False) -> None:
    """Kill at random points and run again, repeatedly. The store may be removed before a run, as DVC does."""
    rng = np.random.default_rng(seed)
    kills = survived = recomputed = whole = 0
    for number in range(times):
        root = trial.fresh("killed")
        killed, result = 0, None
        while result is None:  # one to three kills, then a run to its end
            if not killed and not by_clock:  # spread the first kills evenly over a whole run
                point = {"kill_at": int((number + rng.random()) / times * trial.events)}
            elif killed < rng.integers(1, 4):
                point = (
                    {"after": rng.uniform(0, trial.seconds)}
                    if by_clock
                    else {"kill_at": int(rng.integers(trial.events))}
                )
            else:
                point = {}
            if trial.incremental and killed and rng.random() < 0.5:
                shutil.rmtree(root / "store", ignore_errors=True)
            finished = trial.finished(root)
            result = trial.run(root, **point)
            killed += result is None
        assert tree(root / "store") == trial.expected, (seed, kills)
        assert "error" not in result
        if not trial.incremental:
            assert result["shards_written"] == result["shards"] - finished
        assert verify(root / "store", deep=True) == []
        assert sorted(p.name for p in (root / "scratch").iterdir()) == ["last", "lock"]
        kills, survived = kills + killed, survived + 1
        recomputed, whole = recomputed + result["shards_written"], whole + result["shards"]
    print(f"\n{kills} kills in {times} runs: {survived} ended bit-identical to an uninterrupted one;", end=" ")
    print(f"the last runs computed {recomputed} of {whole} shards")
    assert kills >= times // 2


def test_killed_runs_end_bit_identical(trial: Trial) -> None:
    kill_and_finish(trial, seed=0, times=4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_runs_killed_at_every_point_end_bit_identical(trial: Trial) -> None:
    """Kill before each change to the file system, then run to the end; two runs at a time."""
    points = range(trial.events)

    def kill_before(point: int) -> bool:
        root = trial.fresh(f"killed_{point}")
        assert trial.run(root, kill_at=point) is None
        if trial.incremental and point % 2:
            shutil.rmtree(root / "store", ignore_errors=True)
        assert trial.run(root) is not None
        same = tree(root / "store") == trial.expected
        shutil.rmtree(root)
        return same

    with ThreadPoolExecutor(2) as pool:
        survived = list(pool.map(kill_before, points))
    print(f"\nkilled at {len(points)} points: {sum(survived)} ended bit-identical to an uninterrupted run")
    assert [point for point, same in zip(points, survived, strict=True) if not same] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_runs_killed_from_outside_end_bit_identical(trial: Trial) -> None:
    """Kill after a random time, so possibly between two changes, while bytes are written or computed."""
    kill_and_finish(trial, seed=1, times=40, by_clock=True)


# --- a full disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs permission to mount a small file system: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_reported_and_survived(tmp_path: Path, small_disk: Path) -> None:
    """The disk grows by 8 kB per run, so that it fills up at each step: shards, checksums, manifest."""
    trial = Trial(tmp_path, incremental=False)
    result: dict | None = {"error": ""}
    full = -1
    while result and "error" in result:
        full += 1
        subprocess.run(["mount", "-o", f"remount,size={8 * (full + 1)}k", str(small_disk)], check=True)
        result = trial.run(small_disk)
        if result and "error" in result:
            assert "No space left on device" in result["error"]
            assert "\n" not in result["error"]
            assert not (small_disk / "store").exists()
    assert tree(small_disk / "store") == trial.expected
    print(f"\nfull {full} times, at sizes from 8 kB to {8 * full} kB; then complete and bit-identical")
    assert full > 3


@pytest.mark.slow
def test_a_file_size_limit_is_reported_and_survived(tmp_path: Path) -> None:
    """Simulates a full disk without mounting one: no file may exceed a limit, which increases from run to run.

    Each limit is the size of one of the store's files minus one byte; writing the first larger file fails.
    """
    trial = Trial(tmp_path, incremental=False)
    limits = sorted({len(content) - 1 for content in trial.expected.values()})
    root = tmp_path / "small"
    for limit in limits:
        result = trial.run(root, file_limit=limit)
        assert result is not None and "File too large" in result["error"], (limit, result)
        assert "\n" not in result["error"] and str(root / "scratch") in result["error"]
        assert not (root / "store").exists()
    assert "error" not in (trial.run(root) or {"error": "killed"})
    assert tree(root / "store") == trial.expected
    print(
        f"\nstopped at {len(limits)} file sizes from {limits[0]} to {limits[-1]} bytes; then complete and bit-identical"
    )
    assert len(limits) > 3
