"""Signals (INT, TERM, HUP, USR1, USR2) as a request: finish the step, save, exit. A second signal ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from .errors import Interrupted

# SIGHUP: the terminal was closed; SIGUSR1 and SIGUSR2: a cluster announces the end of the job (Slurm's --signal)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def exit_on_signal() -> None:
    """End the process at once on a signal, while a command imports and validates; an Interruption replaces this.

    An exception would not work: some of the imported libraries catch every exception, and the signal would be lost.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{signal.Signals(number).name}: nothing was started yet.\n".encode())
        os._exit(128 + number)

    for number in _not_ignored():
        signal.signal(number, leave)


class Interruption:
    """`with Interruption() as interruption`: until `defer()` is called, a signal raises Interrupted at once. After it,
    the signal's number is stored in `received`, which the loop reads between two steps.

    Only the main thread may handle signals; in another thread this does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _not_ignored()}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on a signal only sets `received`; the loop reads it."""
        self._deferred = True

    def raise_if_received(self, what_happened: str) -> None:
        if self.received is not None:
            raise Interrupted(self.received, f"{signal.Signals(self.received).name}: {what_happened}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = number
        if not self._deferred:
            self.raise_if_received("no step was made, so there was nothing to save.")


def _not_ignored() -> list[signal.Signals]:
    """The signals to handle. Those that nohup or a background job of a shell ignores stay ignored."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
