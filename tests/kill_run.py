"""One extraction in a process of its own: a small real VGGish on short wavs, and a way to kill it at a given moment."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from samlove.encoders.vggish import VggishEncoder
from samlove.errors import SamloveError
from samlove.extract import Job, extract
from tests.small_encoders import audio_config

SHARD, BATCH = 8, 3
# What changes a folder. The interpreter announces each before it happens, "open" also of the files that it reads.
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link")
CONTEXT = multiprocessing.get_context("forkserver")  # torch is imported once, in a process without threads
CONTEXT.set_forkserver_preload(["tests.kill_run"])


def write_wavs(folder: Path, numbers: range) -> dict[str, Path]:
    """Half a second of a tone of its own each; every seventh is no wav at all."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {f"clip_{n:02}": folder / f"{n:02}.wav" for n in numbers}
    for n, path in zip(numbers, paths.values(), strict=True):
        if n % 7 == 6:
            path.write_bytes(b"")
        else:
            soundfile.write(path, 0.5 * np.sin(np.arange(8000) * (0.05 + 0.01 * n)), 16_000, subtype="PCM_16")
    return paths


def run(inputs: Path, root: Path, kill_at: int, report: Path) -> None:
    """Extract all wavs of `inputs` into root/store; kill_at: the event before which to kill this process, or -1.

    A run that lives writes to `report`: {"events", "shards", "shards_written", "items"} or {"error"}.
    """
    torch.set_num_threads(1)
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in EVENTS and str(arguments[0]).startswith(str(root)):  # Dask has files of its own
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sources = {f"clip_{path.stem}": path for path in sorted(inputs.glob("*.wav"))}
    encoder = VggishEncoder(audio_config(inputs / "weights"), 1, torch.device("cpu"))
    sys.modules["samlove.extract"].FAILURE_BUDGET = 1.0  # type: ignore[attr-defined]
    sys.addaudithook(count)
    try:
        done = extract(Job(encoder, sources, root / "store", root / "scratch", SHARD, BATCH))
        told: dict[str, Any] = {"shards": done.shards, "shards_written": done.spent.shards_written}
        told |= {"items": done.spent.items, "text": str(done)}
    except SamloveError as error:
        told = {"error": str(error)}
    report.write_text(json.dumps({**told, "events": seen}))


def run_apart(inputs: Path, root: Path, report: Path, kill_at: int = -1, after: float | None = None) -> dict | None:
    """`run` in a process of its own; what it told, None where it was killed.

    after: kill it from outside after so many seconds, wherever it is then.
    """
    report.unlink(missing_ok=True)
    process = CONTEXT.Process(target=run, args=(inputs, root, kill_at, report))
    process.start()
    process.join(after)
    if after is not None:
        process.kill()
    process.join(120)
    if process.exitcode == -signal.SIGKILL:
        return None
    assert process.exitcode == 0, process.exitcode
    told: dict = json.loads(report.read_text())
    return told
