"""Functions that become libraries: right in every format, size and number of threads, and what happens without them."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_tools import ROOT, environment, run_compiling
from kernel_libraries import compile_missing, functions, kinds_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from manual_backprop import ops
from manual_backprop.common.batch import Batch
from manual_backprop.common.digests import file_digest, json_digest
from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.kernels import replay
from manual_backprop.kernels.cpu import activations, compiled, libraries, loss, rowwise
from manual_backprop.kernels.cpu.compiled import CompiledFunction, compiled_functions
from manual_backprop.models.custom import CustomTransformer
from manual_backprop.ops.numerics import wide
from manual_backprop.tracking.environment import environment_of

pytestmark = pytest.mark.usefixtures("one_thread")

FP32 = dict.fromkeys(("activation", "parameter"), torch.float32)
SIZES = ((2, 2), (3, 37), (130, 65))  # of the first letter, and of the second
NUMBER = 0.1  # epsilon: whatever a function takes
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing was loaded or has failed before. The libraries are those that this machine has, or gets now."""
    forget()
    yield
    forget()


def forget() -> None:
    compiled._failed.clear()
    compiled._made.clear()
    for function in compiled._registered:
        function.calls.clear()
        function.libraries.clear()


def draw(function: CompiledFunction, sizes: tuple[int, ...], kinds: dict[str, torch.dtype]) -> list[Tensor | float]:
    """Arguments for it: normal numbers, larger ones among them, and squares where only they make sense."""
    generator = torch.Generator().manual_seed(sum(sizes))
    names = dict.fromkeys(letter for argument in function.arguments for _, letter in argument.dimensions)
    letters = dict(zip(names, sizes[: len(names)], strict=True))
    arguments: list[Tensor | float] = []
    for name, argument in zip(inspect.signature(function.function).parameters, function.arguments, strict=True):
        shape = [factor * letters[letter] for factor, letter in argument.dimensions]
        if argument.kind in compiled.NUMBERS:
            arguments.append(NUMBER)
        else:
            x = 4 * torch.randn(shape, generator=generator)
            x = x.square() if name == "second_moment" else x
            arguments.append(x.to(compiled.FIXED.get(argument.kind) or kinds[argument.kind]))
    return arguments


def results(function: CompiledFunction, arguments: list[Tensor | float], exact: bool = False) -> list[Tensor]:
    """All its tensors after a call."""
    copies = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
    if exact:
        copies = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in copies]
    function(*copies)
    return [x for x in copies if isinstance(x, Tensor)]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.double().norm().clamp(min=1e-30))


EVERY = functions()


@pytest.fixture(scope="module")
def every_library() -> None:
    """All at once: a tenth of the time that they take one by one."""
    compile_missing()


@pytest.mark.slow
@pytest.mark.usefixtures("every_library")
@pytest.mark.parametrize(
    ("function", "precision"), EVERY, ids=[f"{function.__name__}-{precision}" for function, precision in EVERY]
)
def test_a_library_is_as_near_to_float64_as_the_function_as_it_is_written(
    function: CompiledFunction, precision: str
) -> None:
    """In every size and with any number of threads, which give the same bits."""
    kinds = kinds_of(precision)
    for sizes in (*SIZES, (3, 4096)) if function.group == "optimizer" else SIZES:
        arguments = draw(function, sizes, kinds)
        with compiled_functions(()):
            got = results(function, arguments)
            torch.set_num_threads(2)
            again = results(function, arguments)
            torch.set_num_threads(1)
        assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
        written, exact = results(function, arguments), results(function, arguments, exact=True)
        for one, other, want in zip(got, written, exact, strict=True):
            assert error(one, want) <= 2 * error(other, want) + UNIT.get(one.dtype, 0)
    assert function.libraries, "it was not compiled"
    assert not compiled._failed


