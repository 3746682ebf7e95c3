"""The commands that measure steps, each run once; .ci/nightly runs every row with a real compiler."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_tools import KERNELS
from command_tools import ROOT, command, environment

from manual_backprop import bench
from manual_backprop.kernels.cpu.products import onednn_is_exact
from manual_backprop.study.benchmark import growth, measurement, page
from manual_backprop.study.benchmark.cases import ONEDNN, OURS, ROWS, SUBJECT, Case, is_compiled

SMALL = ("--model", "tiny", "--batch-size", "2", "--threads", "1", "--rounds", "1")
# Measuring processes are forked from one that has imported what they need, and PyTorch does not compile. This takes a
# tenth of the time. .ci/nightly tests with compilers.
FORKING = """
import multiprocessing, runpy, sys
import torch, torch._dynamo, torch._inductor.compile_fx
from manual_backprop.study import paired_timing
{first}
paired_timing.SHUTDOWN_TIMEOUT = 0  # a forked process has the others' pipes open: that one is closed, nobody sees
forking = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda method: forking
torch.compile = lambda function, **settings: function
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches for all compilers."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "caches"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("TORCHINDUCTOR_DEBUG_COMPILE", "1")  # nothing is optimized: a third less time


def forking(module: str, *arguments: str | Path, cwd: Path, first: str = "") -> str:
    """`python -m module *arguments` after the statements `first`: what it prints."""
    words = [sys.executable, "-c", FORKING.format(first=first), module, *arguments]
    done = subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_measurement(printed: str, folder: Path, rows: Sequence[str], compiled: bool) -> None:
    """Checks the measurement of these rows, as printed, drawn and written. A row that compiled was restarted."""
    assert "fastest peer: " in printed
    assert f"{SUBJECT}: where" in printed
    assert (folder / "bench.png").stat().st_size > 1000
    content = json.loads((folder / "bench.json").read_text())
    assert content["version"] == page.VERSION
    assert content["machine"]["torch"] == torch.__version__
    (case,) = content["cases"]
    assert case["case"]["config"]["d_model"] == 64
    assert [row["name"] for row in case["rows"]] == [
        SUBJECT,
        SUBJECT + measurement.AGAIN,
        *(name for name in rows if name != SUBJECT and name not in case["left_out"]),
    ]
    assert set(case["left_out"]) == (set() if onednn_is_exact() else {"baseline-eager-onednn"})
    for row in case["rows"]:
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        assert row["peak_bytes"] > 100_000  # parameters, gradients and moments
        by_torch = compiled and is_compiled(row["name"])
        assert row["cache"] == ("warm" if by_torch or row["name"].startswith(tuple(KERNELS)) else "none")
        assert (row["cold_seconds"] is not None) == (by_torch or row["name"] == SUBJECT)
    assert case["fastest_peer"] not in OURS
    assert set(case["breakdown"]) == {SUBJECT, case["fastest_peer"]}
    for profile in case["breakdown"].values():
        assert sum(profile["kinds"].values()) == pytest.approx(1)
        assert profile["kinds"]["products"] > 0
        assert profile["allocations"]
    assert case["breakdown"][SUBJECT]["pairs"]["feed_forward_backward"] > 0


# Of the rows that differ from another one in the library of their products, one stands for all.
MEASURED = [name for name in ROWS if not name.endswith(ONEDNN) or name == "baseline-eager-onednn"]
FEW = [SUBJECT, "custom-reference", "baseline-eager", "baseline-compiled", "baseline-eager-onednn"]


def measure(rows: Sequence[str]) -> tuple[str, ...]:
    return (*SMALL, "--rows", *rows, "--breakdown", "--json", "bench.json", "--picture", "bench.png")


@pytest.mark.slow
def test_a_measurement_of_a_row_of_each_kind(tmp_path: Path, caches: None) -> None:
    assert set(FEW) <= set(ROWS)
    printed = forking("manual_backprop.bench", *measure(FEW), cwd=tmp_path)
    check_measurement(printed, tmp_path, FEW, compiled=False)


@pytest.mark.nightly
def test_every_row_with_its_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caches: None
) -> None:
    """With one block, since the compiler's time grows with the number of blocks."""
    cases_of = bench.cases_of

    def of_one_block(options: argparse.Namespace) -> list[Case]:
        return [replace(case, config=replace(case.config, n_blocks=1)) for case in cases_of(options)]

    monkeypatch.setattr(bench, "cases_of", of_one_block)
    monkeypatch.chdir(tmp_path)
    bench.main(measure(MEASURED))
    check_measurement(capsys.readouterr().out, tmp_path, MEASURED, compiled=True)


@pytest.mark.nightly
def test_growth_is_measured(tmp_path: Path) -> None:
    first = "from manual_backprop.study.benchmark import growth; growth.LENGTHS, growth.BATCH_SIZES = (8,), (64,)"
    given = ("--grow", "--rows", "baseline-eager", "--json", "growth.json", "--picture", "growth.png")
    assert "best peer / ours" in forking("manual_backprop.bench", *SMALL, *given, cwd=tmp_path, first=first)
    (grown,) = json.loads((tmp_path / "growth.json").read_text())["growth"]
    (short,), (large,) = grown["over_length"], grown["over_batch_size"]
    assert [point["case"]["config"]["max_seq_len"] for point in (short, large)] == [8, 64]
    assert [point["case"]["batch_size"] for point in (short, large)] == [growth.SEQUENCES, 64]
    assert all(few["peak_bytes"] < many["peak_bytes"] for few, many in zip(short["rows"], large["rows"], strict=True))
    assert (tmp_path / "growth.png").exists()


@pytest.mark.nightly
def test_the_page_of_the_three_levels_with_a_compiler(tmp_path: Path, caches: None) -> None:
    output = tmp_path / "new" / "page.md"
    given = (*SMALL, "--precision", "fp32", "--output", str(output))
    done = command(*given, module="manual_backprop.tools.levels", cwd=ROOT, seconds=900)
    assert done.returncode == 0, done.stderr
    levels = output.read_text(encoding="utf-8")
    assert "levels --model tiny --precision fp32" in levels
    assert "| `custom, kernels=fused` | " in levels
    assert "| `baseline, compiled` | " in levels
    assert "{" not in levels
    assert max(map(len, (line for line in levels.splitlines() if not line.startswith("|")))) <= 120


@pytest.mark.slow
def test_the_page_of_what_the_kernels_bring(tmp_path: Path) -> None:
    output = tmp_path / "kernels.md"
    forking("manual_backprop.tools.kernel_gains", *SMALL, "--means", "linear", "--output", output, cwd=ROOT)
    gains = output.read_text(encoding="utf-8")
    assert "kernel_gains --model tiny --batch-size 2 --means linear --threads 1 --rounds 1\n" in gains
    rows = [line for line in gains.splitlines() if line.startswith("|")][2:]
    assert [row.split("|")[1].strip().rpartition(" ")[2] for row in rows] == [
        "`linear`",
        "`kernels=reference`",
        "`training.recompute=block`",
    ]
    milliseconds, peak = re.search(r"`custom-fused`: (\S+) ms a step, peak (\S+) MB\.", gains).groups()  # type: ignore[union-attr]
    assert float(milliseconds) > 0
    assert float(peak) > 0.1  # parameters, gradients and moments
    assert gains.rpartition("\n\n")[0].endswith(rows[-1])
