"""One run at a time on one store: a lock that the kernel lets go of when its holder ends, however it ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from samlove.errors import SamloveError


@contextmanager
def only_run(lock: Path, what: str | Path) -> Iterator[str]:
    """Hold `lock`, a file that is made where it lacks and never removed, while the block runs; its text is given.

    Raises SamloveError, naming the process that holds it, where another run is at work on `what`.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise SamloveError(
                f"{what}: expected no other run on it, found one at work (process {holder}); wait until it ends"
            ) from None
        file.truncate(0)
        holder = f"{os.getpid()} on {socket.gethostname()}\n"
        file.write(holder)
        file.flush()
        yield holder
