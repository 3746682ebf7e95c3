"""The command that measures what things cost: its list, its first word, and what each of them is told wrong."""

from __future__ import annotations

import pytest

from manual_backprop.common.errors import InputError
from manual_backprop.tools.cost import COSTS, main


def test_the_list_has_a_sentence_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len(listed) == len(COSTS) == 5
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
        ([], "Give tracking, inspection, loading, preparing, parallel"),
        (["loadin"], "loadin: there is no such command; did you mean loading?"),
        (["--model", "tiny"], "--model: there is no such command"),
        (["preparing", "--megabyte", "3"], "did you mean --megabytes"),
        (["preparing", "--vocab-size", "256"], "--vocab-size: must be a whole number of at least 257"),
        (["parallel", "--jobs", "0"], "--jobs: must be a whole number of at least 1"),
        (["parallel", "--round", "1"], "did you mean --rounds"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        main(arguments)
    assert error.value.exit_code == 2
