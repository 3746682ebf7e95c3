"""The kernels in Triton, where there is no GPU: interpreted, and compiled for two generations of GPUs.

Triton is required: `pip install 'manual-backprop[triton]'`, which [test] holds.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton_bugs import BUGS, Bug

from manual_backprop.kernels.cuda import triton as room

ROOT = Path(__file__).parents[2]
KERNELS = Path("manual_backprop", "kernels", "cuda")
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16


def interpreted(folder: Path) -> subprocess.CompletedProcess[str]:
    """The tests of that file, with the package that lies in a folder."""
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-m", ""]
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    return subprocess.run(
        [*words, str(Path(__file__).with_name("triton_interpreted.py"))],
        cwd=folder, env=os.environ | settings, capture_output=True, text=True,
    )  # fmt: skip


def test_under_the_interpreter() -> None:
    """Numbers: what is tested is in that file."""
    done = interpreted(ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_planted_bugs_have_a_place() -> None:
    for bug in BUGS:
        assert (ROOT / KERNELS / bug.file).read_text().count(bug.old) == 1, bug.name


@pytest.mark.nightly
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_noticed(bug: Bug, tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "manual_backprop", tmp_path / "manual_backprop", ignore=shutil.ignore_patterns("__pycache__")
    )
    file = tmp_path / KERNELS / bug.file
    file.write_text(file.read_text().replace(bug.old, bug.new))
    done = interpreted(tmp_path)
    # a write out of bounds may destroy the heap: that is noticed, too, at once or at a later access
    aborted = done.returncode in (-signal.SIGABRT, -signal.SIGSEGV)
    noticed = done.returncode == 1 and "1 failed" in done.stdout
    assert noticed or aborted, done.stdout[-2000:] + done.stderr[-2000:]


# Compiled


class Driver:
    """As the driver of a GPU that is not here: the kernels are compiled for it and not launched."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(params=[80, 90])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """What was compiled, in place of every launch."""
    found: list[Any] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        found.append(kernel.warmup(*arguments, grid=grid, **constants))

    modules = [importlib.import_module(f"{room.__name__}.{name}") for name in {*room.FILES.values(), "launching"}]
    for module in modules:  # all are there by now: an import would find a launch that is patched already
        monkeypatch.setattr(module, "launch", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(request.param))
    return found


def empty(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def step_of_gpt2(rows: int, width: int, vocab_size: int, narrow: torch.dtype = bf16) -> None:
    """What a step calls, of each kind once."""
    stream, gain = empty(rows, width, dtype=fp32), empty(width, dtype=fp32)
    branch, hidden, hidden_bias = empty(rows, width, dtype=narrow), empty(rows, 4 * width), empty(4 * width, dtype=fp32)
    _, _, mean, rstd = room.residual_norm(stream, branch, gain, gain, 1e-5, narrow)
    room.residual_norm(stream, None, gain, gain, 1e-5, narrow)
    for dtotal in (stream, None):
        room.residual_norm_backward(dtotal, branch, stream, gain, mean, rstd, gain, gain, narrow)
    room.bias_activation(hidden, hidden_bias, "gelu_tanh")
    room.bias_activation_backward(hidden, hidden, hidden_bias, "gelu_tanh", hidden_bias)
    logits = empty(8192, -(-vocab_size // 64) * 64, dtype=narrow)[:, :vocab_size]
    room.cross_entropy_(logits, empty(8192, dtype=torch.int64), empty(dtype=fp32), 0.0)
    flat = empty(124_475_904, dtype=fp32)
    room.gradient_norm(flat)
    beside = empty(*flat.shape, dtype=narrow)
    room.adamw_(flat, flat, flat, flat, beside, empty(5, dtype=fp32), 124_353_024, 0.9, 0.95, 1e-8, 0.1)


def test_compiled_for_gpt2_nothing_spills(compiled: list[Any], tmp_path: Path) -> None:
    """In bf16_mixed, at the sizes of its 124M parameters and 64 sequences of 1,024 tokens."""
    step_of_gpt2(65_536, 768, 50_257)
    assert {kernel.name for kernel in compiled} >= {"residual_norm_kernel", "adamw_kernel", "cross_entropy_kernel"}
    for kernel in compiled:
        assert_no_spills(kernel, tmp_path)
    (loss,) = [kernel for kernel in compiled if kernel.name == "cross_entropy_kernel"]
    offsets = re.findall(r"tt\.addptr .* : !tt\.ptr<bf16>, (\w+)", loss.asm["ttir"])
    assert set(offsets) == {"i64"}, "the logits of a large batch are more than 2^31"


@pytest.mark.nightly
def test_compiled_for_other_networks_nothing_spills(compiled: list[Any], tmp_path: Path) -> None:
    """The small ones of nanoGPT, a width of 1,600 and of 8,192, fp16_mixed, fp32, bf16, and what a llama has."""
    for width, vocab_size in ((128, 65), (384, 8192), (1600, 50_257), (8192, 128_256)):
        step_of_gpt2(4096, width, vocab_size, fp16 if width == 384 else bf16)
    for dtype in (fp32, bf16, fp16):
        x, gain = empty(4096, 4096, dtype=dtype), empty(4096, dtype=fp32 if dtype == fp16 else dtype)
        total, _, mean, rstd = room.residual_norm(x, x, gain, None, 1e-5, dtype)
        room.residual_norm_backward(x, x, total, gain, mean, rstd, gain, None, dtype)
        room.swiglu_backward(room.swiglu(x), x)
        for activation in ("gelu_tanh", "gelu", "relu"):
            room.bias_activation_backward(room.bias_activation(x, gain, activation), x, gain, activation, gain)
        room.cross_entropy_(x, empty(4096, dtype=torch.int64), empty(dtype=fp32), 0.1)
        moments = empty(4096, dtype=fp32)
        room.adamw_(gain, gain, moments, moments, None, empty(5, dtype=fp32), 1024, 0.9, 0.95, 1e-8, 0.1)
        room.gradient_norm(gain)
    for kernel in compiled:
        assert_no_spills(kernel, tmp_path)


def assert_no_spills(kernel: Any, folder: Path) -> None:
    """Numbers that did not fit into registers lie on the stack."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    assert "REG:" in usage
    assert "STACK:0 " in usage, (kernel.name, usage)
    assert "LOCAL:0 " in usage, (kernel.name, usage)
