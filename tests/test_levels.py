"""The table of the three levels: what is counted, what is measured, and the page that it becomes."""

from __future__ import annotations

import pytest

from manual_backprop.benchmark.cases import ROWS
from manual_backprop.benchmark.measurement import MeasuredRow
from manual_backprop.errors import InputError
from manual_backprop.tools import levels


def test_lines_of_code_are_neither_empty_nor_said() -> None:
    source = '''\
"""A module.

With two paragraphs.
"""

import math  # counted


# not counted
class Circle:
    """Round."""

    def area(self) -> float:
        """Of it."""
        text = """counted,
        twice"""
        return math.pi * len(text)  # counted
'''
    assert levels.code_lines(source) == 6


def test_every_level_has_files_and_rows() -> None:
    counted = {level: levels.code_of(files) for level, (_, files) in levels.LEVELS.items()}
    assert counted["custom"] > counted["torch"] > 100
    assert counted["baseline"] > 100
    assert {name for names in levels.MEASURED.values() for name in names} <= set(ROWS)


@pytest.mark.usefixtures("one_thread")
def test_the_table_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "SEEDS", range(1))
    errors = levels.gradient_errors("llama")
    for level, by_precision in errors.items():
        assert by_precision["fp64"] < 1e-13
        assert by_precision["fp64"] < by_precision["fp32"] < 1e-4 < by_precision["bf16"] < 0.2
        assert by_precision["fp32"] <= 2 * errors["baseline"]["fp32"], level
    seconds = {"custom-reference": 0.1, "torch-eager": 0.2, "baseline-eager": 0.15, "baseline-compiled": 0.05}
    rows = {
        name: MeasuredRow(name, [time] * 2, first_seconds=5.0, cold_seconds=31.0, peak_bytes=64_000_000)
        for name, time in seconds.items()
    }
    lines = levels.table(rows, errors).splitlines()
    assert len(lines) == 6
    assert len({line.count("|") for line in lines}) == 1
    assert "| 100.0 ms | 1 | 64 MB |" in lines[2]
    assert "2.00 (2.00 to 2.00)" in lines[3]
    assert "took 31 s" in lines[5]
    assert "0.50 (0.50 to 0.50)" in lines[5]


def test_a_wrong_option_exits_2() -> None:
    with pytest.raises(InputError, match="--rounds: must be a whole number of at least 1, was '0'") as error:
        levels.main(["--rounds", "0"])
    assert error.value.exit_code == 2
