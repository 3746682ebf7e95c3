"""What each optimization of the kernels gains: an ablation undoes exactly one, and the page shows the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bench_tools import TINY, case_of, ready
from command_tools import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from manual_backprop import kernels
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.kernels.cpu import products
from manual_backprop.kernels.cpu.compiled import CompiledFunction
from manual_backprop.kernels.sizes import SIZES
from manual_backprop.models.custom import CustomTransformer
from manual_backprop.study import kernel_gains
from manual_backprop.study.benchmark.ablations import OPTIMIZATIONS, WITHOUT, Optimization, ablated
from manual_backprop.study.benchmark.cases import OURS, SUBJECT, Case
from manual_backprop.study.benchmark.measurement import AGAIN, MeasuredRow, Measurement, check_agreement
from manual_backprop.study.paired_timing import Row
from manual_backprop.tools import kernel_gains as tool

ARCHITECTURES = ("gpt2", "vaswani", "llama")


@pytest.fixture(autouse=True)
def short_steps(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps without compilation, with sizes at which short steps take every code path of long ones."""
    for module, name, value in OPTIMIZATIONS["compiled"].bindings():
        monkeypatch.setattr(module, name, partial(value))  # another object than the ablation binds
    recomputed = {"small": 0, "small_beside_weights": 0}  # tiny cases keep it else
    in_pieces = {"longest_kept": 8, "piece": 24 * TINY.d_ffn}  # 24 of 48 rows
    monkeypatch.setitem(SIZES, "cpu", replace(SIZES["cpu"], **recomputed, **in_pieces))


def applying(case: Case) -> dict[str, Optimization]:
    return {name: one for name, one in OPTIMIZATIONS.items() if one.applies(case)}


# Ablations


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
@pytest.mark.parametrize("compiles", [False, True], ids=["as written", "as if compiled"])
def test_without_each_optimization_the_gradients_are_the_same(
    architecture: str, precision: str, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompiledFunction, "compiles", lambda self, *args: compiles)
    case = case_of(architecture=architecture, precision=precision)
    answers = {name: ready(name, case) for name in OURS}
    for name, optimization in applying(case).items():
        with ablated(optimization):
            answers[name] = ready(SUBJECT, case)
    assert len(answers) > 10
    check_agreement(precision, answers)


@pytest.mark.parametrize("name", sorted(OPTIMIZATIONS.keys() - {"rows-at-a-time"}))
def test_a_step_without_an_optimization_calls_what_is_in_its_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step calls each replacement function, in at least one architecture."""
    monkeypatch.setattr(
        CompiledFunction, "compiles", lambda self, *args: True
    )  # else fewer tensors lie in ping-pong buffers
    called: set[str] = set()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return function(*args, **kwargs)

        return call

    bindings = OPTIMIZATIONS[name].bindings()
    same = {called_name for module, called_name, value in bindings if getattr(module, called_name) is value}
    assert same <= {"token_embedding_forward"}, "the kernels have the reference's own"
    counting = [(module, called_name, counted(called_name, value)) for module, called_name, value in bindings]
    for architecture in ARCHITECTURES:
        with ablated(replace(OPTIMIZATIONS[name], without=lambda: counting)):
            ready(SUBJECT, case_of(architecture=architecture))
    unused = {"layer_norm_forward", "layer_norm_backward"}  # every norm of a network is behind a residual sum
    unused |= {"rounds_weights"}  # asked in bf16_mixed only: the next test
    assert called == {called_name for _, called_name, _ in bindings} - unused


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own-products", "compiled"])
def test_without_own_products_a_network_has_rounded_matrices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors where PyTorch multiplies: rounding them in every product would take longer."""
    monkeypatch.setattr(products, "rounds_weights", lambda *_: True)
    config = case_of(precision="bf16_mixed").config
    with ablated(OPTIMIZATIONS[name]):
        assert CustomTransformer(replace(config, kernels="fused", compile="always")).rounded is not None


