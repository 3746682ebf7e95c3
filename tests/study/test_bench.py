"""The bench: its cases and rows, no timing of rows whose gradients disagree, the measured memory, and its output."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_tools import KERNELS, TINY, case_of, ready
from torch.utils.flop_counter import FlopCounterMode

from manual_backprop import bench
from manual_backprop.common import machine
from manual_backprop.common.allocator import keep_freed_memory, resident_bytes, trim_freed_memory
from manual_backprop.common.errors import CheckFailedError, InputError
from manual_backprop.common.machine import compute_capabilities
from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.kernels.cpu import products
from manual_backprop.kernels.cpu.products import has_products, onednn_is_exact
from manual_backprop.models.flops import flops_per_token
from manual_backprop.study.benchmark import cases, growth, markdown, measurement, page, rows
from manual_backprop.study.benchmark.breakdown import Allocation, Profile, kind_of
from manual_backprop.study.benchmark.breakdown import page as breakdown_page
from manual_backprop.study.benchmark.cases import (
    CASES,
    ONEDNN,
    OURS,
    ROWS,
    SUBJECT,
    Bar,
    Case,
    is_compiled,
    uses_onednn,
)
from manual_backprop.study.benchmark.measurement import MeasuredRow, Measurement, check_agreement
from manual_backprop.study.benchmark.peers import why_not
from manual_backprop.study.benchmark.process_memory import peak_since_reset, reset_peak
from manual_backprop.study.benchmark.products import ProductsOfAStep
from manual_backprop.study.benchmark.rows import Ready
from manual_backprop.study.paired_timing import MeasuringProcess, Row

ROOT = Path(__file__).parents[2]
UNCOMPILED = [name for name in ROWS if not is_compiled(name) and not uses_onednn(name)]
PEERS = [name for name in ROWS if name not in OURS and not name.endswith(ONEDNN)]


# What is asked for


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "C9"], "C9"),
        (["--model", "tny"], "tny"),
        (["--rows", "torch"], "torch"),
        (["--precision", "fp33"], "fp33"),
        (["--case", "C1", "--model", "tiny"], "a case fixes it"),
        (["--case", "C1", "--vocab-size", "65"], "--vocab-size 65"),
        (["--rounds", "0"], "whole number of at least 1"),
        (["--batchsize", "3"], "did you mean --batch-size"),
        (["--json", "/nowhere/at/all"], "expected a file in a folder that exists"),
        (["--picture", "/"], "expected a file in a folder that exists"),
        (["--markdown", "/nowhere/at/all"], "give files that --json wrote"),
        (["--markdown", __file__], "it holds no JSON"),
        pytest.param(
            ["--case", "G1"],
            "no NVIDIA GPU",
            marks=pytest.mark.skipif(bool(compute_capabilities()), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        bench.main(arguments)
    assert len(str(raised.value).splitlines()) <= 2


def test_a_case_brings_its_sizes_precisions_and_bars() -> None:
    options = bench.parser().parse(["--case", "C1", "C4", "--threads", "3"])
    found = [(case.name, case.config.precision, case.bar) for case in bench.cases_of(options)]
    assert found[0] == ("C1", "fp32", Bar(1.4, 0.9))
    assert found[-1] == ("C4", "bf16_mixed", Bar(1.3, 0.9))
    assert [precision for _, precision, _ in found] == 2 * ["fp32", "bf16", "bf16_mixed"]
    for name in ("C1", "C2", "C3", "C4"):
        assert list(CASES[name].bars) == ["fp32", "bf16", "bf16_mixed"], "what people train in is measured"
    (case,) = bench.cases_of(bench.parser().parse(["--case", "C3", "--precision", "bf16_mixed", "--batch-size", "2"]))
    assert case.bar is None, "the bar is that of the case's own batch"
    assert (case.config.vocab_size, case.config.d_ffn, case.batch_size) == (50257, 1024, 2)
    (case,) = bench.cases_of(bench.parser().parse(["--model", "gpt2"]))
    assert case.config.vocab_size == 50257
    (case,) = bench.cases_of(bench.parser().parse([]))
    assert (case.config.d_model, case.config.vocab_size) == (384, 1024)
    assert (case.batch_size, case.config.precision) == (16, "fp32")


def test_help_names_every_row_and_case() -> None:
    shown = bench.parser().format_help()
    for name in (*(name.removesuffix(ONEDNN) for name in ROWS), f"...{ONEDNN}", *CASES):
        assert name in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_it_needs_torch_only() -> None:
    script = (
        "import sys; from manual_backprop import bench; bench.parser(); assert 'torch' not in sys.modules; "
        "from manual_backprop.study.benchmark import breakdown, growth, measurement, page, peers, products, rows; "
        "print(sorted({'mlflow', 'hydra', 'omegaconf', 'datasets', 'transformers', 'matplotlib', 'safetensors', 'rich'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# Agreement


@pytest.mark.parametrize("architecture", ["gpt2", "vaswani", "llama"])
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_uncompiled_rows_agree(architecture: str, precision: str) -> None:
    case = case_of(architecture=architecture, precision=precision)
    names = [name for name in UNCOMPILED if ROWS[name] != "huggingface" or why_not(case.config) is None]
    assert ("huggingface-eager" in names) == (architecture != "vaswani" and precision != "fp64")
    check_agreement(precision, {name: ready(name, case) for name in names})


@pytest.mark.parametrize("precision", ["fp64", "bf16_mixed"])
def test_uncompiled_rows_agree_on_an_encoder_decoder(precision: str) -> None:
    case = replace(CASES["S1"].case("S1", precision, 1, 2), bar=None)
    names = [name for name in UNCOMPILED if ROWS[name] != "huggingface"]
    check_agreement(precision, {name: ready(name, case) for name in names})
    reason = why_not(case.config)
    assert reason is not None
    assert "network=encoder_decoder" in reason
    assert "L=1+1 " in case.describe()
    products = ProductsOfAStep(case.config, case.batch_size)
    with FlopCounterMode(display=False) as counter:
        products.step()
    assert counter.get_total_flops() == flops_per_token(case.config, case.config.max_seq_len) * case.tokens


def test_rows_by_hand_have_what_their_names_say() -> None:
    made: dict[str, CustomTransformerConfig] = {}
    for name in OURS:
        network = rows.build(name, case_of(precision="fp64")).network  # type: ignore[attr-defined]
        made[name] = network.config
    assert [(config.kernels, config.recompute) for config in made.values()] == [
        ("reference", "none"),
        ("fused", "none"),
        ("fused", "block"),
    ]
    assert [config.compile for config in made.values()] == ["never", "always", "always"]


def test_a_planted_difference_is_no_agreement() -> None:
    case = case_of(precision="fp64")
    trainer = rows.build("torch-eager", case)
    loss = trainer.loss_and_gradients(rows.random_batch(case, trainer.device)).item()
    gradients = trainer.gradients()
    first = Ready(loss, rows.sketch_of(gradients))
    name = "blocks.1.attention.value.bias"
    wrong = dict(gradients) | {name: 1.001 * gradients[name]}
    other = replace(first, sketch=rows.sketch_of(wrong))
    check_agreement("bf16", {"ours": first, "theirs": other})
    with pytest.raises(CheckFailedError, match="theirs and ours disagree, so nothing was measured: all gradients"):
        check_agreement("fp64", {"ours": first, "theirs": other})
    doubled = dict(gradients) | {name: 2 * gradients[name]}
    with pytest.raises(CheckFailedError, match=f"gradient of {name}: off by .* at most 0.4"):
        check_agreement("bf16", {"ours": first, "theirs": replace(first, sketch=rows.sketch_of(doubled))})
    for loss in (1.01 * first.loss, float("nan")):
        with pytest.raises(CheckFailedError, match="loss"):
            check_agreement("fp64", {"ours": first, "theirs": replace(first, loss=loss)})
    lost = dict(gradients) | {name: torch.full_like(gradients[name], float("nan"))}
    with pytest.raises(CheckFailedError, match="gradient"):
        check_agreement("bf16", {"ours": first, "theirs": replace(first, sketch=rows.sketch_of(lost))})


@pytest.mark.slow
def test_in_a_coarse_format_a_peer_may_err_in_a_small_gradient_and_ours_may_not() -> None:
    """PyTorch sums the gradients of a layer norm in bf16 on a CPU: of a network like C4 they are off by 0.2 to 0.5."""
    case = case_of(precision="bf16")
    true = measurement.measure_of(case)
    assert true is not None
    assert measurement.measure_of(case_of(precision="fp32")) is None
    check_agreement("fp32", {"true": true, "here": ready("torch-eager", case_of(precision="fp32"))})
    answers = {name: ready(name, case) for name in ("custom-fused", "torch-eager", "baseline-eager")}
    assert check_agreement("bf16", answers, true) == []
    trainer = rows.build("torch-eager", case)
    trainer.loss_and_gradients(rows.random_batch(case, trainer.device))
    names = [f"blocks.{block}.attention_norm.bias" for block in range(2)]
    wrong = {name: gradient * (0.3 if name in names else 1) for name, gradient in trainer.gradients().items()}
    off = replace(answers["torch-eager"], sketch=rows.sketch_of(wrong))
    (remark,) = check_agreement("bf16", answers | {"torch-eager": off}, true)
    words = r"torch-eager itself rounds: 2 of its 36 gradients off .* of blocks\.[01]\.attention_norm\.bias, by 0\.\d"
    assert re.match(words, remark), remark
    for ours in ("custom-fused", "custom-fused again"):
        with pytest.raises(CheckFailedError, match=f"{ours} and the gradients in fp32 disagree.*attention_norm.bias"):
            check_agreement("bf16", answers | {ours: off}, true)
    everything = {name: 1.2 * gradient for name, gradient in trainer.gradients().items()}
    with pytest.raises(CheckFailedError, match=r"torch-eager and .* disagree.*all gradients: off by"):
        check_agreement("bf16", answers | {"torch-eager": replace(off, sketch=rows.sketch_of(everything))}, true)


def test_a_sketch_measures_the_distance_of_two_gradients() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randn(2, 50, 40, generator=generator)
    sketches = [rows.sketch_of({"weight": gradient})["weight"] for gradient in (first, second)]
    distance = (first - second).norm().item()
    assert 0.3 * distance < measurement._distance(*sketches) < 2 * distance


def test_transformers_trains_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of three whole steps, so large that clipping and the matrices' decay change them."""
    monkeypatch.setattr(rows, "LEARNING_RATE", 0.01)
    case = case_of(precision="fp64")
    losses = {}
    for name in ("torch-eager", "baseline-eager", "huggingface-eager"):
        trainer = rows.build(name, case)
        batch = rows.random_batch(case, trainer.device)
        losses[name] = []
        for _ in range(3):
            losses[name].append(trainer.loss_and_gradients(batch).item())
            trainer.update(0.01)
    assert losses["torch-eager"][0] - losses["torch-eager"][2] > 0.1
    assert losses["huggingface-eager"] == pytest.approx(losses["torch-eager"], rel=1e-6), "their loss is in float32"
    assert losses["baseline-eager"] == pytest.approx(losses["torch-eager"], rel=1e-9)


