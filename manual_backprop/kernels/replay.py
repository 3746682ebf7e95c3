"""A step's calls, written down once and made again.

Of a small network's step a tenth is no arithmetic: Python, and some 400 views. But a step asks for the same memory as
the step before (arena.py), so that all of its calls have the same arguments, too. One step is written down as PyTorch's
dispatcher sees it, without the views; the next ones only make its calls. A CUDA graph is the same thing on a GPU.

The same calls in the same order give the same bits. What runs is what was written down, so a step is made again only
where all that decides its course is as it was: the network, which keeps a Replay, says what that is. A step that waits
for a number, draws one, or calls what cannot be written down runs as it is, always; and so does every step while
somebody looks on, a profiler or whatever else sees PyTorch's calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .arena import Arena

LARGEST = 1 << 19  # numbers of an activation: in larger steps all of this is less than a hundredth of the time
PLAIN = 2  # steps of a kind before one is written down: by then everything is compiled, and memory has its size
KEPT = 8  # tapes: each holds the tensors of its step that are not the arena's
SEEN = 1000  # kinds of steps that are counted

Call = tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]

_tape: ContextVar[Tape | None] = ContextVar("tape", default=None)

_aten = torch.ops.aten
QUICKER: dict[Any, Callable[..., Any]] = {  # the same, without a look at the operator's schema
    _aten.mm.out: torch.mm,
    _aten.addmm.out: torch.addmm,
    _aten.addmm_.default: Tensor.addmm_,
    _aten.bmm.out: torch.bmm,
    _aten.baddbmm.out: torch.baddbmm,
    _aten.copy_.default: Tensor.copy_,
    _aten.add_.Tensor: Tensor.add_,
}
UNREPEATABLE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)
CONSTANTS = (_aten.lift_fresh.default, _aten.lift_fresh_copy.default)  # of Python's numbers
MEMORY = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")  # whatever may be in it


class Replay:
    """The steps of one network that are made again. `arena`: where their memory comes from."""

    def __init__(self, arena: Arena):
        self.arena = arena
        self._generation = arena.generation  # in which the tapes were written
        self._seen: Counter[Hashable] = Counter()
        self._tapes: dict[Hashable, Tape | None] = {}  # None: that kind cannot be written down

    def __call__(self, work: Callable[..., Tensor], inputs: Sequence[Tensor | None], course: Hashable) -> Tensor:
        """work(*inputs), a new tensor. `course`: all that decides what `work` does, beside the inputs.

        `work` reads and writes the inputs, the arena's memory, and tensors that stay where they are.
        """
        if _somebody_looks_on():
            return work(*inputs)
        if self._generation != self.arena.generation:
            self._generation = self.arena.generation
            self._tapes.clear()
        kind = course, *[None if x is None else (x.shape, x.dtype, x.device) for x in inputs]
        if (tape := self._tapes.get(kind)) is not None:
            return tape.replay(inputs)
        if len(self._seen) >= SEEN:
            self._seen.clear()
        self._seen[kind] += 1
        if self._seen[kind] <= PLAIN or kind in self._tapes:
            return work(*inputs)
        if len(self._tapes) >= KEPT:
            oldest = next(iter(self._tapes))
            del self._tapes[oldest], self._seen[oldest]
        tape = Tape(inputs)
        result = tape.write(work)
        self._tapes[kind] = tape if tape.complete and self._generation == self.arena.generation else None
        return result

    def replays(self) -> int:
        """How many kinds of steps are made again."""
        return sum(tape is not None for tape in self._tapes.values())


class Tape(TorchDispatchMode):
    """The calls of one step."""

    def __init__(self, inputs: Sequence[Tensor | None]):
        super().__init__()
        self.inputs = [None if x is None else x.clone() for x in inputs]  # where the calls find them
        self.calls: list[Call] = []
        self.complete = True
        self.result: Tensor | None = None
        self._constants: set[int] = set()  # their storages

    def write(self, work: Callable[..., Tensor]) -> Tensor:
        """A step, which is written down."""
        token = _tape.set(self)
        try:
            with self:
                self.result = work(*self.inputs)
        finally:
            _tape.reset(token)
        return self.result.clone()

    def replay(self, inputs: Sequence[Tensor | None]) -> Tensor:
        """The same step of other inputs."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)
        assert self.result is not None
        return self.result.clone()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        self._write(function, args, kwargs or {}, results)
        return results

    def _write(self, function: Any, args: Any, kwargs: dict[str, Any], results: Any) -> None:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
        if function.namespace != "aten" or not _has_one_course(function, given):
            self.complete = False
        elif function in CONSTANTS:
            self._constants |= _storages(made)
        elif function._schema.is_mutable:
            written = _storages(_written(function, args, kwargs))
            if written & self._constants or not _storages(made) <= written:
                self.complete = False  # it changes what is not written down, or makes something besides
            self.calls.append((QUICKER.get(function, function), args, kwargs))
        elif not made:
            self.complete = False  # a number, for Python
        elif not _storages(made) & _storages(given) and function.overloadpacket.__name__ not in MEMORY:  # not a view
            self.calls.append((_make_again, (function, args, kwargs, made), {}))


def call_library(kernel: Callable[..., None], tensors: Sequence[Tensor], numbers: Sequence[int]) -> None:
    """kernel(addresses of the tensors ..., numbers ...), which no dispatcher sees."""
    arguments = [*[x.data_ptr() for x in tensors], *numbers]
    kernel(*arguments)
    if (tape := _tape.get()) is not None:
        tape.calls.append((_call_at_addresses, (kernel, arguments, tensors), {}))


def _call_at_addresses(kernel: Callable[..., None], arguments: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """The tensors are here so that their memory stays."""
    kernel(*arguments)


def _make_again(function: Callable[..., Any], args: Any, kwargs: dict[str, Any], made: Sequence[Tensor]) -> None:
    """New tensors, put where the later calls find them."""
    results = function(*args, **kwargs)
    for x, result in zip(made, tree_leaves(results), strict=True):
        x.copy_(result)


def _written(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that it writes into."""
    arguments = function._schema.arguments
    given = dict(zip([argument.name for argument in arguments], args, strict=False)) | kwargs
    return [x for one in arguments if one.is_write for x in tree_leaves(given.get(one.name)) if isinstance(x, Tensor)]


def _has_one_course(function: Any, given: Sequence[Tensor]) -> bool:
    """Whether it does the same with any numbers, and each time."""
    if function is _aten.index.Tensor and all(x.dtype == torch.int64 for x in given[1:]):
        return True  # its size depends on masks only
    return not any(tag in function.tags for tag in UNREPEATABLE)


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {x.untyped_storage()._cdata for x in tensors}


def _somebody_looks_on() -> bool:
    looks = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    return bool(looks or torch.autograd._profiler_enabled())
