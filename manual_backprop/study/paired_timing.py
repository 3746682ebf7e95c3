"""Measurements in pairs: what is compared takes turns, and its ratios are taken turn by turn. Standard library only.

Rows go in the order A B C, C B A, A B C ..., so that a machine that slows down slows all of them alike. A row that
appears twice gives the noise floor: no smaller difference may be claimed. What each row does in its turn, and what is
good enough, is said where this is used; what needs a process of its own for each row finds it here.
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
from typing import Any

from ..common.errors import CheckFailedError, InputError
from ..common.startup.output import endure_output

SHUTDOWN_TIMEOUT = 10.0  # [s] for a measuring process to end by itself


@dataclass
class Row:
    """Of each turn the seconds a step, and the processor's seconds a step where they are measured."""

    name: str
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """[s]"""
        return statistics.median(self.seconds)


def turns(rows: int, times: int) -> Iterator[Sequence[int]]:
    """The places of all rows in the order in which they take their turns, `times` orders: there, back, there ..."""
    there = range(rows)
    for turn in range(times):
        yield there if turn % 2 == 0 else there[::-1]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of one value it is each of them."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(mine: Sequence[float], its: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of mine / its, turn by turn."""
    return quartiles([one / other for one, other in zip(mine, its, strict=True)])


def noise_floor(again: Sequence[float], first: Sequence[float]) -> float:
    """Of one thing measured twice: how far its ratio to itself is from 1, or how far it scatters, whichever is more."""
    low, middle, high = ratios(again, first)
    return max(abs(middle - 1), (high - low) / 2)


class NotInTime(CheckFailedError):
    """A measuring process did not answer in the time that it had."""


@dataclass(frozen=True)
class Failure:
    """What a measuring process answers in place of a measurement."""

    message: str


class MeasuringProcess:
    """A process that measures when it is asked, started afresh: nothing of this process is in it.

    It runs `work(end, *arguments)`, a function of a module, which sends its answers through `end` and receives the
    questions there. Leaving the `with` block ends it.
    """

    def __init__(self, work: Callable[..., None], *arguments: Any, advice: str = "", until: float | None = None):
        """`advice`: what to try where the process is killed, a sentence. `until`: the time, by time.monotonic(), after
        which nothing is waited for."""
        context = multiprocessing.get_context("spawn")
        self.end, theirs = context.Pipe()
        self.advice, self.until = advice, until
        self.process = context.Process(target=_run, args=(work, theirs, arguments), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def __enter__(self) -> MeasuringProcess:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end.close()
        self.process.join(SHUTDOWN_TIMEOUT if kind is None else 0)
        self.process.terminate()
        self.process.join()

    def ask(self, question: Any) -> Any:
        """Its answer. Raises CheckFailedError if it failed, or ended."""
        with suppress(OSError):  # it has ended: `answer` says how
            self.end.send(question)
        return self.answer()

    def answer(self) -> Any:
        """What it says by itself. Raises as `ask` does."""
        if self.until is not None and not self.end.poll(max(0.0, self.until - time.monotonic())):
            raise NotInTime("A measuring process did not answer in the time that it had")
        try:
            answer = self.end.recv()
        except (EOFError, OSError):
            self.process.join(SHUTDOWN_TIMEOUT)
            code = self.process.exitcode
            how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
            raise CheckFailedError(f"A measuring process {how} before it answered. {self.advice}".rstrip()) from None
        if isinstance(answer, Failure):
            raise CheckFailedError(f"A measuring process failed: {answer.message}")
        return answer


def _run(work: Callable[..., None], end: Connection, arguments: tuple[Any, ...]) -> None:
    try:
        work(end, *arguments)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # nobody asks any more
    except Exception as error:
        end.send(Failure(f"{type(error).__name__}: {error}"))


def check_output(option: str, path: Path | None) -> None:
    """InputError, before anything is measured, where the result could not be written afterwards. What is to be written
    does not depend on who reads what is printed."""
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{option} {path}: expected a file in a folder that exists")
    endure_output()
