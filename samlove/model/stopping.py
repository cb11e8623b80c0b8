"""How SIGINT and SIGTERM end a training run: at a point where its state can be saved, in all processes alike."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, current_thread, main_thread
from typing import TypeVar

from samlove.model.processes import Processes

T = TypeVar("T")


class Stopped(Exception):
    """The run was asked to end, between two steps or in validation."""


class Stopping:
    """Raises `Stopped` in all processes of a run after any of them got a signal, or after `stop` was set in one."""

    def __init__(self, processes: Processes, stop: Event | None = None) -> None:
        self.processes, self._stop = processes, stop or Event()
        self._may_stop = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM while the block runs. A second signal ends the process at once.

        Of several processes, each ignores a second one, because a terminal or SLURM and torchrun may both send one.
        Outside the main thread, where Python handles no signals, only `stop` ends the run.
        """
        numbers = (signal.SIGINT, signal.SIGTERM) if current_thread() is main_thread() else ()
        before = {number: signal.getsignal(number) for number in numbers}

        def request_stop(number: int, frame: object) -> None:
            self._stop.set()
            if self.processes.count == 1:
                signal.signal(number, before[signal.Signals(number)])
            if self._may_stop:
                self._may_stop = False
                raise Stopped

        for number in before:
            signal.signal(number, request_stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that waits, and that a signal ends at once, because nothing has begun that must be finished."""
        try:
            self._may_stop = True
            if self._stop.is_set():
                raise Stopped
            yield
        except Stopped:
            self._may_stop = False
            self.exchange(None)
            raise
        finally:
            self._may_stop = False

    def exchange(self, mine: T | None) -> list[T]:
        """`Processes.exchange`. If any process passes None, because it was asked to stop, raises Stopped in all."""
        found = self.processes.exchange(mine)
        given = [each for each in found if each is not None]
        if len(given) < len(found):
            raise Stopped
        return given
