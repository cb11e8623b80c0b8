"""One run at a time per store: a lock that the kernel releases when its holder ends, even if it is killed."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from samlove.errors import NO_LOCKS, SamloveError


@contextmanager
def only_run(lock: Path, what: str | Path) -> Iterator[str]:
    """Hold the file `lock` while the block runs, and yield its text. The file is created if missing, never removed.

    On a file system without locks, a second file beside it is held by creating it; a killed run leaves that file.
    Raises SamloveError, naming the process that holds the lock, if another run is using `what`.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    holder = f"{os.getpid()} on {socket.gethostname()}\n"
    with ExitStack() as held:
        file = held.enter_context(open(lock, "a+", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(what, lock) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            held.enter_context(_created(lock.with_name(f"{lock.name}.held"), holder, what))
        file.truncate(0)
        file.write(holder)
        file.flush()
        yield holder


@contextmanager
def _created(path: Path, holder: str, what: str | Path) -> Iterator[None]:
    """Create `path` with the text `holder`, and remove it when the block ends; no other run can create it meanwhile."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(holder)
    except FileExistsError:
        remedy = f"; or, if that process was killed (this file system has no locks to tell), delete {path}"
        raise _in_use(what, path, remedy) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _in_use(what: str | Path, named_in: Path, remedy: str = "") -> SamloveError:
    holder = named_in.read_text(encoding="utf-8").strip() or "unknown"
    return SamloveError(f"{what}: in use by another run (process {holder}); wait for it to finish{remedy}")
