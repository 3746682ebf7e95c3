"""Functions that run as one kernel of the C++ library, or in Python where the library is missing.

`@compiled("N F", "N F", "F")` marks a function that writes into its arguments and returns nothing. It names the
dimensions of each tensor; the kernel's arguments are the addresses, then one number per letter. The function and the
kernel of its name (cpp/) compute the same formula.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ...common.errors import first_line
from ..pieces import pieces
from ..replay import call_library
from ..sizes import sizes_of
from .library import CompilerError, build, compiler, find, folder, why_elsewhere

log = logging.getLogger(__name__)

MOST_CALLS = 4096  # cached ways to run a call, by the shapes of its tensors
TENSORS = (Tensor, torch.nn.Parameter, FakeTensor)  # no other subclasses
FORMATS = {  # dtypes of activations and parameters -> the end of a kernel's name; float64 runs in Python
    (torch.float32, torch.float32): "fp32",
    (torch.bfloat16, torch.bfloat16): "bf16",
    (torch.bfloat16, torch.float32): "bf16_mixed",
}
FIXED = {"float32": torch.float32, "int64": torch.int64}  # kinds of arguments whose dtype is the same in all formats

_wanted: ContextVar[bool] = ContextVar("compiled", default=False)
_failed: list[str] = []  # why compilation failed in this process
_made: list[float] = []  # duration of compilations in this process [s]
_loaded: list[ctypes.CDLL] = []


@contextmanager
def compiled_functions(wanted: bool) -> Iterator[None]:
    """A context in which functions marked with `compiled` run compiled where possible (`wanted`), or in Python."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def compiles(how: str, device: torch.device) -> bool:
    """Whether to try compilation. `auto`: if its tools are installed; no warning without a C++ compiler."""
    return how == "always" or (how == "auto" and (device.type == "cuda" or compiler() is not None))


def compiling_failed() -> bool:
    """Whether compilation has failed in this process: then everything runs uncompiled."""
    return bool(_failed)


def newly_compiled() -> bool:
    """Whether this process has compiled the library, because it was missing."""
    return bool(_made)


def library_is_wanted() -> bool:
    """Whether the library is to be used, and has not failed so far."""
    return _wanted.get() and not _failed


def kernel(name: str, pointers: int, sizes: int, numbers: int = 0) -> Callable[..., None] | None:
    """The library's function of that name; its arguments are addresses, then integers, then doubles. A missing library
    is compiled. None if there is no library, it is not to be used, or it has no such function for this processor."""
    if not library_is_wanted():
        return None
    try:
        if not _loaded:
            _loaded.append(find() or _compile())
        return _function(_loaded[0], name, pointers, sizes, numbers)
    except Exception as error:  # the compiler and the loader may raise anything
        _give_up(error)
        return None


@functools.cache
def _function(library: ctypes.CDLL, name: str, pointers: int, sizes: int, numbers: int) -> Callable[..., None] | None:
    address = library.kernel(name.encode())
    if address is None:
        return None
    kinds = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * sizes + [ctypes.c_double] * numbers
    return ctypes.CFUNCTYPE(None, *kinds)(address)


@dataclass(frozen=True)
class Argument:
    """A tensor's dimensions, as letters that may have a factor ("N 2F"), and its kind of dtype.

    `kind` comes after a colon: `parameter` for the dtype of the parameters, `float32` or `int64` for that dtype always;
    without it, the dtype of the activations. "float" is a number: of Python, or a tensor with one number.
    """

    dimensions: tuple[tuple[int, str], ...]
    kind: str

    @classmethod
    def of(cls, text: str) -> Argument:
        if text == "float":
            return cls((), text)
        words, _, kind = text.partition(":")
        return cls(tuple((int(word[:-1] or 1), word[-1]) for word in words.split()), kind.strip() or "activation")


def compiled(*arguments: str, by_rows: bool = False) -> Callable[[Callable[..., None]], CompiledFunction]:
    """Marks a function with positional arguments: tensors, each described as in `Argument`, then numbers.

    `by_rows`: no row, along the first dimension, depends on another. Tensors may share memory only if each element is
    read and written at the same place.
    """
    return lambda function: CompiledFunction(function, tuple(Argument.of(text) for text in arguments), by_rows)


