"""Paired measurements: the order of turns, ratios, and processes that fail."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from manual_backprop.common.errors import CheckFailedError, InputError
from manual_backprop.study.paired_timing import MeasuringProcess, check_output, noise_floor, quartiles, ratios, turns


def test_rows_go_there_and_back() -> None:
    assert [list(order) for order in turns(3, 3)] == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]


def test_ratios_are_taken_turn_by_turn() -> None:
    slowing_down = [1.0, 2.0, 4.0, 8.0]
    assert ratios([1.5 * seconds for seconds in slowing_down], slowing_down) == (1.5, 1.5, 1.5)
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_the_noise_floor_is_an_offset_or_a_scatter() -> None:
    assert noise_floor([1.1] * 4, [1.0] * 4) == pytest.approx(0.1)
    assert noise_floor([0.8, 0.9, 1.0, 1.1, 1.2], [1.0] * 5) == pytest.approx(0.1)


def double(end: Connection, factor: int) -> None:
    while True:
        question = end.recv()
        if question == "fail":
            raise ValueError("seven is no even number")
        if question == "leave":
            os._exit(3)
        if question == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        end.send(factor * question)


def test_a_process_answers_until_it_fails() -> None:
    with MeasuringProcess(double, 2) as process:
        assert process.ask(4) == 8
        assert process.ask(5) == 10
        with pytest.raises(CheckFailedError, match="ValueError: seven is no even number"):
            process.ask("fail")
    assert not process.process.is_alive()


@pytest.mark.parametrize(("question", "how"), [("leave", "exit code 3"), ("killed", "signal 9")])
def test_a_process_that_is_gone_is_said_to_be(question: str, how: str) -> None:
    with MeasuringProcess(double, 2, advice="Try less.") as process:
        with pytest.raises(CheckFailedError, match=rf"{how} before it answered\. Try less\."):
            process.ask(question)
        with pytest.raises(CheckFailedError, match=how):
            process.ask(1)


def test_where_a_result_could_not_be_written(tmp_path: Path) -> None:
    check_output("--json", tmp_path / "new.json")
    check_output("--json", None)
    for path in (tmp_path, tmp_path / "nowhere" / "new.json"):
        with pytest.raises(InputError, match="expected a file in a folder that exists"):
            check_output("--json", path)
