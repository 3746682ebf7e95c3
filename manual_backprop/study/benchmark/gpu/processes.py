"""Runs items one after the other in a child process. An error of the GPU makes its process unusable, so the items after
it get a new process. An item that takes too long is ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ....common.errors import CheckFailedError, first_line
from ...paired_timing import MeasuringProcess, NotInTime
from .tables import Setting

Function = Callable[[Any, Setting], Any]


@dataclass(frozen=True)
class Failed:
    """The result of an item that raised an error."""

    message: str
    ends: bool = False  # whether it ended its process
    late: bool = False  # whether the time was over before it had a result


def each(function: Function, items: Sequence[Any], setting: Setting) -> Iterator[tuple[Any, Any]]:
    """function(item, setting) of each item, or Failed, in order; no more items once the time is over."""
    waiting = list(items)
    while waiting and time.monotonic() < setting.until:
        with MeasuringProcess(work, function, list(waiting), setting, until=setting.until) as process:
            alive = True
            while waiting and alive:
                try:
                    answer = process.answer()
                except CheckFailedError as error:  # it was killed, or its time is over
                    answer = Failed(str(error), ends=True, late=isinstance(error, NotInTime))
                alive = not (isinstance(answer, Failed) and answer.ends)
                if isinstance(answer, Failed) and answer.late:
                    process.process.terminate()  # leaving the `with` waits for it
                yield waiting.pop(0), answer


def work(end: Connection, function: Function, items: Sequence[Any], setting: Setting) -> None:
    """In the child process: sends the result of each item through `end`; stops after an error of the GPU."""
    for item in items:
        try:
            answer = function(item, setting)
        except Exception as error:  # any error is the result of that item
            answer = Failed(f"{type(error).__name__}: {first_line(error)}", ends=_is_of_the_gpu(error))
        end.send(answer)
        if isinstance(answer, Failed) and answer.ends:
            return


def _is_of_the_gpu(error: Exception) -> bool:
    """Whether this process can no longer use the GPU, as after an access to an invalid address."""
    import torch

    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
