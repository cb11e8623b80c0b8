"""Extraction that is killed, for real, at many moments, or whose disk fills up: the same store in the end.

A moment is a change to the file system, counted; that makes every kill repeatable whatever else the machine does.
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

FIRST, MORE = range(22), range(22, 33)  # wavs at first, and those added later


class Trial:
    """One store to be made, from nothing or from the one before with media added and changed."""

    def __init__(self, root: Path, incremental: bool) -> None:
        self.root, self.incremental = root, incremental
        self.inputs, self.config = root / "inputs", audio_config(root / "weights")
        write_wavs(self.inputs, FIRST)
        if incremental:
            self.run(root / "base")
            write_wavs(self.inputs, MORE)
            shutil.copy(self.inputs / "01.wav", self.inputs / "02.wav")  # a changed medium
            (self.inputs / "10.wav").unlink()  # a removed one
        for _ in range(2):  # the first process of all waits for imports that the later ones share
            started = time.monotonic()
            whole = self.run(self.fresh("whole"))
            self.seconds = time.monotonic() - started
        assert whole is not None
        self.events, self.expected = whole["events"], tree(root / "whole" / "store")
        assert len(FeatureStore.open(root / "whole" / "store").failures) == (4 if incremental else 3)

    def fresh(self, name: str) -> Path:
        """A folder in which the store is still to be made."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        if self.incremental:
            shutil.copytree(self.root / "base", self.root / name)
        return self.root / name

    def run(self, root: Path, **kill: float) -> dict | None:
        return run_apart(self.inputs, self.config, root, **kill)  # type: ignore[arg-type]

    def finished(self, root: Path) -> int:
        """Shards that need not be computed again: none that is not whole counts."""
        if (root / "store").exists() and tree(root / "store") == self.expected:
            return len(FeatureStore.open(root / "store").manifest["shards"])
        staged = [path for path in root.glob("scratch/*/shard-*.zarr") if path.parent.name not in ("partial", "last")]
        return len(staged)


@pytest.fixture(params=[False, True], ids=["from_nothing", "incremental"])
def trial(request: pytest.FixtureRequest, tmp_path: Path) -> Trial:
    return Trial(tmp_path, request.param)


def kill_and_finish(trial: Trial, seed: int, times: int, by_clock: bool = False) -> None:
    """Kill at random moments, run again, and so on; DVC may remove the store before a run. Prints the counts."""
    rng = np.random.default_rng(seed)
    kills = survived = recomputed = whole = 0
    for number in range(times):
        root = trial.fresh("killed")
        killed, told = 0, None
        while told is None:  # a kill, perhaps another in the run that follows, then a run to its end
            if not killed and not by_clock:  # the first kills are spread evenly over a whole run
                moment = {"kill_at": int((number + rng.random()) / times * trial.events)}
            elif killed < rng.integers(1, 4):
                moment = (
                    {"after": rng.uniform(0, trial.seconds)}
                    if by_clock
                    else {"kill_at": int(rng.integers(trial.events))}
                )
            else:
                moment = {}
            if trial.incremental and killed and rng.random() < 0.5:
                shutil.rmtree(root / "store", ignore_errors=True)
            finished = trial.finished(root)
            told = trial.run(root, **moment)
            killed += told is None
        assert tree(root / "store") == trial.expected, (seed, kills)
        assert "error" not in told
        if not trial.incremental:
            assert told["shards_written"] == told["shards"] - finished
        assert verify(root / "store", deep=True) == []
        assert sorted(p.name for p in (root / "scratch").iterdir()) == ["last", "lock"]
        kills, survived = kills + killed, survived + 1
        recomputed, whole = recomputed + told["shards_written"], whole + told["shards"]
    print(f"\n{kills} kills in {times} runs: {survived} ended bit-identical to an uninterrupted one;", end=" ")
    print(f"their last runs computed {recomputed} of {whole} shards")
    assert kills >= times // 2


def test_killed_runs_end_bit_identical(trial: Trial) -> None:
    kill_and_finish(trial, seed=0, times=10)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_runs_end_bit_identical_at_every_moment(trial: Trial) -> None:
    """Before each single change to the file system, then run to the end; two runs at a time."""
    moments = range(trial.events)

    def kill_before(moment: int) -> bool:
        root = trial.fresh(f"killed_{moment}")
        assert trial.run(root, kill_at=moment) is None
        if trial.incremental and moment % 2:
            shutil.rmtree(root / "store", ignore_errors=True)
        assert trial.run(root) is not None
        same = tree(root / "store") == trial.expected
        shutil.rmtree(root)
        return same

    with ThreadPoolExecutor(2) as pool:
        survived = list(pool.map(kill_before, moments))
    print(f"\nkilled at {len(moments)} moments: {sum(survived)} ended bit-identical to an uninterrupted run")
    assert [moment for moment, same in zip(moments, survived, strict=True) if not same] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_from_outside_runs_end_bit_identical(trial: Trial) -> None:
    """By the clock, so that a kill may fall between two changes: while bytes are written, or computed."""
    kill_and_finish(trial, seed=1, times=40, by_clock=True)


# --- a full disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a small file system: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_and_survived(tmp_path: Path, small_disk: Path) -> None:
    """The disk grows by 8 kB a run, so that it fills up at each stage of the work: shards, checksums, manifest."""
    trial = Trial(tmp_path, incremental=False)
    told: dict | None = {"error": ""}
    full = -1
    while told and "error" in told:
        full += 1
        subprocess.run(["mount", "-o", f"remount,size={8 * (full + 1)}k", str(small_disk)], check=True)
        told = trial.run(small_disk)
        if told and "error" in told:
            assert "No space left on device" in told["error"]
            assert "\n" not in told["error"]
            assert not (small_disk / "store").exists()
    assert tree(small_disk / "store") == trial.expected
    print(f"\nfull {full} times, at sizes from 8 kB to {8 * full} kB; then whole, bit-identical")
    assert full > 3


def test_a_file_that_cannot_be_written_to_its_end_is_told_and_survived(tmp_path: Path) -> None:
    """As a full disk, without the right to mount one: no file may outgrow a limit, which rises from run to run.

    The limits are the sizes of the store's files less one byte: whichever is written first of those beyond it fails.
    """
    trial = Trial(tmp_path, incremental=False)
    limits = sorted({len(content) - 1 for content in trial.expected.values()})
    root = tmp_path / "small"
    for limit in limits:
        told = trial.run(root, file_limit=limit)
        assert told is not None and "File too large" in told["error"], (limit, told)
        assert "\n" not in told["error"] and str(root / "scratch") in told["error"]
        assert not (root / "store").exists()
    assert "error" not in (trial.run(root) or {"error": "killed"})
    assert tree(root / "store") == trial.expected
    print(
        f"\nstopped at {len(limits)} sizes of a file, from {limits[0]} to {limits[-1]} bytes; then whole, bit-identical"
    )
    assert len(limits) > 3