class Products(TorchDispatchMode):
    """Counts matrix products, plain and batched."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).split(".")[1].rstrip("_")
        self.counts["batched" if "bmm" in name else "plain" if name.endswith("mm") else "no product"] += 1
        return function(*args, **(kwargs or {}))


def test_a_step_with_rows_at_a_time_multiplies_more_often() -> None:
    with Products() as with_it:
        ready(SUBJECT, case_of())
    with ablated(OPTIMIZATIONS["rows-at-a-time"]), Products() as without:
        ready(SUBJECT, case_of())
    assert with_it.counts["batched"] == without.counts["batched"]
    assert with_it.counts["plain"] - without.counts["plain"] == 6 * TINY.n_blocks  # of the feed-forward, in two pieces


def test_what_does_nothing_in_a_case_is_not_measured() -> None:
    def names(**changed: Any) -> set[str]:
        return set(applying(case_of(**changed)))

    assert names() == set(OPTIMIZATIONS)
    assert set(OPTIMIZATIONS) - names(precision="bf16") == {"onednn", "flat-buffers"}
    assert names(architecture="llama") == set(OPTIMIZATIONS)


def test_what_was_ablated_is_put_back() -> None:
    def names() -> dict[str, Any]:
        return {
            f"{module.__name__}.{name}": getattr(module, name)
            for optimization in OPTIMIZATIONS.values()
            for module, name, _ in optimization.bindings()
        }

    before = names()
    assert before["manual_backprop.kernels.self_attention_forward"] is kernels.self_attention_forward
    for optimization in OPTIMIZATIONS.values():
        with suppress(KeyError), ablated(optimization):
            assert names() != before
            raise KeyError
        assert names() == before


# What is said about it


def measured(*names: str, more: float = 1.5, megabytes: int = 80) -> Measurement:
    subject, again = (
        MeasuredRow(name, [0.010 * off] * 4, peak_bytes=size)
        for name, off, size in ((SUBJECT, 1, 64_000_000), (SUBJECT + AGAIN, 1.02, 65_000_000))
    )
    others = {name: MeasuredRow(name, [0.010 * more] * 4, peak_bytes=megabytes * 10**6) for name in names}
    case = Case(TINY, 3, 1, "C1")
    return Measurement(case, {SUBJECT: subject, **others}, again, Row("products alone", [0.004] * 4))


def test_a_section_says_what_was_measured() -> None:
    groups = [
        measured(WITHOUT + "arena", kernel_gains.RECOMPUTED),
        measured(WITHOUT + "linear", more=1.015, megabytes=65),
        measured(kernel_gains.NONE_OF_THEM, more=2, megabytes=60),
    ]
    groups[1].left_out[WITHOUT + "compiled"] = "no memory"
    lines = kernel_gains.section(kernel_gains.gains_of(groups)).splitlines()
    assert lines[0] == "## C1, fp32"
    table = [line for line in lines if line.startswith("|")][2:]
    assert table == [
        "| `linear` | `kernels/cpu/linear.py` | *1.01 (1.01 to 1.01)* | *+1.0* |",
        "| `arena` | `kernels/arena.py` | 1.50 (1.50 to 1.50) | +16.0 |",
        "| `compiled` | `kernels/cpu/compiled.py` | left out: no memory | |",
        "| all of them: `kernels=reference` | `kernels/` | 2.00 (2.00 to 2.00) | -4.0 |",
        "| nothing, with `training.recompute=block` | `models/step.py` | 1.50 (1.50 to 1.50) | +16.0 |",
    ]
    assert "`custom-fused`: 10.1 ms a step, peak 64.5 MB." in lines[2]
    assert lines[-1] == "Noise floor: 2.0% of the time, 1.0 MB (6 processes of `custom-fused`)."


def test_where_memory_is_unknown_the_page_says_so() -> None:
    group = measured(WITHOUT + "arena")
    for row in (group.subject, group.again, *group.rows.values()):
        row.peak_bytes = None
    section = kernel_gains.section(kernel_gains.gains_of([group]))
    assert "peak unknown MB" in section
    assert "| unknown |" in section


def test_rows_take_turns_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[str]] = []

    def measure(case: Case, names: list[str], rounds: int, work: Callable[..., None]) -> Measurement:
        groups.append(names)
        return measured(*names[1:])

    monkeypatch.setattr(kernel_gains, "measure", measure)
    llama = case_of(architecture="llama", precision="bf16")
    found = kernel_gains.measure_gains(llama, list(OPTIMIZATIONS), 5)
    assert found.gains.keys() == {
        *(WITHOUT + name for name in applying(llama)),
        kernel_gains.NONE_OF_THEM,
        kernel_gains.RECOMPUTED,
    }
    assert [group[0] for group in groups] == [SUBJECT] * len(groups)
    assert max(map(len, groups)) <= kernel_gains.AT_ONCE + 1


def test_every_optimization_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    page = kernel_gains.page(["## C1"], list(OPTIMIZATIONS), "python -m something", 10)
    package = ROOT / "manual_backprop"
    for name, optimization in OPTIMIZATIONS.items():
        assert f"**`{name}`**" in page
        first, *rest = optimization.place.split(", ")
        for file in (first, *(f"{Path(first).parent}/{other}" for other in rest)):
            assert (package / file).is_file(), file
    assert max(map(len, page.splitlines())) <= 120
    assert "{" not in page


# The command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--means", "aren"], "aren"),
        (["--case", "C1", "--model", "tiny"], "a case fixes it"),
        (["--vocab-size", "99"], "a case fixes it"),
        (["--rounds", "0"], "whole number of at least 1"),
        (["--precison", "fp32"], "did you mean --precision"),
        (["--output", "/nowhere/at/all.md"], "expected a file in a folder that exists"),
    ],
)
def test_a_wrong_option_exits_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(partial(tool.main, arguments)) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) <= 2


def test_the_command_on_the_page_is_the_one_that_was_given() -> None:
    def said(*arguments: str) -> str:
        return tool.command_of(tool.parser().parse(arguments))

    assert said("--output", "x.md") == tool.COMMAND
    given = ("--case", "C1", "C2", "--precision", "fp32", "--means", "arena", "--threads", "1", "--rounds", "3")
    assert said(*given) == " ".join((tool.COMMAND, *given))
