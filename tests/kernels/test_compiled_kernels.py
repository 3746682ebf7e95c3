"""The compiled library of kernels: its results in every dtype, size and number of threads, and its absence."""

from __future__ import annotations

import ctypes
import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_tools import ROOT, environment, run_compiling
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from manual_backprop import kernels, ops
from manual_backprop.common.batch import Batch
from manual_backprop.common.machine import cpu_fields
from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.kernels import replay
from manual_backprop.kernels.arena import Arena
from manual_backprop.kernels.cpu import (
    activations,
    attention,
    compiled,
    embedding,
    gated_feed_forward,
    library,
    loss,
    optimizers,
    products,
    rowwise,
)
from manual_backprop.kernels.cpu.compiled import CompiledFunction, compiled_functions
from manual_backprop.kernels.sizes import SIZES as DEVICES
from manual_backprop.models.custom import CustomTransformer
from manual_backprop.models.recorder import Recorder
from manual_backprop.ops import Visible
from manual_backprop.ops.numerics import no_record, wide
from manual_backprop.tracking.environment import environment_of

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = {words: {"activation": kinds[0], "parameter": kinds[1]} for kinds, words in compiled.FORMATS.items()}
FUNCTIONS = {
    name: function
    for module in (activations, embedding, gated_feed_forward, rowwise, optimizers, products)
    for name, function in vars(module).items()
    if isinstance(function, CompiledFunction)
}
SIZES = ((1, 1), (2, 2), (31, 37), (130, 65))  # of the first letter, and of the second; a third one is their sum
NUMBER = 0.1  # epsilon: whatever a function takes
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A state in which nothing has been loaded or has failed. The library is that of this machine, or compiled now."""
    forget()
    yield
    forget()


def forget() -> None:
    compiled._failed.clear()
    compiled._made.clear()
    compiled._loaded.clear()
    for function in FUNCTIONS.values():
        function.calls.clear()


def draw(function: CompiledFunction, sizes: tuple[int, ...], kinds: dict[str, torch.dtype]) -> list[Tensor | float]:
    """Arguments for a function: normal numbers, some of them larger, and squares where numbers must not be negative."""
    generator = torch.Generator().manual_seed(sum(sizes))
    names = dict.fromkeys(letter for argument in function.arguments for _, letter in argument.dimensions)
    letters = dict(zip(names, (*sizes, sum(sizes))[: len(names)], strict=True))
    arguments: list[Tensor | float] = []
    for name, argument in zip(inspect.signature(function.function).parameters, function.arguments, strict=True):
        shape = [factor * letters[letter] for factor, letter in argument.dimensions]
        if argument.kind == "float":
            arguments.append(0.0 if name == "adds" and sizes[0] % 2 else NUMBER)  # "adds" is a yes or a no
        elif argument.kind == "int64":
            arguments.append(torch.randint(letters.get("V", 9), shape, generator=generator))
        else:
            x = 4 * torch.randn(shape, generator=generator)
            x = x.square() if name == "second_moment" else x
            arguments.append(x.to((kinds | compiled.FIXED)[argument.kind]))
    return arguments


def results(function: CompiledFunction, arguments: list[Tensor | float], exact: bool = False) -> list[Tensor]:
    """All tensor arguments after a call."""
    copies = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
    if exact:
        copies = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in copies]
    function(*copies)
    return [x for x in copies if isinstance(x, Tensor)]


def expected(name: str, precision: str) -> list[tuple[list[Tensor | float], list[Tensor], list[Tensor]]]:
    """For each size: arguments, and the results of the Python function, rounded and exact."""
    function = FUNCTIONS[name]
    drawn = [draw(function, sizes, FORMATS[precision]) for sizes in (*SIZES, (3, 4096), (16999, 17))]
    return [(one, results(function, one), results(function, one, exact=True)) for one in drawn]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.double().norm().clamp(min=1e-30))


@pytest.mark.slow
@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_kernel_is_as_near_to_float64_as_the_function_as_it_is_written(name: str, precision: str) -> None:
    """In every size; any number of threads gives the same bits."""
    function = FUNCTIONS[name]
    for arguments, written, exact in expected(name, precision):
        with compiled_functions(True):
            got = results(function, arguments)
            assert function.compiles(*arguments)
            torch.set_num_threads(2)
            again = results(function, arguments)
            torch.set_num_threads(1)
        assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
        for one, other, want in zip(got, written, exact, strict=True):
            assert error(one, want) <= 2 * error(other, want) + 8 * UNIT.get(one.dtype, 0)
    assert not compiled._failed


@pytest.mark.slow
@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.startswith(("bias_", "swiglu"))])
def test_an_activation_hides_no_number_that_is_not_finite(name: str, precision: str) -> None:
    """A vector's exponential of NaN may be any number: what it is multiplied by must be NaN itself."""
    function = FUNCTIONS[name]
    arguments = draw(function, (3, 37), FORMATS[precision])
    x = arguments[list(inspect.signature(function.function).parameters).index("x")]
    assert isinstance(x, Tensor)
    x[0, 0], x[1, -1], x[2, 20] = torch.nan, torch.nan, torch.inf
    with compiled_functions(True):
        assert function.compiles(*arguments)
        got = results(function, arguments)
    for one, other in zip(got, results(function, arguments), strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for libraries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return library.places()[0]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles an empty library, which takes some milliseconds."""
    command = library._command
    monkeypatch.setattr(library, "_command", lambda target: _of_nothing(command(target)))


def _of_nothing(words: list[str]) -> list[str]:
    source = Path(words[words.index("-o") + 1]).with_suffix(".cpp")
    source.write_text('extern "C" void* kernel(const char*) { return nullptr; }')
    return [words[0], "-shared", "-fPIC", str(source), "-o", words[words.index("-o") + 1]]


RELU = """
import sys, torch
from manual_backprop.kernels.cpu import activations, compiled
x = torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(5)
with compiled.compiled_functions(True):
    activations.bias_relu(*x)
    assert activations.bias_relu.compiles(*x), compiled._failed
assert not [name for name in sys.modules if name.startswith(("torch._inductor", "torch._dynamo"))]
"""


@pytest.mark.slow
def test_a_library_is_loaded_without_a_compiler() -> None:
    """In another process, which finds the library."""
    assert library.find() or library.build()
    given = environment(CXX="/nowhere/c++")
    done = subprocess.run([sys.executable, "-c", RELU], env=given, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_library_is_made_anew(damage: str, cache: Path, quick: None) -> None:
    library.build()
    (path,) = cache.glob("*.so")
    content = path.read_bytes()
    path.unlink()  # and not written over: this process has it in use
    path.write_bytes({"cut": content[:-1], "changed": content.replace(b"kernel", b"colonel"), "empty": b""}[damage])
    assert library.find() is None
    library.build()
    assert library.find() is not None


@pytest.mark.slow
def test_of_processes_that_miss_the_library_one_compiles(tmp_path: Path) -> None:
    """Like the first jobs of a sweep on a new machine. Names of folders contain blanks. The compiler is a script that
    takes two seconds and copies the existing library."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    compiler, calls = folder / "compiler", folder / "calls"
    made = (library.find() or library.build())._name
    compiler.write_text(
        f'#!/bin/sh\necho >> "{calls}"\nsleep 2\nwhile [ "$1" != -o ]; do shift; done\ncp "{made}" "$2"\n'
    )
    compiler.chmod(0o700)
    given = environment(XDG_CACHE_HOME=str(folder / "cache"), CXX=str(compiler))
    processes = [subprocess.Popen([sys.executable, "-c", RELU], env=given, cwd=ROOT) for _ in range(3)]
    assert [process.wait(200) for process in processes] == [0, 0, 0]
    assert calls.read_text() == "\n"


def test_a_compiler_that_fails_is_asked_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every run tries it again; another compiler is tried."""
    for name in ("one", "other"):
        (tmp_path / name).write_text(
            f"#!/bin/sh\necho >> {tmp_path}/calls\necho 'vec.h: fatal error: no such file' >&2\nexit 1\n"
        )
        (tmp_path / name).chmod(0o700)
        monkeypatch.setenv("CXX", str(tmp_path / name))
        with pytest.raises(library.CompilerError, match=r"vec\.h: fatal error: no such file"):
            library.build()
        with pytest.raises(library.CompilerError, match=r"found out before; delete .*\.failed to try again"):
            library.find()
        with pytest.raises(library.CompilerError, match="found out before"):
            library.build()
    assert (tmp_path / "calls").read_text() == 2 * "\n"


def test_a_compiler_that_is_killed_is_asked_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compiler").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "compiler").chmod(0o700)
    monkeypatch.setenv("CXX", str(tmp_path / "compiler"))
    for _ in range(2):
        with pytest.raises(library.CompilerError, match="killed by signal 9, perhaps for want of memory"):
            library.build()
    assert library.find() is None


def test_a_library_that_cannot_be_loaded_says_why(cache: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder that is mounted noexec."""

    def refuse(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(library.ctypes, "CDLL", refuse)
    with pytest.raises(
        library.CompilerError, match=r"failed to map segment.*does not allow to execute, set XDG_CACHE_HOME"
    ):
        library.build()


def test_what_no_kernel_serves_runs_as_it_is_written(cache: Path) -> None:
    """float64, tensors that are not contiguous, or that need broadcasting: no compiler is called."""
    x, bias = torch.randn(4, 6), torch.randn(6)
    for one, other in (
        (x.double(), bias.double()),
        (x, bias.bfloat16()),
        (x[:, ::2], bias[::2]),
        (x.T, bias[:4]),
        (x, bias[:1]),
        (x[:0], bias),
    ):
        want, got = torch.empty(one.shape, dtype=one.dtype), torch.empty(one.shape, dtype=one.dtype)
        activations.bias_relu(want, one, other)
        with compiled_functions(True):
            activations.bias_relu(got, one, other)
        assert torch.equal(got, want)
    assert not compiled._failed
    assert not cache.exists()


def test_a_library_belongs_to_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = library._name()
    sources = tmp_path / "cpp"
    sources.mkdir()
    for path in library.SOURCES.iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(library, "SOURCES", sources)
    library._name.cache_clear()
    assert library._name() == before
    (sources / "loss.h").write_text((sources / "loss.h").read_text() + "\n")
    library._name.cache_clear()
    assert library._name() != before
    library._name.cache_clear()


@pytest.mark.parametrize(
    ("cxx", "words"),
    [
        ("g++ -O2", "CXX is 'g++ -O2', which is not a program on this machine"),
        ("", "no C++ compiler was found: install g++"),
    ],
)
def test_without_a_compiler_the_reason_says_what_was_looked_for(
    cxx: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(library.CompilerError, match=re.escape(words)):
        library.build()


def test_without_a_folder_the_reason_says_where_to_put_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    monkeypatch.setenv("CXX", sys.executable)  # a program, which is not asked
    with pytest.raises(library.CompilerError, match=r"kernels, but Not a directory: set XDG_CACHE_HOME .*=never"):
        library.build()


def test_where_nothing_runs_nothing_is_kept(cache: Path, quick: None, tmp_path: Path, monkeypatch: Any) -> None:
    """As on a mount with noexec. The library in the other folder is found; if both are noexec, the error says so."""
    other, before = tmp_path / f"manual_backprop-{os.getuid()}" / "kernels", os.statvfs
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert library.folder() == cache
    assert library.why_elsewhere() is None
    noexec = {cache}
    flags = SimpleNamespace(f_flag=os.ST_NOEXEC)
    monkeypatch.setattr(os, "statvfs", lambda place: flags if place in noexec else before(place))
    assert library.why_elsewhere() == (
        f"compiled kernels are kept in {other}: {cache} is usual, but nothing runs from there (its file system is "
        "mounted noexec)"
    )
    library.build()
    assert not list(cache.iterdir())
    assert list(other.glob("*.so"))
    assert library.find() is not None
    noexec.add(other)
    assert library.find() is None
    with pytest.raises(library.CompilerError, match=r"noexec.*noexec.*set XDG_CACHE_HOME"):
        library.build()


def test_a_full_disk_is_no_compiler_that_refuses(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compiler").write_text("#!/bin/sh\necho 'fatal error: x.s: No space left on device' >&2\nexit 1\n")
    (tmp_path / "compiler").chmod(0o700)
    monkeypatch.setenv("CXX", str(tmp_path / "compiler"))
    with pytest.raises(library.CompilerError, match="No space left"):
        library.build()
    assert library.find() is None


@pytest.mark.nightly
def test_an_environment_in_a_path_with_spaces_compiles(tmp_path: Path) -> None:
    """So do a cache and a temporary folder."""
    packages = tmp_path / "my env" / "site packages"
    packages.parent.mkdir()
    packages.symlink_to(Path(torch.__file__).parents[1])
    (tmp_path / "t m p").mkdir()
    given = environment(XDG_CACHE_HOME=str(tmp_path / "c a"), TMPDIR=str(tmp_path / "t m p"))
    given["PYTHONPATH"] = os.pathsep.join((str(packages), given["PYTHONPATH"]))
    script = f"{RELU}assert ' ' in torch.__file__"
    done = subprocess.run([sys.executable, "-c", script], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_network_that_could_not_compile_says_that_it_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the bits of an uncompiled run, and the run records that."""
    monkeypatch.setattr(compiled, "build", lambda: (_ for _ in ()).throw(OSError("no room")))
    monkeypatch.setattr(compiled, "find", lambda: None)
    config = CustomTransformerConfig(vocab_size=11, d_model=8, n_heads=2, max_seq_len=6, compile="always")
    network = CustomTransformer(replace(config, kernels="fused"))
    assert environment_of(network)["compiled"] is True
    network.predict(torch.tensor([[1, 2, 3]]))
    assert environment_of(network)["compiled"] is False


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
        monkeypatch.setitem(DEVICES, "cpu", replace(DEVICES["cpu"], replayed=largest))
        network = CustomTransformer(config)
        for number in range(7):
            tokens = (torch.arange(12).view(2, 6) * (number + 1)) % 11
            batch = Batch(tokens, tokens.roll(number))
            losses.append(network.loss_and_gradients(batch, denominator=12, step=number))  # gradients add up
        gradients.append(network.flat_gradients.buffer)
        assert len(network.replay.recorded) == (largest > 0)
    assert torch.equal(torch.stack(losses[:7]), torch.stack(losses[7:]))
    assert torch.equal(*gradients)
    (recorded,) = network.arena.recorded_steps.values()
    assert sum(isinstance(function, ctypes._CFuncPtr) for function, _, _ in recorded.calls) >= 5
    assert not compiled._failed


@pytest.mark.slow
def test_a_replay_enters_a_context_only_for_what_pytorch_computes() -> None:
    def by_library(x: Tensor) -> Tensor:
        total = x.new_empty(())
        rowwise.sum_of_numbers(total, x)
        return total

    def by_both(x: Tensor) -> Tensor:
        return by_library(x) + x[0]

    entered: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        entered.append("")
        yield

    x, wanted = torch.arange(5.0), []
    for work in (by_library, by_both):
        replaying = replay.Replay(Arena(), around)
        with compiled_functions(True):
            results = [replaying(work, (x + step,), "").item() for step in range(6)]
        assert results == [10 + 5 * step + (step if work is by_both else 0) for step in range(6)]
        assert len(replaying.recorded) == 1
        wanted.append(len(entered))
    assert wanted == [0, 6 - replay.WARM_UP - 1]


def test_a_step_without_numbers_asks_no_compiler() -> None:
    """Such steps estimate a run's memory before the library exists; they do not count as a failed compilation."""
    with FakeTensorMode(), compiled_functions(True):
        x, bias = torch.empty(4, 6), torch.empty(6)
        activations.bias_relu(torch.empty_like(x), x, bias)
        assert rowwise.normalize.compiles(x, x, bias, bias, bias, bias) is False
    assert not compiled._failed


@pytest.mark.slow
def test_addresses_are_those_of_the_processor_s_memory() -> None:
    """Also when another device is torch's default."""
    logits, target = torch.randn(4, 6), torch.tensor([1, 0, 5, ops.IGNORED])
    loss, scale = torch.empty(2, 4)
    with compiled_functions(True), torch.device("meta"):  # it has memory of its own, and numbers
        rowwise.cross_entropy_of_rows(logits, loss, scale, target, 3, 0.5, 0.25)
    assert loss.isfinite().all()
    assert not compiled._failed


@pytest.mark.gradients
@pytest.mark.parametrize("where", ["as_written", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_slope_of_gelu_is_that_of_the_reference_far_from_zero_too(where: str, sign: int) -> None:
    """gate and 1 - gate come from one exponential, which never overflows."""
    x = sign * torch.tensor([[0.0, 1e-6, 0.3, 2, 5, 9, 30, 1e3, 1e6]])
    y, dx = torch.empty_like(x), torch.ones_like(x)
    with compiled_functions(where == "compiled"):
        activations.bias_gelu_tanh_gradient(y, dx, torch.zeros(9), x, torch.zeros(9))
    want, cache = ops.gelu_tanh_forward(x.double())
    torch.testing.assert_close(y.double(), want, rtol=2e-5, atol=1e-37)
    torch.testing.assert_close(dx.double(), ops.gelu_tanh_backward(torch.ones_like(want), cache), rtol=2e-5, atol=1e-37)


@pytest.mark.gradients
@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("where", ["as_written", pytest.param("compiled", marks=pytest.mark.slow)])
def test_rows_are_added_to_those_of_their_tokens(where: str, precision: str) -> None:
    """Some tokens occur often, the first one and the last ones never."""
    torch.set_num_threads(3)
    kinds = FORMATS[precision]
    token = torch.tensor([4, 1, 4, 6, 4, 1, 2]).repeat(60)
    dy, before = torch.randn(420, 127).to(kinds["activation"]), torch.randn(9, 127).to(kinds["parameter"])
    dweight, want = before.clone(), before.double()
    for n, v in enumerate(token):
        want[v] += 0.5 * dy[n].double()
    with compiled_functions(where == "compiled"):
        embedding.add_rows_of_tokens(dweight, dy, token, 0.5)
    assert error(dweight, want) <= UNIT[kinds["parameter"]] + 8 * UNIT[torch.float32]
    assert torch.equal(dweight[[0, 3, 5, 7, 8]], before[[0, 3, 5, 7, 8]])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("wrong", [9, -1])
def test_a_token_beyond_the_vocabulary_is_no_number(wrong: int, dtype: torch.dtype) -> None:
    """A kernel cannot raise, and must not read or write there. Networks check their tokens before."""
    weight, token = torch.randn(9, 5).to(dtype), torch.tensor([8, wrong, 0])
    y, dweight = torch.empty(3, 5, dtype=dtype), torch.ones_like(weight)
    with compiled_functions(True):
        embedding.rows_of_tokens(y, weight, token, 1.0)
        embedding.add_rows_of_tokens(dweight, y, token, 1.0)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], weight[[8, 0]])
    assert torch.equal(dweight, torch.ones_like(weight))


@pytest.mark.gradients
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["as_written", pytest.param("compiled", marks=pytest.mark.slow)])
def test_cross_entropy_of_rows(where: str, dtype: torch.dtype) -> None:
    """A row that does not count may contain anything, large numbers do not overflow, and -inf is allowed."""
    z, target = torch.randn(7, 43).to(dtype), torch.arange(7)
    z[1] += 1024
    z[3, 10] = -torch.inf
    target[2], target[5], target[6] = ops.IGNORED, ops.IGNORED, 42
    losses, scale = wide(z).new_empty(2, 7)
    want_loss, cache = ops.cross_entropy_forward(z.double(), target, 5)
    want_gradient = ops.cross_entropy_backward(0.25, cache)
    z[2, 3], z[5] = torch.nan, torch.inf
    with compiled_functions(where == "compiled"):
        rowwise.cross_entropy_of_rows(z, losses, scale, target, torch.tensor(5), 0.25, 0.0)
    torch.testing.assert_close(losses.sum().double(), want_loss, rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=0)
    rounding = 2 * UNIT.get(dtype, 1e-12) + (2e-6 if dtype != torch.float64 else 0)
    got_gradient = z.double() * scale.double()[:, None]
    torch.testing.assert_close(
        got_gradient, want_gradient, rtol=rounding, atol=5e-9 if dtype != torch.float64 else 1e-16
    )
    assert not any(x[target == ops.IGNORED].any() for x in (z, losses, scale))


@pytest.mark.gradients
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["as_written", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_smoothed_target(where: str, dtype: torch.dtype) -> None:
    """A part of the target's probability is spread over all columns."""
    z, target = torch.randn(7, 43).to(dtype), torch.arange(7)
    losses, scale = torch.empty(2, 7)
    want, cache = ops.cross_entropy_forward(z.double(), target, 0, 0.2)  # a denominator is 1 at least
    want_gradient = ops.cross_entropy_backward(1.0, cache)
    with compiled_functions(where == "compiled"):
        rowwise.cross_entropy_of_rows(z, losses, scale, target, 0, 1.0, 0.2)
    torch.testing.assert_close(losses.sum().double(), want, rtol=1e-6, atol=0)
    got = z.double() * scale.double()[:, None]  # its rounding errors are those of softmax, before q is subtracted
    torch.testing.assert_close(got, want_gradient, rtol=4 * UNIT[dtype] + 2e-6, atol=UNIT[dtype])
    at_target = target, target
    torch.testing.assert_close(got[at_target], want_gradient[at_target], rtol=4 * UNIT[dtype] + 2e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", UNIT)
def test_a_target_beyond_the_vocabulary_is_no_number(dtype: torch.dtype) -> None:
    """A kernel cannot raise, and must not write there. Networks check their targets before."""
    z, target = torch.randn(4, 43).to(dtype), torch.tensor([43, 0, -1, 42])
    losses, scale = torch.empty(2, 4)
    with compiled_functions(True):
        rowwise.cross_entropy_of_rows(z, losses, scale, target, 1, 1.0, 0.0)
    for one in (losses, scale):
        assert one.isnan().tolist() == [True, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("most", [1.0, math.inf])
@pytest.mark.parametrize("loss", [3.0, math.nan, -math.inf])
@pytest.mark.parametrize("norm", [0.0, 0.5, 4.0, math.inf, math.nan])
def test_a_step_is_checked_and_counted(norm: float, loss: float, most: float) -> None:
    """`FlatOptimizer._check`: counts, clip, rate, and whether all is finite."""
    of_step = [torch.full((), number) for number in (-1.0, -1.0, -1.0, norm, loss)]
    counts = [torch.full((), number) for number in (5, 7, 2, 2)]
    arguments = [*of_step, *counts, 0.03, most]
    want = results(optimizers.check_step, arguments)
    with compiled_functions(True):
        assert optimizers.check_step.compiles(*arguments)
        got = results(optimizers.check_step, arguments)
    finite = math.isfinite(norm) and math.isfinite(loss)
    assert want[1:3] == [finite * torch.tensor(0.03), finite]
    assert want[5:] == ([6, 7, 0, 2] if finite else [5, 8, 3, 3])
    assert got[1:3] == want[1:3]
    assert got[5:] == want[5:]
    if finite:
        assert float(got[0]) == float(want[0]) == pytest.approx(min(1, most / (norm + 1e-6)), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw_step", "sgd_step"])
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    function = FUNCTIONS[name]
    tensors = [x for x in draw(function, (37,), FORMATS["fp32"]) if isinstance(x, Tensor)]
    before = [x.clone() for x in tensors]
    numbers = [0.0] + [NUMBER] * (len(function.arguments) - len(tensors) - 1)  # the first says whether it is finite
    with compiled_functions(True):
        function(*tensors, *numbers)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


@pytest.mark.slow
@pytest.mark.gradients
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_that_fill_a_line_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = torch.randn(300, 24).to(dtype), torch.randn(1030, 24).to(dtype), torch.randint(1030, (300,))
    targets[7] = ops.IGNORED
    of_float64 = loss.linear_cross_entropy(x.double(), weight.double(), targets, None, 0.0, dw := torch.zeros(1030, 24))
    errors = []
    for large in (1024, 2048):
        monkeypatch.setitem(DEVICES, "cpu", replace(DEVICES["cpu"], large_vocabulary=large))
        dweight = torch.zeros_like(weight)
        with compiled_functions(True):
            got = *loss.linear_cross_entropy(x.clone(), weight, targets, None, 0.0, dweight), dweight
        errors.append([error(one, want) for one, want in zip(got, (*of_float64, dw), strict=True)])
    assert all(one <= 1.1 * other + UNIT[torch.float32] for one, other in zip(*errors, strict=True)), errors
    assert not compiled._failed
    assert not compiled._failed


@pytest.mark.slow
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_chunk_of_logits_takes_no_memory_of_its_size(label_smoothing: float) -> None:
    """With mixed dtypes or indices PyTorch may copy a whole tensor to a wider dtype."""
    logits, target = torch.randn(64, 4096).bfloat16(), torch.arange(64)
    losses, scale = torch.empty(2, 64)
    rest = losses, scale, target, 64, 1.0, label_smoothing
    size = logits.nbytes
    with compiled_functions(True):
        loss._loss_and_gradient_(logits.clone(), *rest)  # loads it
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            loss._loss_and_gradient_(logits, *rest)
            torch.empty(64)  # what the profiler sees
    taken = [event.cpu_memory_usage for event in profile.events()]
    assert 0 < max(taken) < size / 4


@pytest.mark.gradients
def test_layer_norm_over_rows_is_that_of_the_reference() -> None:
    x, branch, dy, dtotal = torch.randn(4, 7, 11, dtype=torch.float64)
    weight, bias = torch.randn(2, 11, dtype=torch.float64)
    (want_total, want), cache = ops.residual_layer_norm_forward(x, branch, weight, bias)
    y, mean, rstd = torch.empty_like(x), torch.empty(7, dtype=x.dtype), torch.empty(7, dtype=x.dtype)
    rowwise.add_and_normalize(y, branch, mean, rstd, x, branch, weight, bias, ops.normalization.EPSILON)
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
    rowwise.add_normalization_gradient(dtotal, *sums, dy, branch, mean, rstd, weight, 1.0)
    torch.testing.assert_close(dtotal, want_gradient)
    torch.testing.assert_close(sums, want_sums)


# Products

PRODUCTS = [  # M, N, K: one row, less than a tile, tiles and a rest, blocks and a rest, as many k as at a time, more
    (1, 30, 8),
    (2, 1, 1),
    (5, 20, 3),
    (13, 130, 70),
    (101, 40, 33),
    (100, 450, 98),
    (7, 384, 40),
    (96, 64, 768),
    (775, 20, 770),
    (8, 400, 770),
]


def embedded(x: Tensor, by_columns: bool) -> Tensor:
    """x in the middle of memory of NaN, row by row or column by column."""
    if by_columns:
        return embedded(x.T, by_columns=False).T
    memory = torch.full((x.shape[0] + 2, x.shape[1] + 4), torch.nan, dtype=x.dtype)
    memory[1:-1, 1:-3] = x
    return memory[1:-1, 1:-3]


def expected_product(sizes: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """left and right, and their product in float64."""
    M, N, K = sizes
    left, right = (torch.randn(shape).to(dtype) for shape in ((M, K), (K, N)))
    return left, right, left.double() @ right.double()


@pytest.mark.slow
@pytest.mark.gradients
@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("by_columns", list(product((False, True), repeat=2)))
@pytest.mark.parametrize("sizes", PRODUCTS)
def test_a_product(sizes: tuple[int, int, int], by_columns: tuple[bool, bool], precision: str) -> None:
    """y = x W^T + b, where W may be in the wider dtype of the parameters, and W += dy^T x; the library's have the same
    bits for any number of threads. What is beside the operands is neither read nor written."""
    narrow, wider = FORMATS[precision].values()
    left, right, want = expected_product(sizes, narrow)
    operands = [embedded(x, way) for x, way in zip((left, right), by_columns, strict=True)]
    weight = right.to(wider)
    if wider != narrow:  # numbers a little above and below, less than half a unit of bfloat16
        weight = weight * (1 + torch.empty_like(weight).bernoulli_().sub_(0.5) * 2**-9)
    weight = embedded(weight, by_columns[1])
    bias, before = torch.randn(sizes[1]).to(wider), torch.randn(sizes[:2]).to(wider)
    found: list[list[Tensor]] = []
    for threads in (1, 2, 6):
        torch.set_num_threads(threads)
        outs = embedded(torch.full_like(before, torch.nan, dtype=narrow), False), embedded(before, False)
        plain, total = torch.full_like(outs[0], torch.nan), before.to(narrow, copy=True)
        with compiled_functions(True):
            products.product(outs[0], operands[0], weight, bias)
            products.product(plain, operands[0], weight)
            products.add_product(outs[1], *operands)
            products.add_product(total, operands[0], weight)
        found.append([*outs, plain, total])
        for x in outs:
            whole = torch.as_strided(x, (x.shape[0] + 2, x.stride(0)), (x.stride(0), 1), 0)
            assert whole.isfinite().sum() == x.isfinite().sum() == x.numel()
    torch.set_num_threads(1)
    assert not products.has_products() or all(
        torch.equal(x, y) for one in found[1:] for x, y in zip(found[0], one, strict=True)
    )
    for got, exact in zip(found[0], (want + bias, want + before, want, want + before.to(narrow)), strict=True):
        assert error(got, exact) <= 2 * UNIT[narrow] + 8 * UNIT[torch.float32]
    assert not compiled._failed


@pytest.mark.slow
def test_a_product_that_no_kernel_serves_is_pytorch_s() -> None:
    """Other dtypes, shapes and strides, and what PyTorch refuses."""
    left, right, bias = torch.randn(6, 4), torch.randn(4, 5), torch.randn(10)
    out, want = torch.empty(6, 5), left @ right
    with compiled_functions(True):
        for given in (bias[::2], bias[:1], bias[:1].expand(5)):
            products.product(out, left, right, given)
            torch.testing.assert_close(out, want + given)
        products.product(out.T, right.T, left.T)
        torch.testing.assert_close(out, want)
        products.product(out[:0], left[:0], right)
        products.add_product(out, left[:, :0], right[:0])
        torch.testing.assert_close(out, want)
        for dtype in (torch.bfloat16, torch.float16):  # the weight is rounded
            total = out.to(dtype)
            products.product(total, left.to(dtype), right)
            torch.testing.assert_close(total, want.to(dtype), rtol=3e-2, atol=3e-2)
            products.add_product(total, left.to(dtype), right)
            torch.testing.assert_close(total, 2 * want.to(dtype), rtol=3e-2, atol=3e-2)
        narrow = left.bfloat16(), right.bfloat16()
        refused: list[tuple[Tensor, ...]] = [
            (out.double(), left, right),
            (out, *narrow),
            (out, left, narrow[1]),
            (out, left, right, bias[:3]),
            (out[:1].expand(6, 5), left, right),
            (out, left, right.clone().requires_grad_()),
        ]
        for tensors in refused:
            with pytest.raises(RuntimeError):
                products.product(*tensors)


@pytest.mark.slow
def test_the_library_has_products_where_they_are_faster() -> None:
    """Where vectors multiply bfloat16 numbers and there are no matrix registers."""
    flags = set(cpu_fields().get("flags", "").split())
    vectors = torch.backends.cpu.get_cpu_capability() == "AVX512" and "avx512_bf16" in flags
    with compiled_functions(True):
        in_library = compiled.kernel("product_fp32", 4, 8) is not None
    assert in_library == products.has_products() == (vectors and "amx_bf16" not in flags)


@pytest.mark.slow
@pytest.mark.parametrize("multiply", [products.product, products.add_product])
def test_a_product_of_sizes_that_do_not_fit_is_an_error(multiply: Callable[..., None]) -> None:
    with compiled_functions(True), pytest.raises(RuntimeError):
        multiply(torch.zeros(4, 6), torch.randn(4, 5), torch.randn(4, 6))


@pytest.mark.slow
def test_the_library_has_every_kernel() -> None:
    with compiled_functions(True):
        for name, precision in product(FUNCTIONS, FORMATS):
            assert compiled.kernel(f"{name}_{precision}", len(FUNCTIONS[name].arguments), 1), name
        assert compiled.kernel("attention_forward_bf16", 9, 27, 1)
        assert compiled.kernel("attention_backward_bf16", 12, 36, 1)
        assert compiled.kernel("of_another_name_bf16", 9, 27, 1) is None
    assert not compiled._failed


# Attention

MASKS = ("causal", "all", "lengths", "causal, lengths", "segments")
ATTENTION_CASES = [  # B, T, S, H, G, K; mask; dropout
    *product(
        ((3, 37, 37, 4, 2, 10), (2, 1, 1, 1, 1, 2), (2, 17, 70, 2, 2, 64), (2, 130, 33, 3, 1, 16)),
        MASKS,
        (0.3, 0.0),
    ),
    *product(((1, 1030, 1030, 1, 1, 8),), ("causal", "segments"), (0.3, 0.0)),
]


def visible_of(mask: str, B: int, T: int, S: int) -> Visible:
    lengths = torch.arange(B) * S // max(1, B - 1) if "lengths" in mask else None  # from none of the keys to all
    segments = [(torch.arange(n)[None] * 3 // n + torch.arange(B)[:, None]) ** 2 for n in (T, S)]
    return Visible("causal" in mask, lengths, *(segments if mask == "segments" else (None, None)))


def at_once(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def in_a_new_thread(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Which has no memory yet."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(copy_context().run, function, *arguments, **named).result()


def attention_of(
    qkv: tuple[Tensor, ...],
    dcontext: Tensor,
    visible: Visible,
    dropout: ops.Dropout | None,
    run: Callable[..., Any] = at_once,
) -> list[Tensor]:
    """context and the gradients of query, key and value."""
    context, cache = run(kernels.attention_forward, *qkv, visible, dropout)
    return [context.clone(), *run(kernels.attention_backward, dcontext, cache)]


def expected_attention(
    sizes: tuple[int, ...], mask: str, probability: float, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Visible, ops.Dropout | None], list[Tensor], list[Tensor]]:
    """Query, key, value and dcontext; what is hidden and dropped; the reference's results, exact and rounded."""
    B, T, S, H, G, K = sizes
    packed = torch.randn(B, max(T, S), (H + 2 * G) * K + S % 2).to(dtype)  # side by side, as one product makes them
    heads = packed[..., : (H + 2 * G) * K].unflatten(2, (H + 2 * G, K))  # and with an odd stride
    tensors = heads[:, :T, :H], heads[:, :S, H : H + G], heads[:, :S, H + G :], torch.randn(B, T, H, K).to(dtype)
    visible = visible_of(mask, B, T, S)
    key, first = ops.random_key(1, 2, "here"), (3, 2, 5, 1)  # of a larger mask
    dropout = ops.Dropout(probability, key, (H + 2, 2048), first) if probability else None

    def reference(*given: Tensor) -> list[Tensor]:
        query, *both, dcontext = given
        repeated = [x.repeat_interleave(H // G, dim=2) for x in both]
        context, cache = ops.attention_forward(query, *repeated, visible, dropout)
        dquery, *dboth = ops.attention_backward(dcontext, cache)
        return [context, dquery, *(x.unflatten(2, (G, -1)).sum(3) for x in dboth)]

    return tensors, (visible, dropout), reference(*map(Tensor.double, tensors)), reference(*tensors)


@pytest.mark.slow
@pytest.mark.gradients
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize(("sizes", "mask", "probability"), ATTENTION_CASES)
def test_attention(sizes: tuple[int, ...], mask: str, probability: float, dtype: torch.dtype) -> None:
    """As near to float64 as the reference, and the same bits in place and for every number of threads."""
    (query, key, value, dcontext), hidden, exact, rounded = expected_attention(sizes, mask, probability, dtype)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with kernels.fast(True, query.device):
            found.append(attention_of((query, key, value), dcontext, *hidden, in_a_new_thread))
    arena = kernels.Arena(poisoned=True)
    for _ in range(2):
        with kernels.step(arena, True, query.device):
            copies = query.clone(), key.clone(), value.clone()
            found.append([x.clone() for x in attention_of(copies, dcontext, *hidden)])
    torch.set_num_threads(1)
    assert all(torch.equal(x, y) for one in found[1:] for x, y in zip(found[0], one, strict=True))
    for got, want, other in zip(found[0], exact, rounded, strict=True):
        assert error(got, want) <= 2 * error(other, want) + 4 * UNIT[dtype]
        assert torch.equal(got == 0, got.double() == 0)
        assert not got[(want == 0).all(-1)].any()  # exactly 0 where nothing is visible
    assert not compiled._failed


@pytest.mark.slow
def test_attention_drops_an_element_from_the_same_probability_on() -> None:
    """Of 2^31 steps; a float has 2^24."""
    low, high, place = 0, 1 << 31, ((1, 1), (0, 0, 0))
    while high - low > 1:
        middle = (low + high) // 2
        is_kept = bool(ops.dropout.keep_mask((1, 1, 1, 1), ops.Dropout(middle / 2**31, 3, *place), torch.device("cpu")))
        low, high = (middle, high) if is_kept else (low, middle)
    tensors = torch.ones(4, 1, 1, 1, 2)
    for steps, is_kept in ((low, True), (high, False)):
        with kernels.fast(True, torch.device("cpu")):
            got = attention_of(tuple(tensors[:3]), tensors[3], Visible(), ops.Dropout(steps / 2**31, 3, *place))
        assert bool(got[0].all()) is bool(got[3].all()) is is_kept


@pytest.mark.slow
@pytest.mark.parametrize("dtype", UNIT)
def test_attention_of_large_scores_overflows_nowhere(dtype: torch.dtype) -> None:
    """Of most of them exp alone is infinite. What is rounded in a score is an error of that size in a probability."""
    tensors = [8 * x for x in torch.randn(4, 2, 70, 2, 16).to(dtype)]
    context, cache = ops.attention_forward(*[x.double() for x in tensors[:3]], Visible())
    want = [context, *ops.attention_backward(tensors[3].double(), cache)]
    with kernels.fast(True, torch.device("cpu")):
        got = attention_of(tuple(tensors[:3]), tensors[3], Visible(), None)
    assert all(error(x, y) <= 1024 * UNIT[dtype] for x, y in zip(got, want, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", UNIT)
def test_what_attention_does_not_see_may_hold_anything(dtype: torch.dtype) -> None:
    """The memory that a thread keeps does, too."""
    query, key, value, dcontext = torch.randn(4, 2, 9, 3, 8).to(dtype)
    nothing, visible = torch.full_like(query, torch.nan), Visible(False, torch.tensor([0, 3]))
    with kernels.fast(True, query.device):
        attention_of((nothing, nothing, nothing), nothing, Visible(False), None)
        want = attention_of((query, key, value), dcontext, visible, None)
        for x in (key, value):
            x[0], x[1, 3:] = torch.nan, torch.nan
        got = attention_of((query, key, value), dcontext, visible, None)
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(got, want, strict=True))
    assert not any(x[0].any() for x in got)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", UNIT)
def test_segments_of_queries_or_keys_alone_hide_nothing(dtype: torch.dtype) -> None:
    """As in `Visible.mask`."""
    query, key, value, dcontext = torch.randn(4, 2, 9, 3, 8).to(dtype)
    segments = torch.randint(3, (2, 9))
    with kernels.fast(True, query.device):
        want, *got = (
            attention_of((query, key, value), dcontext, visible, None)
            for visible in (Visible(), Visible(query_segments=segments), Visible(key_segments=segments))
        )
    assert all(torch.equal(x, y) for one in got for x, y in zip(one, want, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("which", range(4))
def test_attention_hides_no_number_that_is_not_finite(which: int, dtype: torch.dtype) -> None:
    tensors = torch.randn(4, 1, 70, 1, 16).to(dtype)
    tensors[which, 0, 3] = torch.nan
    with kernels.fast(True, torch.device("cpu")):
        found = attention_of(tuple(tensors[:3]), tensors[3], Visible(), None)
    assert not all(x.isfinite().all() for x in found[1:])


ROTARY_CASES = list(product(((9, 8), (70, 36), (150, 6)), (1, 2, 4)))  # (T, K), G


@pytest.mark.gradients
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize(("sizes", "n_kv_heads"), ROTARY_CASES)
def test_rotary_attention_reads_a_key_for_all_its_queries(
    sizes: tuple[int, int], n_kv_heads: int, dtype: torch.dtype
) -> None:
    """In the library, without repeating or turning it in memory; and what is recorded is what the textbook records."""
    T, K = sizes
    qkv, dcontext = torch.randn(2, T, K * (4 + 2 * n_kv_heads)).to(dtype), torch.randn(2, T, 4 * K).to(dtype)
    rotation, heads = ops.rotations(T + 3, K), (4, n_kv_heads)
    found, records = [], []
    for pairs, x, dy, record in (
        (ops, qkv.double(), dcontext.double(), Recorder()),
        (ops, qkv, dcontext, Recorder()),
        (kernels, qkv.clone(), dcontext.clone(), Recorder()),
        (kernels, qkv.clone(), dcontext.clone(), no_record),  # who records runs another way
    ):
        with kernels.fast(pairs is kernels, qkv.device):
            run = partial(in_a_new_thread, record=record)
            context, cache = run(pairs.rotary_attention_forward, x, rotation, *heads)
            found.append([context.clone(), run(pairs.rotary_attention_backward, dy, cache)])
        records.append(getattr(record, "tensors", {}))
    for *of_library, want, other in zip(*found[2:], *found[:2], strict=True):
        assert all(error(got, want) <= 2 * error(other, want) + 4 * UNIT[dtype] for got in of_library)
    assert records[2].keys() == records[0].keys() >= set(attention.RECORDED)
    for name, want in records[0].items():
        assert error(records[2][name], want) <= 2 * error(records[1][name], want) + 4 * UNIT[dtype]
    assert not compiled._failed


@pytest.mark.slow
@pytest.mark.parametrize("name", attention.RECORDED)
def test_who_records_scores_sees_them(name: str) -> None:
    config = CustomTransformerConfig(vocab_size=11, d_model=8, n_heads=2, max_seq_len=6, n_blocks=1)
    network = CustomTransformer(replace(config, kernels="fused", compile="always"))
    tokens = torch.arange(6)[None]
    network.recorder = Recorder(f"*.{name}")
    network.loss_and_gradients(Batch(tokens, tokens), denominator=6, step=1)
    assert [x.shape for x in network.recorder.tensors.values()] == [(1, 2, 6, 6)]
    assert not compiled._failed


# Networks

STEPS = """
import sys, torch
from dataclasses import replace
from functools import partial
from manual_backprop.study.gradient_check import ENOUGH_TO_ROUND, check_network_precision, draw_batch
from manual_backprop.study.gradient_check.measure import differing
from manual_backprop.study.gradient_check.network_check import networks, step_of

from manual_backprop.kernels.sizes import SIZES

# everything is recomputed that is in a large network
SIZES["cpu"] = replace(SIZES["cpu"], small=0, small_beside_weights=0)
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


# The C++ itself


def test_the_guide_quotes_the_kernels_as_they_are() -> None:
    guide = (ROOT / "docs" / "guide" / "kernels.md").read_text(encoding="utf-8").partition("## 7.")[0]
    quoted = re.findall(r"^ {4} *(.*[;{,])$", guide, re.MULTILINE)
    sources = [*library.SOURCES.iterdir(), Path(str(activations.__file__))]
    lines = {line.strip() for path in sources for line in path.read_text(encoding="utf-8").splitlines()}
    assert len(quoted) > 15
    assert not set(quoted) - lines


EVERYTHING = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests", sys.argv[1] + "/tests/kernels"]
import torch
import test_compiled_kernels as tests
from manual_backprop.kernels.cpu import library
command = library._command
sanitized = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
library._command = lambda target: [*command(target), *sanitized]
for precision in tests.FORMATS:
    for name in tests.FUNCTIONS:
        tests.test_a_kernel_is_as_near_to_float64_as_the_function_as_it_is_written(name, precision)
for case in tests.ATTENTION_CASES:
    for dtype in tests.UNIT:
        tests.test_attention(*case, dtype)
for case in tests.product(tests.PRODUCTS, tests.product((False, True), repeat=2), tests.FORMATS):
    tests.test_a_product(*case)
print("nothing was found")
"""


@pytest.mark.nightly
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """Every kernel, instrumented: no number beside a tensor is read or written, and nothing undefined is done."""
    found = [
        subprocess.check_output([str(library.compiler()), f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    ]
    given = environment(
        XDG_CACHE_HOME=str(tmp_path), LD_PRELOAD=" ".join(found), ASAN_OPTIONS="detect_leaks=0", PYTHONMALLOC="malloc"
    )
    words = [sys.executable, "-c", EVERYTHING, str(ROOT)]
    done = subprocess.run(words, env=given, capture_output=True, text=True, timeout=1200, cwd=tmp_path)
    assert done.stdout == "nothing was found\n", done.stderr[-3000:]
    (made,) = tmp_path.rglob("*.so")
    assert b"__asan" in made.read_bytes()


A_FEW = (
    "--plain",
    "all = all + Vec::set(Vec(0.f), x, count);: 0.f",
    "loss[r] = (std::log(total) - (1 - smoothing) * z_target - smoothed) * share;: - ->",
    "z[t] = T(std::exp(z_target) - (1 - smoothing + everywhere) * total);: + ->",
)


@pytest.mark.slow
@pytest.mark.parametrize("texts", [A_FEW, pytest.param((), marks=pytest.mark.nightly)], ids=["a few", "all"])
def test_mutants_of_the_kernels_are_noticed(texts: tuple[str, ...]) -> None:
    words = [sys.executable, "tests/mutate_kernels.py", *texts]
    done = subprocess.run(words, env=environment(), text=True, cwd=ROOT, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stdout
    number = re.search(r"^(\d+) mutants, \d+ listed as equivalent, 0 wrong", done.stdout, re.MULTILINE)
    assert number is not None, done.stdout
    assert int(number[1]) >= (5 if texts else 700)
