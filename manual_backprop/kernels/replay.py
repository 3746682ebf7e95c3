"""A step's calls, recorded once and replayed.

In a small network an eighth of a step is not arithmetic but Python and some 400 views. A step uses the same memory as
the step before (arena.py), so all of its calls have the same arguments. One step is recorded at PyTorch's dispatcher,
without the views; the next steps only repeat its calls. A CUDA graph is the same thing on a GPU.

The same calls in the same order give the same bits. A step is replayed only if it has the signature of the recorded
step. The signature is everything that decides the calls of a step; the network, which owns a Replay, defines it. A step
that reads a number on the host, draws a random number, or makes a call that cannot be recorded, always runs eagerly. So
does every step while a profiler or one of PyTorch's modes is active. A step must not call what the dispatcher does not
see, such as `x.tolist()` or `x.numpy()`: a replay would skip it silently.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .arena import Arena
from .sizes import SIZES

WARM_UP = 2  # steps of a signature before one is recorded: then everything is compiled, and memory has its final size
MOST_STEPS = 4  # recorded at once
MOST_BYTES = 1 << 24  # of a recorded step: of its tensors outside the arena
MOST_SIGNATURES = 100  # counted, or known not to be recordable

Call = tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]

_recording: ContextVar[RecordedStep | None] = ContextVar("recording", default=None)

_aten = torch.ops.aten
WITHOUT_SCHEMA: dict[Any, Callable[..., Any]] = {  # the same functions, called without the operator's schema
    _aten.mm.out: torch.mm,
    _aten.addmm.out: torch.addmm,
    _aten.addmm_.default: Tensor.addmm_,
    _aten.bmm.out: torch.bmm,
    _aten.baddbmm.out: torch.baddbmm,
    _aten.copy_.default: Tensor.copy_,
    _aten.add_.Tensor: Tensor.add_,
}
NOT_REPLAYABLE = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
    torch.Tag.inplace_view,  # changes the shape of a tensor at every call
)
COPIES = (_aten._to_copy.default, _aten.clone.default)
CONSTANTS = (_aten.lift_fresh.default, _aten.lift_fresh_copy.default)  # tensors made from Python numbers
MEMORY = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")  # uninitialized


def is_replayable(size: int, dropout: float, device_type: str) -> bool:
    """Whether steps whose activations have `size` numbers always make the same calls, and replaying saves time."""
    return device_type == "cpu" and size <= SIZES[device_type].replayed and not dropout  # dropout's masks are drawn


class StepRecorder(ABC):
    """Runs the steps of one network: those of a signature some times as they are, then one is recorded, and the next
    ones only replay it. `recorded`: by signature, least recently used first; `warm_up`: steps of a signature before
    one is recorded."""

    def __init__(self, recorded: dict[Hashable, Any], warm_up: int):
        self.recorded, self.warm_up = recorded, warm_up
        self._seen: Counter[Hashable] = Counter()
        self._refused: set[Hashable] = set()  # signatures of steps that cannot be recorded

    def __call__(self, work: Callable[..., Any], inputs: Sequence[Tensor | None], signature: Hashable) -> Any:
        """work(*inputs), as new tensors. `signature`: everything besides the inputs that decides what `work` does."""
        if is_observed():
            return work(*inputs)
        key = signature, *[None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in inputs]
        if (step := self.recorded.pop(key, None)) is not None:
            self.recorded[key] = step
            return step.replay(inputs)
        if len(self._seen) > MOST_SIGNATURES:
            self._seen.clear()
            self._refused.clear()
        self._seen[key] += 1
        if self._seen[key] <= self.warm_up or key in self._refused:
            return work(*inputs)
        return self._record(work, inputs, key)

    @abstractmethod
    def _record(self, work: Callable[..., Any], inputs: Sequence[Any], key: Hashable) -> Any:
        """Runs a step, and records it if that is possible."""

    def _drop_oldest(self) -> None:
        oldest = next(iter(self.recorded))
        del self.recorded[oldest], self._seen[oldest]


class Replay(StepRecorder):
    """Records and replays the steps of one network on a CPU. `arena` provides their memory.

    A step reads its inputs, and reads and writes memory of the arena and tensors that keep their address. `around`: the
    context that PyTorch's operators need in a replay; `work` enters its own.
    """

    def __init__(self, arena: Arena, around: Callable[[], AbstractContextManager[None]] = nullcontext):
        super().__init__(arena.recorded_steps, WARM_UP)
        self.arena, self.around = arena, around

    def _record(self, work: Callable[..., Tensor], inputs: Sequence[Tensor | None], key: Hashable) -> Tensor:
        generation, step = self.arena.generation, RecordedStep(inputs, self.around)
        self._refused.add(key)  # in case it fails
        result = step.record(work)
        if step.complete:
            self._refused.remove(key)
            if generation == self.arena.generation:
                self.recorded[key] = step
        if len(self.recorded) > MOST_STEPS:
            self._drop_oldest()
        return result


class RecordedStep(TorchDispatchMode):
    """The calls of one step."""

    def __init__(self, inputs: Sequence[Tensor | None], around: Callable[[], AbstractContextManager[None]]):
        super().__init__()
        self.around = around
        self.inputs = [None if x is None else x.clone() for x in inputs]  # the calls read the inputs here
        self.calls: list[Call] = []
        self.complete = True
        self.result: Tensor | None = None
        self._constants: list[Tensor] = []
        self._library_calls = 0
        self._alive: list[Tensor] = []  # tensors of which a call has only the addresses
        self._changed: set[int] = set()  # storages that calls write into
        self._bytes = 0  # of tensors outside the arena

    def record(self, work: Callable[..., Tensor]) -> Tensor:
        """Runs a step and records its calls."""
        token = _recording.set(self)
        try:
            with self:
                self.result = work(*self.inputs)
        finally:
            _recording.reset(token)
        self._drop_constant_calls()
        if len(self.calls) == self._library_calls:
            self.around = nullcontext
        return self.result.clone()

    def _drop_constant_calls(self) -> None:
        """Drops calls whose results are constant, such as a mask: they depend on nothing, and nothing changes them."""
        stay: set[int] = set()
        calls, self.calls = self.calls, []
        for function, args, kwargs in calls:
            if function is not _recompute_into:
                self.calls.append((function, args, kwargs))
                continue
            _, inputs, settings, made = args
            if _storages(_tensors((inputs, settings))) <= stay and not _storages(made) & self._changed:
                stay |= _storages(made)
            else:
                self.calls.append(_replayed_call(*args))

    def replay(self, inputs: Sequence[Tensor | None]) -> Tensor:
        """The same step with other inputs."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        with self.around():
            for function, args, kwargs in self.calls:
                function(*args, **kwargs)
        assert self.result is not None
        return self.result.clone()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False. Otherwise PyTorch would import its compiler (75 MB, a second) only to disable it for the method
        below."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        self._record_call(function, args, kwargs or {}, results)
        return results

    def _record_call(self, function: Any, args: Any, kwargs: dict[str, Any], results: Any) -> None:
        given, made = _tensors((args, kwargs)), _tensors(results)
        if not self.complete or function.namespace != "aten" or not _is_replayable_operator(function, given):
            self._give_up()
        elif function in CONSTANTS:
            self._constants += made
        elif function._schema.is_mutable:
            written = _storages(_mutated(function, args, kwargs))
            if written & _storages(self._constants) or not _storages(made) <= written:
                self._give_up()  # it changes a tensor that is not recorded, or returns more than tensors
            else:
                self._changed |= written
                self.calls.append((WITHOUT_SCHEMA.get(function, function), args, kwargs))
        elif not made:
            self._give_up()  # it returns a Python number
        elif _storages(made) <= _storages(given):
            pass  # a view
        elif _storages(made) & _storages(given):
            self._give_up()
        else:
            self._bytes += sum(x.nbytes for x in made)
            if self._bytes > MOST_BYTES:
                self._give_up()
            elif function.overloadpacket.__name__ not in MEMORY and any(x.numel() for x in made):
                self.calls.append((_recompute_into, (function, args, kwargs, made), {}))

    def _give_up(self) -> None:
        """Stops recording and frees the tensors: a step that cannot be recorded completely is not replayed."""
        self.complete = False
        self.calls.clear()
        self._alive.clear()


