"""Items in a process of their own, one after the other. An error of the GPU leaves its process of no use, so the items
after it get a new one; and what takes too long is ended."""

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
    ends: bool = False  # whether its process ended with it
    late: bool = False  # whether the time was over, and nothing is known of it


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
                    process.process.terminate()  # it would be waited for
                yield waiting.pop(0), answer


def work(end: Connection, function: Function, items: Sequence[Any], setting: Setting) -> None:
    for item in items:
        try:
            answer = function(item, setting)
        except Exception as error:  # whatever it is, it is that item's result
            answer = Failed(f"{type(error).__name__}: {first_line(error)}", ends=_is_of_the_gpu(error))
        end.send(answer)
        if isinstance(answer, Failed) and answer.ends:
            return


def _is_of_the_gpu(error: Exception) -> bool:
    """Whether nothing more can be done on the GPU in this process, as after an address that is not there."""
    import torch

    kinds = tuple(kind for kind in (getattr(torch, "AcceleratorError", None),) if kind is not None)
    return isinstance(error, kinds) or "CUDA error" in str(error)
