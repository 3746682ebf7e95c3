"""The page about the three levels: the counted lines, the measurements, and the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench_tools import case_of

from manual_backprop.common.errors import InputError
from manual_backprop.study import levels
from manual_backprop.study.benchmark.cases import ONEDNN, ROWS, Case
from manual_backprop.study.benchmark.measurement import MeasuredRow, Measurement
from manual_backprop.study.paired_timing import Row
from manual_backprop.tools.levels import main


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
    assert counted["custom, kernels=fused"] > counted["custom, kernels=reference"] > counted["torch"] > 100
    assert counted["baseline"] > 100
    for _, files in levels.LEVELS.values():
        assert min(levels.code_of([file]) for file in files) > 20, "each pattern counts something of its own"
    with pytest.raises(LookupError, match=r"gone/\*\.py: matches no file"):
        levels.code_of(["optim/optimizers.py", "gone/*.py"])
    assert set(levels.MEASURED) <= set(ROWS)
    assert set(levels.LEVELS) <= set(levels.MEASURED.values()), "every level is measured"


@pytest.mark.usefixtures("one_thread", "as_written")
def test_errors_are_those_of_both_kinds_of_kernels_in_every_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "SEEDS", range(1))
    errors = levels.gradient_errors("llama")
    assert list(errors) == list(levels.LEVELS)
    for level, by_precision in errors.items():
        assert by_precision["fp64"] < 1e-13
        assert by_precision["fp64"] < by_precision["fp32"] < 1e-4 < by_precision["bf16"] < 0.2
        assert 1e-4 < by_precision["bf16_mixed"] < 0.2
        assert by_precision["fp32"] <= 2 * errors["baseline"]["fp32"], level
    assert errors["custom, kernels=fused"] != errors["custom, kernels=reference"], "they are two calculations"
    lines = levels.levels_table(errors).splitlines()
    assert len(lines) == 2 + len(levels.LEVELS)
    assert len({line.count("|") for line in lines}) == 1
    assert f"{errors['custom, kernels=fused']['bf16_mixed']:.1e} |" in lines[3]
    assert "| exact |" in lines[4]


def test_the_table_of_steps_says_which_kernels_they_are_and_leaves_out_what_was_not_measured() -> None:
    seconds = dict.fromkeys(levels.MEASURED, 0.15) | {"custom-fused": 0.1, "custom-reference": 0.2}
    rows = {name: MeasuredRow(name, [time] * 2, peak_bytes=64_000_000) for name, time in seconds.items()}
    in_bf16 = {name: row for name, row in rows.items() if not name.endswith(ONEDNN)}
    by_precision = {
        precision: Measurement(case_of(precision=precision), measured, rows["custom-fused"], Row("products"))
        for precision, measured in (("fp32", rows), ("bf16", in_bf16))
    }
    lines = levels.steps_table(by_precision).splitlines()
    assert lines[0] == "| step | fp32 | bf16 |"
    assert lines[2] == "| `custom, kernels=fused` | 100.0 ms; 1; 64 MB | 100.0 ms; 1; 64 MB |"
    assert lines[3].startswith("| `custom, kernels=reference` | 200.0 ms; 2.00 (2.00 to 2.00); 64 MB |")
    assert lines[-1] == "| `baseline, compiled, products by oneDNN` | 150.0 ms; 1.50 (1.50 to 1.50); 64 MB |  |"
    assert len(lines) == 2 + len(levels.MEASURED)
    only_bf16 = levels.steps_table({"bf16": by_precision["bf16"]})
    assert "oneDNN" not in only_bf16


def test_the_page_is_written_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the arguments of the bench, and where its results are on the page."""
    asked: list[tuple[str, int]] = []

    def measured(case: Case, names: list[str], rounds: int) -> Measurement:
        asked.append((case.config.precision, rounds))
        without = {name: "no switch" for name in names if name.endswith(ONEDNN) and case.config.precision != "fp32"}
        rows = {
            name: MeasuredRow(name, [0.1] * 4, cold_seconds=31.0, peak_bytes=64_000_000, products="oneDNN")
            for name in names
            if name not in without
        }
        return Measurement(case, rows, rows["custom-fused"], Row("products"), without)

    monkeypatch.setattr(levels, "measure", measured)
    errors = {level: dict.fromkeys(levels.CPU_PRECISIONS, 0.01) for level in levels.LEVELS}
    monkeypatch.setattr(levels, "gradient_errors", lambda architecture: errors)
    threads = torch.get_num_threads()
    main(["--rounds", "2", "--output", str(tmp_path / "page.md")])
    torch.set_num_threads(threads)
    assert asked == [(precision, 2) for precision in ("fp64", "fp32", "bf16", "bf16_mixed")]
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "{" not in page
    assert "written by `python -m manual_backprop.tools.levels`" in page
    assert "| step | fp64 | fp32 | bf16 | bf16_mixed |" in page
    assert "**Products** in fp32: oneDNN in all rows." in page
    assert "Compiling the baseline took up to 31 s." in page
    for kind in ("reference", "fused"):
        assert page.count(f"| `custom, kernels={kind}` |") == 2, "its errors and its steps"
    assert max(len(line) for line in page.splitlines() if not line.startswith("|")) <= 120


def test_a_wrong_option_exits_2() -> None:
    with pytest.raises(InputError, match="--rounds: must be a whole number of at least 1, was '0'") as error:
        main(["--rounds", "0"])
    assert error.value.exit_code == 2
