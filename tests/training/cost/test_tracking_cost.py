"""The measurement of what logging costs: its verdicts, and a real one that is far too short to say anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_tools import command

from manual_backprop.common.errors import InputError
from manual_backprop.study.paired_timing import Row
from manual_backprop.tools.cost import main
from manual_backprop.training.cost.turns import verdict


def rows(everything: list[float], again: list[float]) -> list[Row]:
    return [Row("nothing", [1.0] * 4), Row("everything", everything), Row("nothing again", again)]


def test_verdicts() -> None:
    quiet, noisy = [1.0, 1.001, 0.999, 1.0], [1.0, 1.3, 0.8, 1.1]
    passed, words = verdict("logging", rows([1.01] * 4, quiet), 0.02)
    assert passed
    assert words == "ok: logging costs +1.00% of a step, noise floor 0.02%, bar 2%"
    passed, words = verdict("logging", rows([1.05] * 4, quiet), 0.02)
    assert not passed
    assert words.startswith("FAILED: logging costs +5.00%")
    for seconds in (1.05, 1.01):  # what is lost in the noise is not shown, whichever it is
        passed, words = verdict("logging", rows([seconds] * 4, noisy), 0.02)
        assert not passed
        assert words.startswith("NOT SHOWN")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "tny"], "did you mean tiny"),
        (["--precision", "fp33"], "precision"),
        (["--steps", "15"], "--steps 15: must be a multiple of --log-every 10"),
        (["--rounds", "0"], "--rounds: must be a whole number of at least 1, was '0'"),
        (["--json", "/nowhere/at/all"], "expected a file in a folder that exists"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        main(["tracking", *arguments])


@pytest.mark.nightly
def test_a_measurement(tmp_path: Path) -> None:
    """By the command, with ten steps: too few for a meaningful result."""
    given = ("tracking", "--model", "tiny", "--threads", "1", "--steps", "10", "--rounds", "1", "--json", "m.json")
    done = command(*given, cwd=tmp_path, module="manual_backprop.tools.cost")
    assert done.returncode == (0 if "\nok:" in done.stdout else 1), done.stderr
    assert "nothing again" in done.stdout
    assert "logging costs" in done.stdout
    measured = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert [row["name"] for row in measured] == ["nothing", "everything", "nothing again"]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in measured)