@pytest.mark.slow
def test_a_library_is_loaded_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another process, which finds it; a damaged one counts as none."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    function = activations.bias_relu
    formats = FP32
    arguments = draw(function, SIZES[-1], formats)
    with compiled_functions(()):
        want = results(function, arguments)
    script = (
        "import sys, torch\n"
        "from manual_backprop.kernels.cpu import activations, compiled\n"
        "with compiled.compiled_functions(()):\n"
        "    activations.bias_relu(torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(5))\n"
        "assert activations.bias_relu.libraries, compiled._failed\n"
        "assert not [name for name in sys.modules if name.startswith(('torch._inductor', 'torch._dynamo'))]\n"
    )
    given = environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path), CXX="/nowhere/c++")
    done = subprocess.run([sys.executable, "-c", script], env=given, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    request = function.request(formats)
    for library in tmp_path.rglob("*.so"):
        content = library.read_bytes()
        library.unlink()  # and not written over: this process has it in use
        library.write_bytes(content[:-1])
    assert libraries.find(request) is None
    forget()
    with compiled_functions(()):
        assert all(torch.equal(one, other) for one, other in zip(results(function, arguments), want, strict=True))
    assert libraries.find(request) is not None


@pytest.mark.slow
def test_of_processes_that_miss_the_same_one_compiles(tmp_path: Path) -> None:
    """As the first jobs of a sweep do on a new machine."""
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *kernels.cpp*) echo >> {calls};; esac\nexec {libraries.compiler()} "$@"\n'
    )
    compiler.chmod(0o700)
    script = (
        "import torch\n"
        "from manual_backprop.kernels.cpu import activations, compiled\n"
        "with compiled.compiled_functions(()):\n"
        "    activations.bias_relu(torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(5))\n"
        "assert activations.bias_relu.libraries, compiled._failed\n"
    )
    given = environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), CXX=str(compiler))
    processes = [subprocess.Popen([sys.executable, "-c", script], env=given, cwd=ROOT) for _ in range(3)]
    assert [process.wait(200) for process in processes] == [0, 0, 0]
    assert calls.read_text() == "\n"


def test_what_cannot_be_compiled_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float64, one row, tensors that are not contiguous or fit only by broadcasting: nothing is asked of a compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, bias = torch.randn(4, 6), torch.randn(6)
    for one, other in (
        (x.double(), bias.double()),
        (x[:1], bias),
        (x[:, ::2], bias[::2]),
        (x.T, bias[:4]),
        (x, bias[:1]),
    ):
        want, got = torch.empty(one.shape, dtype=one.dtype), torch.empty(one.shape, dtype=one.dtype)
        activations.bias_relu(want, one, other)
        with compiled_functions(()):
            activations.bias_relu(got, one, other)
        assert torch.equal(got, want)
    assert not compiled._failed
    assert not list(tmp_path.rglob("*.*"))


def test_a_library_without_the_function_counts_as_none(libraries_of_relu: Path) -> None:
    request = activations.bias_relu.request(FP32)
    description = libraries_of_relu / libraries.description_name(request)
    other = json.loads(description.read_bytes()) | {"symbol": "another"}
    del other["digest"]
    description.write_text(json.dumps(other | {"digest": json_digest(other)}))
    assert libraries.find(request) is None


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{}", b"{", b'{"library": "x", "symbol": "y"}', None],
    ids=["list", "empty", "half", "no digest", "changed"],
)
def test_a_damaged_description_counts_as_none(content: bytes | None, libraries_of_relu: Path) -> None:
    """It says which address goes where: whatever does not stand there as it was written is made anew."""
    request = activations.bias_relu.request(FP32)
    description = libraries_of_relu / libraries.description_name(request)
    assert libraries.find(request) is not None
    kept = description.read_bytes()
    description.write_bytes(kept.replace(b'"pointers": [', b'"pointers": [0, ') if content is None else content)
    assert libraries.find(request) is None


@pytest.fixture
def libraries_of_relu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the description of bias_relu lies, beside a library that need not be one to be found."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(libraries.ctypes, "CDLL", lambda path: SimpleNamespace(kernel=SimpleNamespace()))
    library = libraries.folder() / "content"
    library.write_bytes(b"library")
    name = file_digest(library) + ".so"
    library.rename(library.with_name(name))
    description = {"library": name, "symbol": "kernel", "pointers": [1, 2, 0], "memory": [], "sizes": [[1, "NF"]]}
    signed = description | {"digest": json_digest(description)}
    request = activations.bias_relu.request(FP32)
    (libraries.folder() / libraries.description_name(request)).write_text(json.dumps(signed))
    return libraries.folder()