def call_library(kernel: Any, tensors: Sequence[Tensor | None], numbers: Sequence[int | float]) -> None:
    """kernel(addresses of the tensors, 0 for None ..., numbers ...), a function of ctypes. The dispatcher does not see
    this call."""
    arguments = [*[0 if x is None else x.data_ptr() for x in tensors], *numbers]
    kernel(*arguments)
    if (step := _recording.get()) is not None and step.complete:
        given = _tensors(tensors)
        step._changed |= _storages(given)
        step._alive += given
        step._library_calls += 1
        # as ctypes passes them, which costs it less in every replay
        step.calls.append((kernel, [kind(x) for kind, x in zip(kernel.argtypes, arguments, strict=True)], {}))


def _recompute_into(function: Callable[..., Any], args: Any, kwargs: dict[str, Any], made: Sequence[Tensor]) -> None:
    """Calls the function and copies its results into `made`, where later calls read them."""
    for x, result in zip(made, _tensors(function(*args, **kwargs)), strict=True):
        x.copy_(result)


def _replayed_call(function: Any, args: Any, kwargs: dict[str, Any], made: Sequence[Tensor]) -> Call:
    """`_recompute_into`, without the copy if the operator can write into existing tensors."""
    if function in COPIES:
        return Tensor.copy_, (made[0], args[0]), {}
    into = _out_variant(function)
    if into is None:
        return _recompute_into, (function, args, kwargs, made), {}
    variant, names = into
    return variant, args, kwargs | dict(zip(names, made, strict=True))


@cache
def _out_variant(function: Any) -> tuple[Any, list[str]] | None:
    """The operator's variant with arguments for its results, and the names of these arguments."""
    wanted = [(one.name, str(one.type)) for one in function._schema.arguments]
    for name in function.overloadpacket.overloads():
        variant = getattr(function.overloadpacket, name)
        arguments = variant._schema.arguments
        results = [one.name for one in arguments if one.is_out]
        if results and [(one.name, str(one.type)) for one in arguments if not one.is_out] == wanted:
            return variant, results
    return None


def _mutated(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that the operator writes into."""
    arguments = function._schema.arguments
    given = dict(zip([argument.name for argument in arguments], args, strict=False)) | kwargs
    return _tensors([given.get(one.name) for one in arguments if one.is_write])


def _is_replayable_operator(function: Any, given: Sequence[Tensor]) -> bool:
    """Whether the operator makes the same call every time, whatever the numbers."""
    if function is _aten.index.Tensor and all(x.dtype in (torch.int64, torch.int32) for x in given[1:]):
        return True  # its size depends on masks only
    return not any(tag in function.tags for tag in NOT_REPLAYABLE)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {x.untyped_storage()._cdata for x in tensors}


def is_observed() -> bool:
    """Whether a profiler or one of PyTorch's modes is active, which must see every call."""
    modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    return bool(modes or torch.autograd._profiler_enabled())
