"""The Triton kernels without a GPU: interpreted, and compiled for two generations of GPUs.

Triton is required: `pip install 'manual-backprop[triton]'`, which is part of [test].
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from manual_backprop.kernels.cuda import triton as room

ROOT = Path(__file__).parents[2]
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16


def test_under_the_interpreter() -> None:
    """Runs triton_interpreted.py, which compares the numbers."""
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", ""]
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*words, str(Path(__file__).with_name("triton_interpreted.py"))],
        cwd=ROOT, env=os.environ | settings, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# Compiled


class Driver:
    """The driver of a GPU that does not exist: kernels are compiled for it and not launched."""

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
    """The compiled kernels; every launch only compiles."""
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
    """Calls each kernel of a step once."""
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


@pytest.mark.nightly
def test_compiled_for_other_networks_nothing_spills(compiled: list[Any], tmp_path: Path) -> None:
    """The small networks of nanoGPT, widths of 1,600 and 8,192, fp16_mixed, fp32, bf16, and the kernels of a llama."""
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
    """No numbers are on the stack because they did not fit into registers."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    assert "REG:" in usage
    assert "STACK:0 " in usage, (kernel.name, usage)
    assert "LOCAL:0 " in usage, (kernel.name, usage)