def test_without_transformers_its_rows_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not(TINY) is None
    assert why_not(replace(TINY, architecture="vaswani")) == "transformers has no network of architecture=vaswani"
    assert why_not(replace(TINY, precision="fp64")) == "transformers calculates every loss in float32"
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert why_not(TINY) == "transformers is not installed"


# Every peer gets every switch that ours gets


def test_every_peer_has_a_row_with_the_products_of_the_kernels() -> None:
    assert [name for name in ROWS if name.endswith(ONEDNN)] == [name + ONEDNN for name in PEERS]
    assert [name for name in OURS if uses_onednn(name)] == KERNELS
    for name in PEERS:
        assert ROWS[name + ONEDNN] == ROWS[name]
        assert is_compiled(name + ONEDNN) == is_compiled(name)
        assert not uses_onednn(name)
    case = case_of(precision="fp32")
    found = measured()
    found.rows["baseline-compiled-onednn"] = MeasuredRow("baseline-compiled-onednn", [0.008] * 4)
    assert found.fastest_peer is found.rows["baseline-compiled-onednn"]
    assert [cases.without_effect(name, case) for name in ROWS] == [None] * len(ROWS)


@pytest.mark.parametrize("precision", ["fp64", "bf16", "bf16_mixed"])
def test_a_row_whose_switch_does_nothing_is_left_out_with_the_reason(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(precision=precision)
    for name in PEERS:
        assert cases.without_effect(name, case) is None
        assert "oneDNN" in str(cases.without_effect(name + ONEDNN, case))
    asked: list[str] = []

    def warm_up(closing: object, name: str, *how: object, restarts: bool) -> tuple[Any, MeasuredRow, Ready]:
        assert restarts
        asked.append(name)
        if name == "baseline-eager":
            raise CheckFailedError("here it ends")
        return SimpleNamespace(), MeasuredRow(name), Ready(1.0, {})

    monkeypatch.setattr(measurement, "_warm_up", warm_up)
    monkeypatch.setattr(measurement, "measure_of", lambda case: None)
    with pytest.raises(CheckFailedError, match="here it ends"):
        measurement.measure(case, ["torch-eager", "torch-eager-onednn", "baseline-eager"])
    assert asked == ["torch-eager", "torch-eager again", "baseline-eager"], "no process is started for it"


def products_of_steps(end: Connection, name: str, case: Case) -> None:
    """The number of a row's float32 products in a step that run in oneDNN, from its own log."""
    rows.prepare(name, case)
    with rows.switches(name, case), tempfile.TemporaryFile("w+") as heard:
        steps = rows.Steps(name, case)
        steps.seconds(1)
        sys.stdout.flush()
        before = os.dup(1)
        os.dup2(heard.fileno(), 1)
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            steps.seconds(1)
        os.dup2(before, 1)
        heard.seek(0)
        lines = [line for line in heard if "exec" in line and ("matmul" in line or "inner_product" in line)]
    end.send((len(lines), steps.products))


@pytest.mark.skipif(not onednn_is_exact(), reason="products are those of PyTorch here")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("baseline-eager", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("huggingface-eager", "torch-eager")),
    ],
)
def test_a_peer_s_products_are_made_by_the_library_that_its_row_says(name: str) -> None:
    case = replace(case_of(precision="fp32"), batch_size=8)  # PyTorch asks oneDNN for no product that is too small
    with MeasuringProcess(products_of_steps, name + ONEDNN, case) as process:
        count, library = process.answer()
    assert count >= 3 * 4 * case.config.n_blocks  # forward, dx and dW of at least four matrices a block
    assert library == "oneDNN"
    with MeasuringProcess(products_of_steps, name, case) as process:
        count, library = process.answer()
    assert count == 0
    assert library != "oneDNN"


