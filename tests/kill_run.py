"""One extraction in its own process, with a small real VGGish on short wavs, and a way to kill it at a given point."""

import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing.connection import wait
from pathlib import Path
from threading import Lock
from typing import Any

import distributed.dashboard.scheduler  # noqa: F401  # like torchvggish below: otherwise imported in every process
import numpy as np
import soundfile
import torch
import torchvggish.vggish_input  # noqa: F401

from samlove.config import AudioConfig
from samlove.errors import SamloveError
from samlove.features.encoders.vggish import VggishEncoder
from samlove.features.extract import Job, extract

SHARD, BATCH = 8, 3
# Audit events that change a folder; the interpreter raises each before the change. Between two of them the disk stays
# the same, except for the bytes of open files.
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC  # flags of open() that write
CONTEXT = multiprocessing.get_context("forkserver")  # torch is imported once, in a process without threads
STARTING = Lock()  # start() also polls processes of other threads, and two polls at once give wrong answers
CONTEXT.set_forkserver_preload(["tests.kill_run"])


def write_wavs(folder: Path, numbers: range) -> dict[str, Path]:
    """Half a second of a different tone each; every seventh file is not a valid wav."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {f"clip_{n:02}": folder / f"{n:02}.wav" for n in numbers}
    for n, path in zip(numbers, paths.values(), strict=True):
        if n % 7 == 6:
            path.write_bytes(b"")
        else:
            soundfile.write(path, 0.5 * np.sin(np.arange(8000) * (0.05 + 0.01 * n)), 16_000, subtype="PCM_16")
    return paths


def run(inputs: Path, config: AudioConfig, root: Path, report: Path, kill_at: int, file_limit: int) -> None:
    """Extract all wavs of `inputs` into root/store.

    kill_at: the number of the change before which to kill this process, or -1.
    file_limit: maximum file size in bytes, to simulate a full disk, or -1.
    A run that is not killed writes to `report`: {"events", "shards", "shards_written", "items", "text"} or
    {"events", "error"}.
    """
    torch.set_num_threads(1)
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if _changes(root, event, arguments):
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sources = {f"clip_{path.stem}": path for path in sorted(inputs.glob("*.wav"))}
    encoder = VggishEncoder(config, 1, torch.device("cpu"))
    sys.modules["samlove.features.extract"].FAILURE_BUDGET = 1.0  # type: ignore[attr-defined]
    sys.addaudithook(count)
    try:
        with _files_limited_to(file_limit):
            hashes = root / "hashes.sqlite"
            done = extract(Job(encoder, sources, root / "store", root / "scratch", SHARD, BATCH, hashes=hashes))
        result: dict[str, Any] = {"shards": done.shards, "shards_written": done.spent.shards_written}
        result |= {"items": done.spent.items, "text": str(done)}
    except SamloveError as error:
        result = {"error": str(error)}
    report.write_text(json.dumps({**result, "events": seen}))


def _changes(root: Path, event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an event is a change below `root`; Dask changes its own files elsewhere."""
    if event not in CHANGES and not (event == "open" and arguments[2] & WRITES):
        return False
    path = str(arguments[0])
    if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # rmtree passes a name relative to an open folder
        path = f"{os.readlink(f'/proc/self/fd/{arguments[1]}')}/{path}"
    return path.startswith(str(root))


@contextmanager
def _files_limited_to(size: int) -> Iterator[None]:
    """Make writes beyond `size` fail with EFBIG. Discards printed output, because it may go to a file too."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores the accompanying signal
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def run_apart(
    inputs: Path, config: AudioConfig, root: Path, kill_at: int = -1, after: float | None = None, file_limit: int = -1
) -> dict | None:
    """`run` in its own process; returns its report, or None if it was killed.

    after: kill it from outside after this many seconds.
    """
    report = root.with_name(f"{root.name}.json")
    report.unlink(missing_ok=True)
    process = CONTEXT.Process(target=run, args=(inputs, config, root, report, kill_at, file_limit))
    with STARTING:
        process.start()
    wait([process.sentinel], after)
    if after is not None:
        process.kill()
    wait([process.sentinel], 120)
    with STARTING:
        process.join(0)
    if process.exitcode == -signal.SIGKILL:
        return None
    assert process.exitcode == 0, process.exitcode
    result: dict = json.loads(report.read_text())
    return result
