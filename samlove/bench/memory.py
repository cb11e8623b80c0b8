"""Time, memory and open files of some work, measured in a process of its own."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from samlove.bench.timing import timed
from samlove.errors import SamloveError

STATUS, FILES = Path("/proc/self/status"), Path("/proc/self/fd")  # exist on Linux only
SPAWN = get_context("spawn")

Work = Callable[[], object]
Prepare = Callable[..., Work]  # returns the work to time; a function of a module, which a new process can import


class Measured(NamedTuple):
    """What the work took. MB are 10^6 bytes."""

    seconds: float  # elapsed
    cpu_seconds: float
    peak_mb: float  # largest resident memory, less that before the step
    private_mb: float  # additional memory at the end, without pages of mapped files: these are shared by all processes
    files: int  # additional open files at the end


def _measure(results: Connection, prepare: Prepare, arguments: tuple[Any, ...]) -> None:
    """Run a step in this process, and send what it took or, if it fails, the reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then kills this process
    before, files = _memory(), len(os.listdir(FILES))
    kept = []  # the result of the work, so that its memory counts
    try:
        with open(os.devnull, "w", encoding="utf-8") as null, redirect_stdout(null), redirect_stderr(null):
            work = prepare(*arguments)
            spent = timed(lambda: kept.append(work()))
    except (SamloveError, OSError, MemoryError) as error:
        results.send(f"{type(error).__name__}: {error}")
    else:
        memory, opened = _memory(), len(os.listdir(FILES)) - files
        peak, private = memory["VmHWM"] - before["VmRSS"], memory["RssAnon"] - before["RssAnon"]
        results.send(Measured(round(spent.wall, 4), round(spent.cpu, 4), round(peak, 1), round(private, 1), opened))


def _memory() -> dict[str, float]:
    """MB of this process: resident (VmRSS), the peak of that (VmHWM), and resident without mapped files (RssAnon)."""
    fields = (line.split() for line in STATUS.read_text(encoding="utf-8").splitlines())
    return {name.rstrip(":"): int(rest[0]) * 1024 / 1e6 for name, *rest in fields if name.startswith(("Vm", "Rss"))}


def measure(
    prepare: Prepare, arguments: tuple[Any, ...], limit: float, tick: Callable[[], object] = lambda: None
) -> Measured | None:
    """Run a step in a new process; None if it is not done after `limit` seconds. Calls `tick` every 2 seconds.

    Raises SamloveError if the step fails or its process dies.
    """
    receiver, sender = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=_measure, args=(sender, prepare, arguments))
    process.start()
    sender.close()
    end = time.monotonic() + limit
    try:
        while not receiver.poll(2):
            tick()
            if time.monotonic() > end:
                return None
        result = receiver.recv()
        process.join()
    except EOFError:
        raise SamloveError("its process died, usually because memory ran out") from None
    finally:
        process.kill()
        process.join()
    if isinstance(result, str):
        raise SamloveError(result)
    return result
