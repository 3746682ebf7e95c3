"""Functions that become one kernel in C++, and that run as they are written where they cannot.

`@compiled("N F", "N F", "F")`, above a function that writes into tensors it is given and returns nothing, says the
dimensions of each tensor. On a CPU it is compiled once for a machine, for all sizes and numbers of threads, by another
process (compiler.py); this one loads the library (libraries.py). On a GPU it is left to `torch.compile`.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
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
from .libraries import (
    CompilerError,
    Library,
    Request,
    build,
    compiler,
    find,
    folder,
    load,
    raise_if_refused,
    request,
    why_elsewhere,
)

log = logging.getLogger(__name__)

SMALLEST = 2  # of any dimension: one row or one column runs as it is written
MOST_CALLS = 4096  # calls, by their shapes, of which it is known how they run
FORMATS = (torch.float32, torch.bfloat16)  # of activations and parameters; float64 is for tests, and runs as written
IN_CACHE = 1 << 17  # numbers that an uncompiled function takes at a time: what it makes of them stays in the cache
FIXED = {"float32": torch.float32}
NUMBERS = {"float": torch.float32}
TENSORS = (Tensor, torch.nn.Parameter, FakeTensor)  # and nothing else that only looks like one

Group = tuple[str, torch.dtype, torch.dtype]  # functions by what they serve: formats of activations and parameters

_wanted: ContextVar[Collection[Group] | None] = ContextVar("compiled", default=None)
_failed: list[str] = []  # why compilation does not work in this process
_made: list[str] = []  # the functions that this process has had compiled
_registered: list[CompiledFunction] = []


@contextmanager
def compiled_functions(groups: Collection[Group] | None) -> Iterator[None]:
    """Inside, functions marked with `compiled` run compiled where they can; None: as they are written.

    Where a function was never compiled, all that these groups miss are compiled with it.
    """
    token = _wanted.set(groups)
    try:
        yield
    finally:
        _wanted.reset(token)


def compiles(how: str, device: torch.device) -> bool:
    """Whether to try it. `auto`: where there is what it takes; without a C++ compiler no word is lost about it."""
    return how == "always" or (how == "auto" and (device.type == "cuda" or compiler() is not None))


def compiling_failed() -> bool:
    """Whether it has failed in this process: everything runs as it is written then."""
    return bool(_failed)


def newly_compiled() -> bool:
    """Whether a compiler has worked for this process: all that it needed was not there before."""
    return bool(_made)


@dataclass(frozen=True)
class Argument:
    """A tensor's dimensions, as letters that may have a factor ("N 2F"), and where its format comes from.

    `kind`, behind a colon: `parameter` for the format of the parameters, `float32` for that format always; with none it
    is the format of the activations. "float" is a number, of Python's or a tensor's.
    """

    dimensions: tuple[tuple[int, str], ...]
    kind: str

    @classmethod
    def of(cls, text: str) -> Argument:
        if text in NUMBERS:
            return cls((), text)
        words, _, kind = text.partition(":")
        return cls(tuple((int(word[:-1] or 1), word[-1]) for word in words.split()), kind.strip() or "activation")


def compiled(
    *arguments: str, group: str = "", by_rows: bool = False
) -> Callable[[Callable[..., None]], CompiledFunction]:
    """Marks a function of a module, with positional arguments: tensors, described as `Argument` says, then numbers.

    `group`: what it serves, an activation, a norm or an optimizer; "" for every network. `by_rows`: no row, along the
    first dimension, depends on another. Tensors may share memory only where each element is read and written at the
    same place.
    """

    def mark(function: Callable[..., None]) -> CompiledFunction:
        marked = CompiledFunction(function, tuple(Argument.of(text) for text in arguments), group, by_rows)
        _registered.append(marked)
        return marked

    return mark


class CompiledFunction:
    """Calls the compiled function where that is wanted and can be had, and the function as it is written elsewhere."""

    __name__: str

    def __init__(self, function: Callable[..., None], arguments: tuple[Argument, ...], group: str, by_rows: bool):
        functools.update_wrapper(self, function)
        self.function, self.arguments, self.group, self.by_rows = function, arguments, group, by_rows
        self.tensors = sum(argument.kind not in NUMBERS for argument in arguments)
        self.libraries: dict[tuple[tuple[str, torch.dtype], ...], Library] = {}
        self.calls: dict[Any, Callable[..., None]] = {}  # by all that is known of the tensors but their content

    def __call__(self, *args: Any) -> None:
        return self._call_of(args)(*args)

    def compiles(self, *args: Any) -> bool:
        """Whether such a call runs in a library, which is loaded or made now. If not, where PyTorch has kernels of its
        own for it, those are faster than what is written here."""
        return not args[0].is_cuda and self._call_of(args) != self._as_written

    def _call_of(self, args: tuple[Any, ...]) -> Callable[..., None]:
        if _wanted.get() is None or _failed:
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
        for part in pieces(len(args[0]), max(1, IN_CACHE // args[0].shape[1]), args[0]):
            self.function(*(x[part] if split else x for x, split in zip(args, in_rows, strict=True)))

    def _choose(self, tensors: tuple[Tensor, ...]) -> Callable[..., None]:
        """How calls with such tensors run, in this process."""
        on_gpu, fake = any(x.is_cuda for x in tensors), any(type(x) is FakeTensor for x in tensors)
        if on_gpu:
            return _nothing if fake else self._on_gpu
        formats, sizes = self._formats(tensors), self._sizes(tensors)
        if formats is None or sizes is None:
            return self._as_written
        if fake:
            return _nothing
        try:
            library = self._library(formats)
        except Exception as error:  # whatever the compiler or the loader raises
            _give_up(error)
            return self._as_written
        return self._bound(library, sizes)

    def _formats(self, tensors: tuple[Tensor, ...]) -> dict[str, torch.dtype] | None:
        """Of activations and parameters; None where a tensor has none that is compiled for."""
        formats: dict[str, torch.dtype] = {}
        for x, argument in zip(tensors, self.arguments, strict=False):
            if argument.kind not in FIXED and x.dtype not in FORMATS:
                return None
            if formats.setdefault(argument.kind, FIXED.get(argument.kind, x.dtype)) != x.dtype:
                return None
        return formats

    def _sizes(self, tensors: tuple[Tensor, ...]) -> dict[str, int] | None:
        """Of each letter; None where the tensors do not have that form, contiguous and in the CPU's memory."""
        sizes: dict[str, int] = {}
        for x, argument in zip(tensors, self.arguments, strict=False):
            if type(x) not in TENSORS or not x.is_cpu or not x.is_contiguous() or x.dim() != len(argument.dimensions):
                return None
            for size, (factor, letter) in zip(x.shape, argument.dimensions, strict=True):
                if size < SMALLEST * factor or sizes.setdefault(letter, size // factor) * factor != size:
                    return None
        return sizes

    def request(self, formats: dict[str, torch.dtype]) -> Request:
        known = FIXED | NUMBERS | formats
        return request(self.function, tuple(known[argument.kind] for argument in self.arguments))

    def _library(self, formats: dict[str, torch.dtype]) -> Library:
        """Loads the library; compiles it, and with it what the groups that are wanted miss, where it is missing."""
        key = tuple(formats.items())
        if key not in self.libraries:
            wanted = self.request(formats)
            library = find(wanted)
            if library is None:
                _compile([wanted, *_requests(_wanted.get() or ())])
                library = find(wanted)
            if library is None:
                library = load(wanted, folder())  # which says why it is none
            self.libraries[key] = library
        return self.libraries[key]

    def _bound(self, library: Library, sizes: dict[str, int]) -> Callable[..., None]:
        """The call for tensors of these sizes."""

        def elements(factor: int, letters: str) -> int:
            return factor * math.prod(sizes[letter] for letter in letters)

        kernel, pointers, n_tensors = library.kernel, library.pointers, self.tensors
        numbers = [elements(*size) for size in library.sizes]
        memory = [(elements(*size), dtype) for dtype, size in library.memory]
        dtypes = [NUMBERS[argument.kind] for argument in self.arguments[n_tensors:]]

        def call(*args: Any) -> None:
            tensors = [
                *args[:n_tensors],
                *_numbers(args[n_tensors:], dtypes),
                *[torch.empty(count, dtype=dtype, device="cpu") for count, dtype in memory],
            ]
            call_library(kernel, [tensors[place] for place in pointers], numbers)

        def call_of_tensors(*args: Tensor) -> None:
            call_library(kernel, [args[place] for place in pointers], numbers)

        return call if memory or dtypes else call_of_tensors

    def _on_gpu(self, *args: Any) -> None:
        try:
            self._compiled_for_gpu(*args)
        except Exception as error:  # whatever the compiler raises; a fault of the function itself raises again below
            _give_up(error)
            self.function(*args)

    @functools.cached_property
    def _compiled_for_gpu(self) -> Any:
        return torch.compile(self.function, dynamic=True, fullgraph=True)


def _nothing(*args: Any) -> None:
    """Of tensors without numbers, by which a step's memory is estimated: a library takes none."""


@functools.lru_cache(maxsize=1024)
def _number(value: float, dtype: torch.dtype) -> Tensor:
    """Where a kernel finds it."""
    return torch.tensor(value, dtype=dtype, device="cpu")


def _numbers(values: Sequence[float | Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    return [
        value.to(dtype) if isinstance(value, Tensor) else _number(value, dtype)
        for value, dtype in zip(values, dtypes, strict=True)
    ]


def _requests(groups: Collection[Group]) -> list[Request]:
    """Of all functions of these groups."""
    return [
        one.request({"activation": activation, "parameter": parameter})
        for group, activation, parameter in groups
        for one in _registered
        if one.group == group
    ]


def _compile(wanted: list[Request]) -> None:
    missing = [one for one in dict.fromkeys(wanted) if find(one) is None]
    if not missing:  # another process was faster
        return
    raise_if_refused(missing)
    if compiler() is not None and (why := why_elsewhere()):
        log.warning("%s", why)
    begin = time.monotonic()
    log.warning(
        "compiling %d functions of the kernels, once for this machine: some ten seconds (kernels.compile=never does "
        "without)",
        len(missing),
    )
    build(missing)
    _made.extend(one.name for one in missing)
    log.info("compiled in %.1f s: %s, in %s", time.monotonic() - begin, ", ".join(_made), folder())


def _give_up(error: Exception) -> None:
    reason = str(error) if isinstance(error, CompilerError) else first_line(error)  # ours ends with what to do
    _failed.append(reason)
    log.warning("compiling does not work here, so the kernels run uncompiled: %s", reason)
