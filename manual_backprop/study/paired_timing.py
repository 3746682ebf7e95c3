"""Paired measurements: the compared rows take turns, and ratios are taken turn by turn. Needs no torch.

Rows run in the order A B C, C B A, A B C ..., so that a machine that slows down slows all of them alike. A row that
appears twice gives the noise floor: no smaller difference may be claimed. The caller defines what a row does in its
turn, and the limits. `MeasuringProcess` is a process for a row that needs its own.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..common.errors import CheckFailedError, InputError
from ..common.startup.output import endure_output

if TYPE_CHECKING:
    import torch

SHUTDOWN_TIMEOUT = 10.0  # [s] for a measuring process to end by itself


@dataclass
class Row:
    """The seconds a step of each turn, and the processor seconds a step if they are measured."""

    name: str
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """[s]"""
        return statistics.median(self.seconds)


def turns(rows: int, times: int) -> Iterator[Sequence[int]]:
    """The indices of all rows in the order of their turns, `times` times: forward, backward, forward ..."""
    there = range(rows)
    for turn in range(times):
        yield there if turn % 2 == 0 else there[::-1]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; a single value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(mine: Sequence[float], its: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of mine / its, turn by turn."""
    return quartiles([one / other for one, other in zip(mine, its, strict=True)])


def noise_floor(again: Sequence[float], first: Sequence[float]) -> float:
    """The noise of a row that was measured twice: the distance of its ratio from 1, or the spread of the ratio,
    whichever is larger."""
    low, middle, high = ratios(again, first)
    return max(abs(middle - 1), (high - low) / 2)


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has done its work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def seconds_of(
    work: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The time until some work on a device is done [s]."""
    begin = clock()
    work()
    wait_for(device)
    return clock() - begin


class NotInTime(CheckFailedError):
    """A measuring process did not answer in time."""


class MeasuringProcess:
    """A new process that measures on request. It shares no state with this process.

    It runs `work(end, *arguments)`, a function of a module, which receives questions and sends answers through `end`.
    Leaving the `with` block ends the process.
    """

    def __init__(self, work: Callable[..., None], *arguments: Any, advice: str = "", until: float | None = None):
        """`advice`: a sentence on what to try if the process is killed. `until`: the deadline, by time.monotonic(), for
        its answers."""
        context = multiprocessing.get_context("spawn")
        self.end, theirs = context.Pipe()
        self.advice, self.until = advice, until
        self.process = context.Process(target=_run, args=(work, theirs, arguments), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe closes when the process ends

    def __enter__(self) -> MeasuringProcess:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end.close()
        self.process.join(SHUTDOWN_TIMEOUT if kind is None else 0)
        self.process.terminate()
        self.process.join()

    def ask(self, question: Any) -> Any:
        """The answer to a question. Raises CheckFailedError if the process failed or ended."""
        with suppress(OSError):  # the process has ended: `answer` reports how
            self.end.send(question)
        return self.answer()

    def answer(self) -> Any:
        """The next answer, without a question. Raises CheckFailedError like `ask`."""
        if self.until is not None and not self.end.poll(max(0.0, self.until - time.monotonic())):
            raise NotInTime("A measuring process did not answer in time")
        try:
            answer = self.end.recv()
        except (EOFError, OSError):
            self.process.join(SHUTDOWN_TIMEOUT)
            code = self.process.exitcode
            how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
            raise CheckFailedError(f"A measuring process {how} before it answered. {self.advice}".rstrip()) from None
        if isinstance(answer, CheckFailedError):
            raise answer
        return answer


def _run(work: Callable[..., None], end: Connection, arguments: tuple[Any, ...]) -> None:
    try:
        work(end, *arguments)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the other end is closed
    except Exception as error:
        end.send(CheckFailedError(f"A measuring process failed: {type(error).__name__}: {error}"))


def check_output(option: str, path: Path | None) -> None:
    """Raises InputError before anything is measured if the result could not be written afterwards. What is written does
    not depend on whether the output is read."""
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{option} {path}: expected a file in a folder that exists")
    endure_output()