def test_what_another_process_has_compiled_meanwhile_is_not_compiled_again(
    libraries_of_relu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    compiled._compile([activations.bias_relu.request(FP32)])
    assert not compiled.newly_compiled()


def test_libraries_stay_where_they_are_when_inductor_works_in_the_same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets the variable by which both are told another place."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    before = libraries.folder_path()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert cache_dir() == os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert libraries.folder_path() == before
    for given in ("/given", cache_dir() + "_of_mine"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
        assert libraries.folder_path() == Path(given) / "manual_backprop" / "kernels"


@pytest.mark.parametrize(
    ("cxx", "words"),
    [("g++ -O2", "CXX is 'g++ -O2', which is no program here"), ("", "no C++ compiler was found: install g++")],
)
def test_without_a_compiler_the_reason_says_what_was_looked_for(
    cxx: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(libraries.CompilerError, match=re.escape(words)):
        libraries.build([activations.bias_relu.request(FP32)])


def test_without_a_folder_the_reason_says_where_to_put_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setenv("CXX", sys.executable)  # a program, which is not asked
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(libraries.CompilerError, match=r"kernels, but Not a directory: set XDG_CACHE_HOME .*=never"):
        libraries.build([activations.bias_relu.request(FP32)])


def test_a_network_that_could_not_compile_says_that_it_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bits are those without: a run writes that down."""
    monkeypatch.setattr(compiled, "build", lambda wanted: (_ for _ in ()).throw(OSError("no room")))
    monkeypatch.setattr(compiled, "find", lambda wanted: None)
    config = CustomTransformerConfig(vocab_size=11, d_model=8, n_heads=2, max_seq_len=6, compile="always")
    network = CustomTransformer(replace(config, kernels="fused"))
    assert environment_of(network)["compiled"] is True
    network.predict(torch.tensor([[1, 2, 3]]))
    assert environment_of(network)["compiled"] is False


def test_all_that_a_network_has_compiled_is_compiled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(compiled, "build", lambda wanted: asked.append(sorted(one.name for one in wanted)))
    monkeypatch.setattr(compiled, "find", lambda wanted: None)
    monkeypatch.setattr(compiled, "load", lambda wanted, place: (_ for _ in ()).throw(OSError("there is none")))
    for architecture, precision, norms, activation in (
        ("gpt2", "bf16_mixed", True, "bias_gelu_tanh"),
        ("vaswani", "bf16", True, "bias_relu"),
        ("llama", "fp32", False, "swiglu"),
    ):
        forget()
        config = CustomTransformerConfig(
            vocab_size=11, d_model=8, n_heads=2, max_seq_len=6, architecture=architecture, precision=precision
        )
        network = CustomTransformer(replace(config, kernels="fused", compile="always"))
        network.sgd(0.1, 0.9) if architecture == "llama" else network.adamw(0.1, (0.9, 0.99), 1e-8)
        tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
        network.loss_and_gradients(Batch(tokens, tokens), denominator=6, step=1)
        (names,) = asked
        of_norm = [one.__name__ for one in compiled._registered if one.group == "layer_norm"]
        assert [name for name in of_norm if name in names] == of_norm * norms
        of_optimizer = {"squares_of_rows", "sgd_step" if architecture == "llama" else "adamw_step"}
        assert {activation, f"{activation}_gradient", "cross_entropy_of_rows"} | of_optimizer <= set(names)
        assert len(names) == 5 + norms * len(of_norm)
        asked.clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "precision"),
    [("gpt2", "fp32"), ("gpt2", "bf16"), ("gpt2", "bf16_mixed"), ("vaswani", "fp32"), ("llama", "fp32")],
)
def test_libraries_are_called_in_replayed_steps(
    architecture: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CustomTransformerConfig(vocab_size=11, d_model=8, n_heads=2, max_seq_len=6, precision=precision)
    config = replace(config, architecture=architecture, kernels="fused", compile="always")
    losses, gradients = [], []
    for largest in (0, 1 << 20):
        monkeypatch.setattr(replay, "LARGEST", largest)
        network = CustomTransformer(config)
        for number in range(7):
            tokens = (torch.arange(12).view(2, 6) * (number + 1)) % 11
            batch = Batch(tokens, tokens.roll(number))
            losses.append(network.loss_and_gradients(batch, denominator=12, step=number))  # gradients add up
        gradients.append(network.flat_gradients.buffer)
        assert network.replay.replays() == (largest > 0)
    assert torch.equal(torch.stack(losses[:7]), torch.stack(losses[7:]))
    assert torch.equal(*gradients)
    (recorded,) = network.arena.recorded_steps.values()
    assert sum(function is replay._call_at_addresses for function, _, _ in recorded.calls) >= 5
    assert not compiled._failed


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_without_numbers_asks_no_compiler(device: str) -> None:
    """By which a run's memory is estimated, before anything is there: nothing fails by it either."""
    with FakeTensorMode(), compiled_functions(()):
        x, bias = torch.empty(4, 6, device=device), torch.empty(6, device=device)
        activations.bias_relu(torch.empty_like(x), x, bias)
        assert rowwise.normalize.compiles(x, x, bias, bias, bias, bias) is False
    assert not compiled._failed


@pytest.mark.slow
def test_addresses_are_those_of_the_processor_s_memory() -> None:
    """Also where another device is the usual one."""
    logits, at_target, counts = torch.randn(4, 6), torch.randn(4), torch.tensor([1.0, 1, 1, 0])
    loss, total = torch.empty(2, 4)
    with compiled_functions(()), torch.device("meta"):  # it has memory of its own, and a number
        rowwise.cross_entropy_of_rows(logits, at_target, loss, total, counts, 0.25)
    assert loss.isfinite().all()
    assert rowwise.cross_entropy_of_rows.libraries


def test_a_library_belongs_to_the_text_and_the_constants_of_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    formats = FP32
    before = activations.bias_gelu_tanh.request(formats)
    assert before == activations.bias_gelu_tanh.request(formats)
    assert before != activations.bias_gelu_tanh.request(formats | {"parameter": torch.bfloat16})
    monkeypatch.setattr(activations, "GATE_CUBIC", 0.07)
    assert before != activations.bias_gelu_tanh.request(formats)


@pytest.mark.gradients
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_slope_of_gelu_is_that_of_the_reference_far_from_zero_too(sign: int) -> None:
    """One exponential serves gate and 1 - gate, which overflows nowhere."""
    x = sign * torch.tensor([[0.0, 1e-6, 0.3, 2, 5, 9, 30, 1e3, 1e6]])
    y, dx = torch.empty_like(x), torch.ones_like(x)
    activations.bias_gelu_tanh_gradient(y, dx, x, torch.zeros(9))
    want, cache = ops.gelu_tanh_forward(x.double())
    torch.testing.assert_close(y.double(), want, rtol=2e-5, atol=1e-37)
    torch.testing.assert_close(dx.double(), ops.gelu_tanh_backward(torch.ones_like(want), cache), rtol=2e-5, atol=1e-37)


@pytest.mark.gradients
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["as_written", pytest.param("compiled", marks=pytest.mark.slow)])
def test_cross_entropy_of_rows(where: str, dtype: torch.dtype) -> None:
    """A row that does not count may hold anything, large numbers overflow nowhere, and one of -inf is no harm."""
    z, counts = torch.randn(7, 43).to(dtype), torch.tensor([1, 1, 0, 1, 1, 0, 1], dtype=dtype)
    z[1] += 1024
    z[3, 10] = -torch.inf
    losses, total = wide(z).new_empty(2, 7)
    target = torch.arange(7)
    want_loss, cache = ops.cross_entropy_forward(z.double(), target.where(counts > 0, ops.IGNORED), 1)
    want_gradient = ops.cross_entropy_backward(1.0, cache)
    z[2, 3], z[5] = torch.nan, torch.inf
    at_target = z[target, target]
    with compiled_functions(() if where == "compiled" else None):
        rowwise.cross_entropy_of_rows(z, at_target, losses, total, counts, 0.0)
    z[target, target] = at_target
    torch.testing.assert_close(losses.sum().double(), want_loss, rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=0)
    rounding = 2 * UNIT.get(dtype, 1e-12) + (2e-6 if dtype != torch.float64 else 0)
    got_gradient = z.double() / total.double().where(counts > 0, 1)[:, None]
    torch.testing.assert_close(
        got_gradient, want_gradient, rtol=rounding, atol=1e-7 if dtype != torch.float64 else 1e-16
    )
    assert not any(x[counts == 0].any() for x in (z, losses, total))


@pytest.mark.slow
@pytest.mark.gradients
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_that_fill_a_line_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = torch.randn(300, 24).to(dtype), torch.randn(1030, 24).to(dtype), torch.randint(1030, (300,))
    targets[7] = ops.IGNORED
    of_float64 = loss.linear_cross_entropy(x.double(), weight.double(), targets, None, 0.0, dw := torch.zeros(1030, 24))
    errors = []
    for large in (1024, 2048):
        monkeypatch.setattr(loss, "LARGE", large)
        dweight = torch.zeros_like(weight)
        with compiled_functions(()):
            got = *loss.linear_cross_entropy(x.clone(), weight, targets, None, 0.0, dweight), dweight
        errors.append([error(one, want) for one, want in zip(got, (*of_float64, dw), strict=True)])
    assert all(one <= 1.1 * other + UNIT[torch.float32] for one, other in zip(*errors, strict=True)), errors
    assert rowwise.cross_entropy_of_rows.libraries
    assert not compiled._failed


@pytest.mark.slow
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_chunk_of_logits_takes_no_memory_of_its_size(label_smoothing: float) -> None:
    """Where formats meet, or indices, PyTorch may copy all of it to a wider one."""
    logits, target = torch.randn(64, 4096).bfloat16(), torch.arange(64)
    counts, share = target >= 0, torch.tensor(1 / 64)
    size = logits.nbytes
    with compiled_functions(()):
        loss._loss_and_gradient_(logits.clone(), target, counts, share, label_smoothing)  # loads it
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            loss._loss_and_gradient_(logits, target, counts, share, label_smoothing)
    taken = [event.cpu_memory_usage for event in profile.events()]
    assert 0 < max(taken) < size / 4


@pytest.mark.gradients
def test_layer_norm_over_rows_is_that_of_the_reference() -> None:
    x, branch, dy, dtotal = torch.randn(4, 7, 11, dtype=torch.float64)
    weight, bias = torch.randn(2, 11, dtype=torch.float64)
    (want_total, want), cache = ops.residual_layer_norm_forward(x, branch, weight, bias)
    y, mean, rstd = torch.empty_like(x), torch.empty(7, dtype=x.dtype), torch.empty(7, dtype=x.dtype)
    rowwise.add_and_normalize(y, branch, mean, rstd, x, weight, bias, ops.normalization.EPSILON)
    torch.testing.assert_close(branch, want_total)
    torch.testing.assert_close(y, want)
    sums_of_rows = mean.clone(), rstd.clone()
    rowwise.normalize(y.zero_(), branch, mean, rstd, weight, bias)
    torch.testing.assert_close(y, want)
    rowwise.normalize_rows(y.zero_(), mean.zero_(), rstd.zero_(), branch, weight, bias, ops.normalization.EPSILON)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close((mean, rstd), sums_of_rows)
    want_sums, sums = torch.ones(2, 2, 11, dtype=x.dtype)
    want_gradient = ops.residual_layer_norm_backward(dtotal, dy, cache, *want_sums)
    rowwise.add_normalization_weights_gradient(*sums, dy, branch, mean, rstd)
    rowwise.add_normalization_gradient(dtotal, dy, branch, mean, rstd, weight)
    torch.testing.assert_close(dtotal, want_gradient)
    torch.testing.assert_close(sums, want_sums)


# Networks

STEPS = """
import sys, torch
from dataclasses import replace
from manual_backprop.study.gradient_check import ENOUGH_TO_ROUND, check_network_precision, draw_batch
from manual_backprop.study.gradient_check.measure import differing
from manual_backprop.study.gradient_check.network_check import networks, step_of

from manual_backprop.kernels import arena

arena.SMALL = arena.SMALL_BESIDE_WEIGHTS = 0  # everything is recomputed that is in a large network
torch.set_num_threads(1)
findings = []
for architecture, precision in (("gpt2", "bf16"), ("gpt2", "bf16_mixed"), ("vaswani", "fp32"), ("llama", "bf16_mixed")):
    config = replace(
        ENOUGH_TO_ROUND, architecture=architecture, precision=precision, kernels="fused", compile="always"
    )
    batch = draw_batch(config, 2, 7)
    compiled, _ = networks(config, "proof")
    _, want = step_of(compiled, batch)
    recomputing, _ = networks(replace(config, recompute="block"), "proof")
    assert differing(step_of(recomputing, batch)[1], want) == 0
    if sys.argv[1] == "there":
        findings += check_network_precision(config, "proof")
    else:
        uncompiled, _ = networks(replace(config, compile="never"), "proof")
        assert differing(step_of(uncompiled, batch)[1], want) == 0
print(*(f"{f.subject} | {f.quantity}: {f.error}" for f in findings if not f.ok), sep="\\n")
print(len(findings), "findings")
"""


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["there", "missing"])
def test_networks_with_compiled_kernels_stay_under_the_same_bars(compiler: str, tmp_path: Path) -> None:
    """Where compiling fails, one line says so, and the bits are those without. A block that runs twice has the same."""
    output, said = run_compiling(STEPS, compiler, tmp_path if compiler == "missing" else None, compiler)
    *over, last = output.splitlines()
    assert not [line for line in over if line], "\n".join(over)
    assert len(said) == (compiler == "missing"), said
    assert (int(last.split()[0]) > 50) == (compiler == "there")
