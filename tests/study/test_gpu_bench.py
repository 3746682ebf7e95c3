"""`bench --gpu`, tried on a CPU at small sizes: every part, what it writes, and what happens where one fails."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch

from manual_backprop import bench
from manual_backprop.common.errors import CheckFailedError, InputError
from manual_backprop.common.machine import compute_capabilities
from manual_backprop.kernels import replay
from manual_backprop.kernels.cuda import graph
from manual_backprop.study import paired_timing
from manual_backprop.study.benchmark import measurement, rows
from manual_backprop.study.benchmark.cases import GRAPHS, compile_mode, is_compiled, network_of
from manual_backprop.study.benchmark.gpu import comparison, correctness, limits, processes, session
from manual_backprop.study.benchmark.gpu.optimizations import OPTIMIZATIONS
from manual_backprop.study.benchmark.gpu.tables import Setting, Table, shown

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread", "as_written")


class Thread(threading.Thread):
    """A measuring process in this one, whose imports are done."""

    exitcode = 0

    def terminate(self) -> None: ...


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(self: Any, work: Any, *arguments: Any, advice: str = "", until: float | None = None) -> None:
        self.end, theirs = Pipe()
        self.advice, self.until = advice, until

        def run() -> None:
            paired_timing._run(work, theirs, arguments)
            theirs.close()

        self.process = Thread(target=run, daemon=True)
        self.process.start()

    monkeypatch.setattr(paired_timing.MeasuringProcess, "__init__", begin)
    monkeypatch.setattr(rows, "prepare", lambda name, case: None)
    monkeypatch.setattr(rows, "TURN", 1e-4)
    for limit in ("FEWEST", "MOST"):
        monkeypatch.setattr(measurement, limit, 1)
    monkeypatch.setattr(correctness, "SEEDS", range(1))
    monkeypatch.setattr(limits, "TIMES", 1)


@pytest.mark.usefixtures("in_threads")
def test_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be: that is the question. " * 20)
    folder = tmp_path / "results"
    bench.main(["--gpu", "--device", "cpu", "--text", str(text), "--output", str(folder)])
    content = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    page, printed = (folder / "results.md").read_text(), capsys.readouterr().out
    assert list(content["parts"]) == list("abcde")
    tables = {name: part["tables"] for name, part in content["parts"].items()}
    for name, part in content["parts"].items():
        assert part["failure"] == ""
        assert f"## ({name}) " in page
        assert f"## ({name}) " in printed
        for table in part["tables"]:
            assert table["failures"] == [], table["title"]
            assert table["rows"], table["title"]
            assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert [row[5] for row in tables["a"][0]["rows"]] == [True] * len(correctness.items(small=True))
    assert {row[0].partition(" ")[0] for row in tables["b"][0]["rows"]} == {"copy", "product", "all", "cudnn", "flash"}
    titles = [table["title"].partition(":")[0] for table in tables["c"]]
    beside = [f"{name} beside its peers" for name in ("G1", "G4", "G3")]
    assert titles == [*beside, "G3 without graph", "G1 without graph"]
    names = [row[0] for row in tables["c"][0]["rows"]]
    assert names == ["custom-reference", "custom-reference again", "baseline-eager"]
    assert tables["d"][0]["columns"] == ["row", "B=2", "B=4"]
    (trained,) = tables["e"][0]["rows"]
    assert trained[1] == 40
    assert 0 < trained[5] < math.log(20)


@pytest.fixture
def bare_machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that finds of this project's libraries PyTorch, transformers and what these need."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    names = re.findall(r"^[\w-]+", config["options"]["install_requires"], re.MULTILINE)
    there = {"torch", "transformers", "tokenizers", "safetensors", "filelock"}
    missing = {name.removesuffix("-core") for name in names} - there
    assert {"hydra", "omegaconf", "mlflow", "rich", "psutil", "matplotlib"} <= missing
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import sys


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Missing())
"""
    )
    return os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}


