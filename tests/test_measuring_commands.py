"""The commands that measure steps: the first finds the compilers' caches empty, the rest use them."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_tools import KERNELS
from command_tools import ROOT, command

from manual_backprop import bench
from manual_backprop.benchmark import growth, measurement, page
from manual_backprop.benchmark.cases import ONEDNN, OURS, ROWS, SUBJECT, Case, is_compiled
from manual_backprop.kernels.products import onednn_is_exact

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("caches")]

SMALL = ("--model", "tiny", "--batch-size", "2", "--threads", "1", "--rounds", "1")


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of all compilers, empty at first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("caches")))
        patch.setenv("TORCHINDUCTOR_DEBUG_COMPILE", "1")  # nothing is optimized: a third less time
        yield


def test_a_measurement_of_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one block: a compiler takes as much longer as there are more of them. Of the rows that differ from another one
    in the library of their products, one stands for all."""
    rows = [name for name in ROWS if not name.endswith(ONEDNN) or name == "baseline-eager-onednn"]
    cases_of = bench.cases_of

    def of_one_block(options: argparse.Namespace) -> list[Case]:
        return [replace(case, config=replace(case.config, n_blocks=1)) for case in cases_of(options)]

    monkeypatch.setattr(bench, "cases_of", of_one_block)
    files = {"--json": tmp_path / "bench.json", "--picture": tmp_path / "bench.png"}
    bench.main([*SMALL, "--rows", *rows, "--breakdown", *(str(word) for pair in files.items() for word in pair)])
    printed = capsys.readouterr().out
    assert "fastest peer: " in printed
    assert f"{SUBJECT}: where" in printed
    assert files["--picture"].stat().st_size > 1000
    content = json.loads(files["--json"].read_text())
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
        compiled = is_compiled(row["name"])
        assert row["cache"] == ("warm" if compiled or row["name"].startswith(tuple(KERNELS)) else "none")
        # whoever comes first compiles, and is started again
        assert (row["cold_seconds"] is not None) == (compiled or row["name"] == SUBJECT)
    assert case["fastest_peer"] not in OURS
    assert set(case["breakdown"]) == {SUBJECT, case["fastest_peer"]}
    for profile in case["breakdown"].values():
        assert sum(profile["kinds"].values()) == pytest.approx(1)
        assert profile["kinds"]["products"] > 0
        assert profile["allocations"]
    assert case["breakdown"][SUBJECT]["pairs"]["feed_forward_backward"] > 0


def test_growth_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "LENGTHS", (8,))
    monkeypatch.setattr(growth, "BATCH_SIZES", (64,))
    files = ("--json", str(tmp_path / "growth.json"), "--picture", str(tmp_path / "growth.png"))
    bench.main([*SMALL, "--grow", "--rows", "baseline-eager", *files])
    assert "best peer / ours" in capsys.readouterr().out
    (grown,) = json.loads((tmp_path / "growth.json").read_text())["growth"]
    (short,), (large,) = grown["over_length"], grown["over_batch_size"]
    assert [point["case"]["config"]["max_seq_len"] for point in (short, large)] == [8, 64]
    assert [point["case"]["batch_size"] for point in (short, large)] == [growth.SEQUENCES, 64]
    assert all(few["peak_bytes"] < many["peak_bytes"] for few, many in zip(short["rows"], large["rows"], strict=True))
    assert (tmp_path / "growth.png").exists()


def test_the_page_of_the_three_levels(tmp_path: Path) -> None:
    output = tmp_path / "new" / "page.md"
    options = (*SMALL, "--precision", "fp32", "--output", str(output))
    done = command(*options, module="manual_backprop.tools.levels", cwd=ROOT, seconds=600)
    assert done.returncode == 0, done.stderr
    levels = output.read_text(encoding="utf-8")
    assert "levels --model tiny --precision fp32" in levels
    assert "| `custom, kernels=fused` | " in levels
    assert "| `baseline, compiled` | " in levels
    assert "{" not in levels
    assert max(map(len, (line for line in levels.splitlines() if not line.startswith("|")))) <= 120


def test_the_page_of_what_the_kernels_bring(tmp_path: Path) -> None:
    output = tmp_path / "kernels.md"
    options = (*SMALL, "--means", "linear", "--output", str(output))
    done = command(*options, module="manual_backprop.tools.kernel_gains", cwd=ROOT, seconds=600)
    assert done.returncode == 0, done.stderr
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