@pytest.mark.slow
def test_the_row_of_the_kernels_says_whose_products_it_has() -> None:
    with MeasuringProcess(products_of_steps, "custom-fused", case_of(precision="fp32")) as process:
        count, library = process.answer()
    assert (library == rows.OWN) == has_products()
    assert not (count and has_products())


def test_where_onednn_rounds_a_row_by_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with AMX, where the kernels use PyTorch's default library too."""
    said: list[object] = []

    class End:
        def send(self, answer: object) -> None:
            said.append(answer)

    monkeypatch.setattr(rows, "prepare", lambda name, case: None)
    monkeypatch.setattr(products, "onednn_is_exact", lambda: False)
    rows.work(End(), "baseline-eager-onednn", case_of(precision="fp32"))  # type: ignore[arg-type]
    (answer,) = said
    assert isinstance(answer, rows.LeftOut)
    assert "no exact float32 products" in answer.reason
    assert rows.library_of_products(SUBJECT, case_of(precision="fp32")) != "oneDNN"


def test_all_peers_update_by_pytorchs_fused_adamw() -> None:
    for name in ("torch-eager", "baseline-eager", "huggingface-eager"):
        trainer = rows.build(name, case_of(precision="fp32"))
        optimizer = trainer.optimizer  # type: ignore[attr-defined]
        adamw = getattr(optimizer, "torch_optimizer", optimizer)
        assert type(adamw) is torch.optim.AdamW, name
        assert all(group["fused"] for group in adamw.param_groups), name
        assert sorted({group["weight_decay"] for group in adamw.param_groups}) == [0.0, rows.ADAMW["weight_decay"]]


