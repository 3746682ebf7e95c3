"""Runs items one after the other in a separate process. After an error of the GPU its process is unusable, so the next
items get a new one. An item that takes too long is ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ....common.errors import CheckFailedError, first_line
from ...paired_timing import MeasuringProcess
from .tables import Setting

Function = Callable[[Any, Setting], Any]


@dataclass(frozen=True)
class Failed:
    """The result of an item that raised an error."""

    message: str
    ends: bool = False  # whether it ended its process


def each(function: Function, items: Sequence[Any], setting: Setting) -> Iterator[tuple[Any, Any]]:
    """function(item, setting) of each item, or Failed, in order; stops when the time is over."""
    waiting = list(items)
    while waiting and time.monotonic() < setting.until:
        with MeasuringProcess(work, function, list(waiting), setting, until=setting.until) as process:
            alive = True
            while waiting and alive:
                try:
                    answer = process.answer()
                except CheckFailedError as error:  # the process was killed, or its time is over
                    answer = Failed(str(error), ends=True)
                alive = not (isinstance(answer, Failed) and answer.ends)
                yield waiting.pop(0), answer


def work(end: Connection, function: Function, items: Sequence[Any], setting: Setting) -> None:
    for item in items:
        try:
            answer = function(item, setting)
        except Exception as error:  # any error is the result of its item
            answer = Failed(f"{type(error).__name__}: {first_line(error)}", ends=_is_of_the_gpu(error))
        end.send(answer)
        if isinstance(answer, Failed) and answer.ends:
            return


def _is_of_the_gpu(error: Exception) -> bool:
    """Whether the GPU is unusable in this process after the error, for example after an illegal memory access."""
    import torch

    kinds = tuple(kind for kind in (getattr(torch, "AcceleratorError", None),) if kind is not None)
    return isinstance(error, kinds) or "CUDA error" in str(error)