def test_where_there_is_pytorch_alone(bare_machine: dict[str, str]) -> None:
    """What the commands and their parts import."""
    parts = {part.function.partition(".")[0] for part in session.PARTS.values()}
    room = session.__package__
    modules = [
        "manual_backprop.bench",
        "manual_backprop.kernels.cuda.optimizers",
        *(f"{room}.{part}" for part in parts),
    ]
    asks = "import importlib.util; assert importlib.util.find_spec('torch')"
    for library in ("hydra", "mlflow"):
        asks += f"\ntry: import {library}\nexcept ImportError: pass\nelse: raise AssertionError"
    words = [sys.executable, "-c", f"import {', '.join(modules)}\n{asks}"]
    done = subprocess.run(words, cwd=ROOT, env=bare_machine, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
def test_all_of_it_as_a_user_gives_it(tmp_path: Path, bare_machine: dict[str, str]) -> None:
    folder = tmp_path / "results"
    words = [sys.executable, "-m", "manual_backprop.bench", "--gpu", "--device", "cpu", "--output", str(folder)]
    done = subprocess.run([*words, "--minutes", "15"], cwd=ROOT, env=bare_machine, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    content = json.loads((folder / "results.json").read_text())
    assert [len(part["tables"]) for part in content["parts"].values()] == [1, 1, 5, 1, 1]


def test_a_part_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tables(kind: session.Kind, setting: Setting) -> Iterator[Table]:
        yield Table(f"of {kind.about}", ("x",), [(setting.until,)])
        if kind.function == "limits.limits":
            raise ValueError("out of luck")
        yield Table("wrong", (), failures=["so it is"] * (kind.function == "training.training"))

    monkeypatch.setattr(session.Kind, "run", tables)
    with pytest.raises(
        CheckFailedError, match=r"2 things were wrong, the first: ValueError: out of luck\..*results.md"
    ):
        session.run(Setting("cpu", "", 0.0), 10.0, list("abe"), tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    assert [len(part["tables"]) for part in content["parts"].values()] == [2, 1, 2]
    assert content["parts"]["b"]["failure"] == "ValueError: out of luck"
    ends = [part["tables"][0]["rows"][0][0] for part in content["parts"].values()]
    assert [round(end - ends[0]) for end in ends] == [0, 150, 450], "a part has its share of the time"
    assert "**so it is**" in (tmp_path / "results.md").read_text()


def breaks(item: str, setting: Setting) -> str:
    if item == "wrong":
        raise ValueError("no such thing")
    if item == "device":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if item == "slow":
        time.sleep(0.5)
    return f"{item} in {threading.current_thread().name}"


@pytest.mark.usefixtures("in_threads")
def test_after_an_error_of_the_gpu_comes_a_new_process() -> None:
    items = ["first", "wrong", "second", "device", "third", "slow", "never"]
    found = list(processes.each(breaks, items, Setting("cpu", "", time.monotonic() + 0.3)))
    assert [item for item, _ in found] == items[:-1]
    answers = dict(found)
    assert answers["wrong"] == processes.Failed("ValueError: no such thing")
    assert answers["device"].ends
    assert not answers["device"].late
    first, second, third = (answers[item].partition(" in ")[2] for item in ("first", "second", "third"))
    assert first == second != third
    assert "did not answer in time" in answers["slow"].message
    assert answers["slow"].late


@pytest.mark.parametrize("late", [False, True])
def test_what_there_was_no_time_for_is_not_wrong(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = processes.Failed("it did not answer", ends=True, late=late)
    monkeypatch.setattr(correctness, "each", lambda check, wanted, setting: [(wanted[0], failed)])
    (table,) = correctness.correctness(Setting("cpu", "", 0.0))
    assert bool(table.failures) == (not late)
    assert "0 of 5 measured" in table.remarks[0]
    assert "the time was over before the others" in table.remarks[0]


@pytest.mark.parametrize(
    ("message", "late", "wrong"),
    [("OutOfMemoryError: CUDA out of memory.", False, False), ("KeyError: 3", False, True), ("no answer", True, False)],
)
def test_memory_is_over_and_something_is_wrong(
    message: str, late: bool, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two things: the second one counts."""
    failed = processes.Failed(message, late=late)
    monkeypatch.setattr(comparison, "each", lambda peak, points, setting: [(points[0], 1.5), (points[1], failed)])
    (table,) = comparison.memory(Setting("cpu", "", 0.0))
    assert table.rows == [("custom-reference", 1.5, None)]
    said = table.failures if wrong else table.remarks
    assert said == [f"custom-reference, B=4: {message}"]


class Doubled:
    """An end of a pipe, through which a loss comes twice as large."""

    def __init__(self, end: Any):
        self.end, self.recv = end, end.recv

    def send(self, answer: Any) -> None:
        self.end.send(replace(answer, loss=2 * answer.loss) if isinstance(answer, rows.Ready) else answer)


@pytest.mark.usefixtures("in_threads")
def test_a_peer_that_fails_or_disagrees_ends_no_comparison() -> None:
    def work(end: Any, name: str, case: Any) -> None:
        if name == "baseline-eager":
            raise ValueError("no such kernel")
        rows.work(Doubled(end) if name == "torch-eager" else end, name, case)

    case = comparison.cases(Setting("cpu", "", 0.0))["G4"]
    names = ["custom-reference", "baseline-eager", "torch-eager"]
    measured = measurement.measure(case, names, rounds=1, work=work, at_once=True)
    assert list(measured.rows) == ["custom-reference"]
    assert measured.left_out == {"baseline-eager": "A measuring process failed: ValueError: no such kernel"}
    assert measured.disagreeing.keys() == {"torch-eager"}
    table = comparison.table_of("G4", measured)
    assert [row[0] for row in table.rows] == ["custom-reference", "custom-reference again"]
    assert "torch-eager and custom-reference disagree" in table.failures[0]


def test_a_table_that_fails_ends_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*inputs: Any, **settings: Any) -> Any:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(comparison, "measure", fails)
    tables = list(comparison.comparison(Setting("cpu", "", time.monotonic() + 60)))
    assert [table.failures for table in tables] == [["ZeroDivisionError: division by zero"]] * 5


def test_what_is_measured_at_once_fits_into_the_memory() -> None:
    """Of an H100, an H200, and a GPU that holds everything."""
    batches = {}
    for memory in (80e9, 150e9, 500e9):
        planned = [one for one in comparison.plan(Setting("cuda", "", 0.0), int(memory)) if one.title.startswith("G1")]
        batches[memory] = [one.case.batch_size for one in planned]
        for one in planned:  # the bar holds for the case's own batch, and beside peers
            assert (one.case.bar is None) == (one.case.batch_size < 64 or "without" in one.title)
    assert batches == {80e9: [16, 8], 150e9: [32, 64, 16], 500e9: [64, 64]}


def test_a_step_is_captured_before_it_is_timed() -> None:
    assert max(graph.WARM_UP, replay.WARM_UP) <= rows.WARM_UP


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "3"], "--minutes belongs to --gpu"),
        (["--gpu", "--device", "cpu"], "--gpu needs --output DIRECTORY"),
        (["--gpu", "--output", "x", "--case", "C1"], "--case cannot be combined with --gpu"),
        (["--gpu", "--output", "x", "--device", "cpu", "--text", "nowhere"], "expected a file that exists"),
        (["--gpu", "--output", "x", "--device", "cpu", "--minutes", "0"], "more than 0"),
        pytest.param(
            ["--gpu", "--output", "x"],
            "--device cpu tries the same",
            marks=pytest.mark.skipif(bool(compute_capabilities()), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        bench.main(arguments)
    assert list(tmp_path.iterdir()) == []


def test_results_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match="holds results already"):
        bench.main(["--gpu", "--device", "cpu", "--output", str(tmp_path)])


def test_on_a_gpu_everything_is_tried() -> None:
    """By name: what could be misspelt where it is not tried."""
    wanted = correctness.items(small=False)
    assert len(set(wanted)) == len(wanted)
    for item in wanted:
        correctness.config_of(
            item._replace(precision=item.precision if item.kind != "pair" else "fp32"), torch.device("cpu")
        )
    assert {item.precision for item in wanted if item.kind == "network"} == set(correctness.PRECISIONS)
    configs = [correctness.config_of(item, torch.device("cuda")) for item in wanted if item.kind == "network"]
    assert all(config.d_head % 8 == 0 for config in configs), "fused attention takes no others"
    assert {config.kv_heads for config in configs} == {2, 4}
    assert all(not config.violations() for config in configs)
    found = comparison.cases(Setting("cuda", "", 0.0))
    assert [case.batch_size for case in found.values()] == [64, 12, 64]
    for name in (*comparison.PEERS, *comparison.OF_SMALL_ONES, *comparison.OF_MEMORY):
        assert network_of(name) in ("custom", "baseline", "huggingface")
    assert all(is_compiled(name) and compile_mode(name) is None for name in comparison.PEERS)
    assert [compile_mode(name) for name in comparison.OF_SMALL_ONES] == [None, "reduce-overhead", "reduce-overhead"]
    assert [name.endswith(GRAPHS) for name in comparison.OF_SMALL_ONES] == [False, True, True]
    for optimization in OPTIMIZATIONS.values():
        for module, name, _ in optimization.bindings():
            assert hasattr(module, name), f"{module.__name__} has no {name}"


def test_values_as_they_are_shown() -> None:
    values = (None, True, 0.0, 1234.5678, 1.5e-9, 12345, "a|b")
    assert [shown(value) for value in values] == ["", "yes", "0", "1,235", "1.50e-09", "12,345", "a\\|b"]