# Memory and the limit

MEGABYTE = 1_000_000


def allocate(end: Connection, before: int, after: int) -> None:
    """Frees `before` bytes, resets the peak, and allocates `after` bytes. Sends the measured peak."""
    keep_freed_memory()
    after_imports = resident_bytes("VmRSS")
    pieces = [torch.ones(MEGABYTE // 4) for _ in range(before // MEGABYTE)]  # small enough to stay on the heap
    del pieces
    trim_freed_memory()
    assert reset_peak(torch.device("cpu"))
    held = torch.ones(after // 4)
    peak = peak_since_reset(held.device, after_imports)
    end.send(peak)


@pytest.mark.slow
@pytest.mark.skipif(resident_bytes("VmHWM") is None, reason="this system does not tell")
def test_what_a_process_takes_is_what_counts() -> None:
    with MeasuringProcess(allocate, 300 * MEGABYTE, 200 * MEGABYTE) as process:
        peak = process.answer()
    # less where the system meanwhile takes pages back that were there before
    assert 190 * MEGABYTE <= peak <= 215 * MEGABYTE


@pytest.mark.parametrize(("architecture", "n_kv_heads"), [("gpt2", None), ("vaswani", None), ("llama", 2)])
def test_the_limit_has_the_products_of_the_step(architecture: str, n_kv_heads: int | None) -> None:
    config = replace(TINY, architecture=architecture, n_kv_heads=n_kv_heads)
    of_a_step = ProductsOfAStep(config, batch_size=3)
    with FlopCounterMode(display=False) as counter:
        of_a_step.step()
    assert counter.get_total_flops() == flops_per_token(config, 16) * 3 * 16


# What it writes


def measured(peers: bool = True) -> Measurement:
    times = {SUBJECT: 0.010, "torch-eager": 0.020, "baseline-compiled": 0.015}
    made = {name: MeasuredRow(name, [time] * 4, peak_bytes=64_000_000) for name, time in times.items()}
    made["baseline-compiled"].peak_bytes, made["baseline-compiled"].cache = 128_000_000, "warm"
    made["baseline-compiled"].cold_seconds = 31.0
    for name, row in made.items():
        row.products = "oneDNN" if name == SUBJECT else "MKL"
    if not peers:
        made = {SUBJECT: made[SUBJECT]}
    again = MeasuredRow(SUBJECT + measurement.AGAIN, [0.0101] * 4, peak_bytes=64_000_000)
    case = Case(TINY, 3, 1, "C1", Bar(1.3, 0.4))
    return Measurement(case, made, again, Row("products alone", [0.004] * 4), {"huggingface-eager": "not installed"})


def test_the_table_says_what_was_measured() -> None:
    lines = page.table(measured()).splitlines()
    row = next(line for line in lines if line.startswith("baseline-compiled"))
    assert row.split()[1:4] == ["15", "3,200", "1.500"]
    assert row.split()[-5:] == ["128", "2.00", "26.7%", "0.0", "31.0"]
    assert f"{'huggingface-eager':<{page.WIDTH}} left out: not installed" in lines
    assert f"{page.processor_and_instructions()}; matrix products: oneDNN in {SUBJECT}; MKL in torch-eager" in lines[1]
    assert any(line.startswith("noise floor 1.0%") for line in lines)
    assert lines[-1] == (
        "fastest peer: baseline-compiled; time peer/ours = 1.50 (1.50 to 1.50); memory ours/peer = 0.50; "
        "the bar: time at least 1.3, memory at most 0.4, which is missed"
    )
    assert page.table(measured(peers=False)).splitlines()[-1] == "no peer was measured"


def test_the_processor_is_named_with_its_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "cpuinfo"
    one = "vendor_id : X\ncpu family : 25\nmodel : 17\nmodel name : Some CPU\nflags : sse avx2 avx512f avx512_bf16\n"
    told.write_text(one + "\n" + one)
    monkeypatch.setattr(machine, "CPUINFO", told)
    assert page.processor_and_instructions() == "Some CPU (family 25, model 17, AVX-512 with bf16)"
    told.unlink()
    assert page.processor_and_instructions() == (platform.processor() or platform.machine())


def test_the_table_of_the_readme_comes_from_what_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for name, precision, ours in (("C2", "fp32", 0.010), ("C1", "bf16_mixed", 0.02), ("C1", "fp32", 0.010)):
        found = measured()
        found.case = replace(found.case, name=name, config=replace(TINY, precision=precision))
        found.rows[SUBJECT].seconds = [ours] * 4
        files.append(tmp_path / f"{name}-{precision}.json")
        machine = {"torch": "2.13.0+cpu", "processor": "Some CPU"}
        files[-1].write_text(json.dumps({"version": page.VERSION, "machine": machine, "cases": [page.as_json(found)]}))
    bench.main(["--markdown", *map(str, files)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:3] for line in lines[2:5]] == [
        [" C1 ", " fp32 "],
        [" C1 ", " bf16_mixed "],
        [" C2 ", " fp32 "],
    ]
    assert lines[2] == (
        "| C1 | fp32 | 10 ms, 64 MB | 40% | `baseline-compiled` | 1.50 (1.50 to 1.50) | 1.0% | 0.50 | "
        "`python -m manual_backprop.bench --case C1 --precision fp32 --rounds 2 --rows torch-eager baseline-compiled` |"
    )
    assert lines[-1] == (
        "Measured on Some CPU, 1 threads, torch 2.13.0. "
        "Ours is slower than the fastest peer in C1 in bf16_mixed (0.75)."
    )
    assert len({line.count("|") for line in lines[:5]}) == 1
    with pytest.raises(InputError, match="C1 fp32 is also in another of the files"):
        markdown.page([files[-1], files[-1]])


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    page.draw([measured(), measured(peers=False)], tmp_path / "bench.png")
    growth.draw([(case_of(), [measured()] * 2, [measured()] * 2)], tmp_path / "growth.png")
    for name in ("bench.png", "growth.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_growth_is_printed_written_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's wiring: what it asks the bench for, and where the answers stand. Measured: .ci/nightly."""
    asked: list[tuple[int, int]] = []

    def measure(case: Case, names: list[str], rounds: int) -> Measurement:
        asked.append((case.config.max_seq_len, case.batch_size))
        assert (names, rounds) == ([SUBJECT, "baseline-eager"], 1)
        return replace(measured(), case=case)

    monkeypatch.setattr(growth, "measure", measure)
    written, drawn = tmp_path / "growth.json", tmp_path / "growth.png"
    given = ["--model", "tiny", "--grow", "--rows", "baseline-eager", "--rounds", "1"]
    bench.main([*given, "--json", str(written), "--picture", str(drawn)])
    assert asked[:6] == [(length, growth.SEQUENCES) for length in growth.LENGTHS]
    assert [size for _, size in asked[6:]] == list(growth.BATCH_SIZES)
    assert "best peer / ours" in capsys.readouterr().out
    (grown,) = json.loads(written.read_text())["growth"]
    assert [point["case"]["batch_size"] for point in grown["over_batch_size"]] == list(growth.BATCH_SIZES)
    assert len(grown["over_length"]) == len(growth.LENGTHS)
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_growth_is_beside_that_of_the_best_peer() -> None:
    points = growth.over_length(case_of())
    assert [point.config.max_seq_len for point in points] == [64, 128, 256, 512, 1024, 2048]
    assert [point.batch_size for point in growth.over_batch_size(case_of())] == [1, 2, 4, 8, 16, 32]
    lines = growth.table([measured()] * 2, [measured()] * 2).splitlines()
    ratios = [line.split()[-2:] for line in lines if line.startswith("best peer / ours")]
    assert ratios == [["1.5", "1.5"], ["1", "1"]]


@pytest.mark.parametrize(
    ("name", "place", "kind"),
    [
        ("aten::addmm", "", "products"),
        ("library::product", "pair: feed_forward_forward", "products"),
        ("library::add_product", "pair: linear_backward", "products"),
        ("aten::mm", "pair: linear_cross_entropy", "products"),
        ("aten::addmm_", "pair: feed_forward_backward", "products"),
        ("aten::bmm", "pair: attention_backward", "attention"),
        ("aten::add", "pair: residual_layer_norm_forward", "norm"),
        ("aten::mul", "pair: feed_forward_backward", "activation"),
        ("aten::exp", "pair: linear_cross_entropy", "loss"),
        ("aten::_softmax", "", "attention"),
        ("aten::_log_softmax", "", "loss"),
        ("graph_0_cpp_fused_gelu_gelu_backward_sum_view_2", "", "activation"),
        ("aten::mul_", "update", "optimizer"),
        ("aten::mm", "update", "optimizer"),
        ("aten::copy_", "", "other"),
    ],
)
def test_kinds_of_work(name: str, place: str, kind: str) -> None:
    assert kind_of(name, place) == kind


def test_a_breakdown_shares_out_the_measured_step() -> None:
    profile = Profile({"products": 0.75, "norm": 0.25}, {}, [Allocation(2_000_000, "aten::empty", 3.0)])
    lines = breakdown_page(measured().subject, profile).splitlines()
    assert lines[1].split() == ["products", "7.500", "ms", "75.0%"]
    assert lines[-1].split() == ["2.00", "MB", "x", "3", "aten::empty"]
