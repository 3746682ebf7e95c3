"""A simulated GPU: PyTorch's fake tensors on the device `cuda`, with shapes and dtypes but without numbers.

PyTorch asks the guard of a device for its current stream; a few lines of C++ register a guard that does nothing. Every
operator then computes the shape, dtype and device of its results: mixing tensors of two devices fails, and so does
reading a number.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
extern "C" void pretend() {
  using namespace c10::impl;
  if (!hasDeviceGuardImpl(c10::DeviceType::CUDA))
    registerDeviceGuard(c10::DeviceType::CUDA, new NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
}
"""
SYNCHRONIZING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


@functools.cache
def pretend_there_is_a_gpu() -> None:
    if torch.cuda.is_available():
        return
    folder = Path(mkdtemp())
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    where = Path(torch.__file__).parent
    options = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{where}/include", f"-L{where}/lib", "-lc10"]
    subprocess.run(["c++", source, *options, "-o", library], check=True, timeout=300)
    ctypes.CDLL(str(library)).pretend()


class Calls(TorchDispatchMode):
    """Records calls of operators: those that wait for the GPU, tensors on other devices, and Python numbers that a
    graph would freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.elsewhere: list[str] = []
        self.made: list[tuple[Any, ...]] = []  # operators, with the numbers that they were given

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(tag in function.tags for tag in SYNCHRONIZING) and not is_indexing_with_numbers(function, args):
            self.waits.append(f"{function} {place()}")
        results = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, results))
        if any(isinstance(x, Tensor) and x.device.type != "cuda" for x in leaves):
            self.elsewhere.append(f"{function} {place()}")
        numbers = [x for x in tree_leaves((args, kwargs)) if not isinstance(x, Tensor)]
        if function.namespace != "prim":  # a question to a tensor
            self.made.append((str(function), *map(repr, numbers)))
        return results


def is_indexing_with_numbers(function: Any, args: Any) -> bool:
    """Whether it is indexing with integer tensors; with a mask the size of the result would depend on values."""
    return function is torch.ops.aten.index.Tensor and all(
        x.dtype in (torch.int64, torch.int32) for x in tree_leaves(args[1]) if isinstance(x, Tensor)
    )


def place() -> str:
    """The file and line of the package that made the current call."""
    lines = [frame for frame in traceback.extract_stack() if "manual_backprop/" in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(lines[-3:]))


@contextmanager
def fake_gpu() -> Iterator[None]:
    pretend_there_is_a_gpu()
    with FakeTensorMode():
        yield
