"""The reader of a command's output may disappear: the other end of a pipe, a terminal, space on a disk."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TextIO
from unittest.mock import Mock, patch

import pytest
from run_tools import newest, train

from manual_backprop.common.errors import InputError
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.common.startup.output import enduring_output
from manual_backprop.tracking.run_directory import read_run
from manual_backprop.training.sweeps.job import JobInterruption, PrefixedLines
from manual_backprop.training.sweeps.records import Records


def closed_pipe() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def closed_terminal() -> TextIO:
    reader, writer = os.openpty()
    os.close(reader)
    return open(writer, "w")


def full_disk() -> TextIO:
    return open("/dev/full", "w")


STREAMS = {"pipe": closed_pipe, "terminal": closed_terminal, "disk": full_disk}


each_end = pytest.mark.parametrize("end", STREAMS)


def nobody_reads(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the output streams of this process. Called in the test, since pytest sets them after the fixtures."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, STREAMS[end]())


@each_end
@pytest.mark.usefixtures("here")
def test_a_run_goes_on(end: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody_reads(end, monkeypatch)
    train(tmp_path, text, "training.max_steps=3", "training.eval_every=1")
    run = newest(tmp_path)
    assert read_run(run)["status"] == "FINISHED"
    assert (run / "checkpoints/step-000003").is_dir()
    assert "step 3: validation" in (run / "run.log").read_text(), "what was said is there all the same"


@each_end
@pytest.mark.parametrize("said", ["a line", "line\n" * 50_000], ids=["at the end", "at once"])
def test_a_command_that_only_prints_ends_quietly(said: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody_reads(end, monkeypatch)
    assert exit_code_of(lambda: print(said)) == (4 if end == "disk" else 128 + signal.SIGPIPE)
    assert exit_code_of(lambda: print(said, file=sys.stderr)) == 0


@each_end
def test_a_command_that_writes_as_well_comes_to_its_end(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody_reads(end, monkeypatch)

    def command() -> None:
        with enduring_output():
            print("line\n" * 50_000)
            (tmp_path / "written").touch()

    assert exit_code_of(command) == 0
    assert (tmp_path / "written").exists()


@each_end
def test_an_error_keeps_its_exit_code(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody_reads(end, monkeypatch)

    def command() -> None:
        raise InputError("a sentence")

    assert exit_code_of(command) == 2


def test_lines_of_jobs_at_once() -> None:
    stream = closed_pipe()
    print("a line", file=PrefixedLines(stream.fileno(), "[job 1] "))
    assert os.write(stream.fileno(), b"leads nowhere now") == 17


def test_nothing_is_taken_from_streams_that_somebody_reads(capfd: pytest.CaptureFixture[str]) -> None:
    with enduring_output():
        print("first")
        print("second", file=sys.stderr)
        os.write(1, b"third\n")
    print("fourth")
    assert capfd.readouterr() == ("first\nthird\nfourth\n", "second\n")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_what_a_cluster_sends_before_it_takes_a_machine(number: signal.Signals) -> None:
    from manual_backprop.common.errors import Interrupted
    from manual_backprop.common.interruption import Interruption

    with Interruption() as interruption:
        interruption.defer()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=f"{number.name}: saved") as caught:
            interruption.raise_if_received("saved")
    assert caught.value.exit_code == 128 + number == {signal.SIGUSR1: 138, signal.SIGUSR2: 140}[number]


def test_a_signal_that_a_cluster_sends_to_every_process_is_one_request(tmp_path: Path) -> None:
    """A job receives it directly and again through its sweep: it counts once, and the job saves. A second signal ends
    it at once."""
    for first, requests, same in (("SIGUSR1", 0, True), ("SIGTERM", 1, True), ("SIGTERM", 0, False)):
        records = Records(tmp_path / f"{first}-{requests}")
        records.sweep.mkdir()
        interruption = JobInterruption(records)
        interruption.defer()
        for _ in range(requests):
            records.request_stop()
        interruption._handle(signal.Signals[first], None)
        before, left = signal.getsignal(signal.SIGTERM), Mock()
        with patch("os.kill", left):  # this process, which goes on
            interruption._handle(signal.SIGTERM, None)
            assert left.called != same
            interruption._handle(signal.SIGTERM, None)
            left.assert_called_with(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)
        assert interruption.received == signal.Signals[first]