class CompiledFunction:
    """Calls the compiled function if compilation is on and possible, else the Python function."""

    __name__: str

    def __init__(self, function: Callable[..., None], arguments: tuple[Argument, ...], by_rows: bool):
        functools.update_wrapper(self, function)
        self.function, self.arguments, self.by_rows = function, arguments, by_rows
        self.tensors = sum(argument.kind != "float" for argument in arguments)
        self.calls: dict[Any, Callable[..., None]] = {}  # by everything known of the tensors except their content

    def __call__(self, *args: Any) -> None:
        return self._call_of(args)(*args)

    def compiles(self, *args: Any) -> bool:
        """Whether such a call runs in the library, which is loaded or compiled now. If not, the caller should use
        PyTorch's kernels, if there are any: they are faster than the Python function."""
        return self._call_of(args) != self._as_written

    def _call_of(self, args: tuple[Any, ...]) -> Callable[..., None]:
        if not library_is_wanted():
            return self._as_written
        key = tuple([(type(x), x.dtype, x.is_cpu, x.shape, x.stride()) for x in args[: self.tensors]])
        call = self.calls.get(key)
        if call is None:
            if len(self.calls) >= MOST_CALLS:
                self.calls.clear()
            call = self.calls[key] = self._choose(args[: self.tensors])
        return call

    def _as_written(self, *args: Any) -> None:
        if not self.by_rows or not args[0].is_cpu:
            self.function(*args)
            return
        rows = self.arguments[0].dimensions[0]
        in_rows = [argument.dimensions[:1] == (rows,) for argument in self.arguments]
        for part in pieces(len(args[0]), max(1, sizes_of(args[0]).uncompiled_piece // args[0].shape[1]), args[0]):
            self.function(*(x[part] if split else x for x, split in zip(args, in_rows, strict=True)))

    def _choose(self, tensors: tuple[Tensor, ...]) -> Callable[..., None]:
        """The function that serves calls with such tensors, in this process."""
        formats, sizes = self._formats(tensors), self._sizes(tensors)
        if formats is None or sizes is None:
            return self._as_written
        if any(type(x) is FakeTensor for x in tensors):
            return _nothing
        address = kernel(f"{self.__name__}_{formats}", len(self.arguments), len(sizes))
        return self._as_written if address is None else self._bound(address, list(sizes.values()))

    def _formats(self, tensors: tuple[Tensor, ...]) -> str | None:
        """The dtypes of activations and parameters, as a kernel's name ends; None if there is no such kernel."""
        found = dict(FIXED)
        for x, argument in zip(tensors, self.arguments, strict=False):
            if found.setdefault(argument.kind, x.dtype) != x.dtype:
                return None
        parameter = found.get("parameter", found.get("activation", torch.float32))
        return FORMATS.get((found.get("activation", parameter), parameter))

    def _sizes(self, tensors: tuple[Tensor, ...]) -> dict[str, int] | None:
        """The size of each letter; None unless the tensors have these dimensions, are contiguous and on the CPU."""
        sizes: dict[str, int] = {}
        for x, argument in zip(tensors, self.arguments, strict=False):
            if type(x) not in TENSORS or not x.is_cpu or not x.is_contiguous() or x.dim() != len(argument.dimensions):
                return None
            for size, (factor, letter) in zip(x.shape, argument.dimensions, strict=True):
                if not size or sizes.setdefault(letter, size // factor) * factor != size:
                    return None
        return sizes

    def _bound(self, address: Callable[..., None], sizes: list[int]) -> Callable[..., None]:
        """The call for tensors of these sizes."""
        n_tensors = self.tensors

        def call(*args: Any) -> None:
            call_library(address, [*args[:n_tensors], *map(_number, args[n_tensors:])], sizes)

        return call


def _nothing(*args: Any) -> None:
    """Does nothing: for fake tensors, with which a step's memory is estimated."""


def _number(value: float | Tensor) -> Tensor:
    """`value` in memory as float32, so that a kernel can read it by address."""
    return value.float() if isinstance(value, Tensor) else _python_number(value)


@functools.lru_cache(maxsize=1024)
def _python_number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _compile() -> ctypes.CDLL:
    begin = time.monotonic()
    if compiler() is not None and (why := why_elsewhere()):
        log.warning("%s", why)
    log.warning("compiling the kernels, once for this machine: some ten seconds (kernels.compile=never does without)")
    library = build()
    _made.append(time.monotonic() - begin)
    log.info("compiled in %.1f s, in %s", _made[-1], folder())
    return library


def _give_up(error: Exception) -> None:
    reason = str(error) if isinstance(error, CompilerError) else first_line(error)  # a CompilerError says what to do
    _failed.append(reason)
    log.warning("compiling does not work here, so the kernels run uncompiled: %s", reason)
