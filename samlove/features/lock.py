"""One run at a time per store: a lock that the kernel releases when its holder ends, even if it is killed."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from samlove.errors import SamloveError


@contextmanager
def only_run(lock: Path, what: str | Path) -> Iterator[str]:
    """Hold the file `lock` while the block runs, and yield its text. The file is created if missing, never removed.

    Raises SamloveError, naming the process that holds the lock, if another run is using `what`.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise SamloveError(f"{what}: in use by another run (process {holder}); wait for it to finish") from None
        file.truncate(0)
        holder = f"{os.getpid()} on {socket.gethostname()}\n"
        file.write(holder)
        file.flush()
        yield holder
