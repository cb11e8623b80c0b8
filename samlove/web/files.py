"""The temporary folder of the page: who uploaded or made what in it, and when it is deleted.

Everything is in a folder of its own directly below the temporary one. It is deleted when the sessions that use it have
ended, or when it was not used for an hour.
"""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock, Thread

MAX_AGE = 3600.0  # seconds
SWEEP = 60.0  # seconds between looking for old files


class Files:
    """The folders below `root`. Safe for several threads."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._kept: set[Path] = set()
        self._used: dict[str, set[Path]] = {}  # session -> folders
        self._lock, self._closed = Lock(), Event()
        Thread(target=self._sweep, daemon=True).start()

    def close(self) -> None:
        """Delete everything."""
        self._closed.set()
        shutil.rmtree(self.root, ignore_errors=True)

    def keep(self, path: Path) -> None:
        """Never delete the folder of this file before `close`."""
        self._kept.add(self._folder(path))

    def use(self, session: str, path: Path) -> None:
        """Note that a session uses this file; it counts as new from now on. Files elsewhere are ignored."""
        folder = self._folder(path)
        if folder != self.root and folder not in self._kept:
            with self._lock:
                self._used.setdefault(session, set()).add(folder)
            if folder.exists():
                os.utime(folder)

    def end(self, session: str) -> None:
        """Delete what only this session used."""
        with self._lock:
            folders = self._used.pop(session, set())
            for folder in folders.difference(*self._used.values()):
                _delete(folder)

    def delete_old(self, age: float = MAX_AGE) -> None:
        """Delete what was not used for `age` seconds."""
        for path in self.root.iterdir():
            with suppress(FileNotFoundError):  # its session ended meanwhile
                if path not in self._kept and time.time() - path.stat().st_mtime > age:
                    _delete(path)

    def _folder(self, path: Path) -> Path:
        """The folder directly below the root that has this file in it; the root itself for files elsewhere."""
        resolved = path.resolve()
        if resolved == self.root or not resolved.is_relative_to(self.root):
            return self.root
        return self.root / resolved.relative_to(self.root).parts[0]

    def _sweep(self) -> None:
        while not self._closed.wait(SWEEP):
            with suppress(OSError):
                self.delete_old()


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
