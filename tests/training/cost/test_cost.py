"""The command that measures overhead: its list of measurements, their help, and wrong arguments."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_tools import command

from manual_backprop.common.errors import InputError
from manual_backprop.study.paired_timing import Row
from manual_backprop.tools.cost import COSTS, main
from manual_backprop.training.cost.reduction import ROWS, verdict


def test_the_list_has_a_sentence_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len(listed) == len(COSTS) == 6
    for line, (name, cost) in zip(listed, COSTS.items(), strict=True):
        assert line == f"  {name:<12}{str(cost.__doc__).splitlines()[0]}"
        assert line.endswith(".")


@pytest.mark.parametrize("name", COSTS)
def test_help_of_each(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([name, "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m manual_backprop.tools.cost {name} ")
    assert "Exit codes: 0" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one of tracking, inspection, loading, preparing, parallel"),
        (["loadin"], "loadin: there is no such command; did you mean loading?"),
        (["--model", "tiny"], "--model: there is no such command"),
        (["preparing", "--megabyte", "3"], "did you mean --megabytes"),
        (["preparing", "--vocab-size", "256"], "--vocab-size: must be a whole number of at least 257"),
        (["parallel", "--jobs", "0"], "--jobs: must be a whole number of at least 1"),
        (["parallel", "--round", "1"], "did you mean --rounds"),
        (["reduction", "--case", "C9"], "--case"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        main(arguments)
    assert error.value.exit_code == 2


def test_what_is_hidden_of_a_sum() -> None:
    rows = [Row(name, [seconds] * 4) for name, seconds in zip(ROWS, (7.0, 8.0, 11.0, 9.0, 8.0), strict=True)]
    words = verdict(rows)
    assert words.startswith(
        "adding up costs 33.3% of a step at the end and 11.1% as the gradients come: 67% of it hidden"
    )
    rows[-1] = Row(ROWS[-1], [12.0] * 4)
    assert "too little to say what is hidden; noise floor 50.0%" in verdict(rows)


@pytest.mark.nightly
def test_sums_of_two_processes_are_measured(tmp_path: Path) -> None:
    given = ("reduction", "--case", "C1", "--rounds", "1", "--steps", "1")
    done = command(*given, cwd=tmp_path, module="manual_backprop.tools.cost")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for row in ROWS:
        assert re.search(rf"^{row} +\d+\.\d\d ", done.stdout, re.MULTILINE)
    assert "adding up costs" in done.stdout
