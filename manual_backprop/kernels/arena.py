"""An arena: memory that every training step uses in the same order, and that is not returned to the system.

A training step allocates the same tensors again and again. From the system each of them costs a page fault for every
4 KiB (glibc returns blocks above 32 MB at once), and freed ones fragment the memory. Inside `with arena.step():` the
large tensors of the kernels come from here:

- `kept(...)`: memory until the step ends. The n-th request of a step gets the n-th block.
- `ping_pong(...)`: one of two alternating buffers, for a tensor that only the next pairs read: the request after the
  next one gets the same memory.
- `give_back(x)`: a `kept` tensor is no longer needed; the next request gets its memory.
- `with scratch(...) as buffer:` memory inside the `with`. It is a stack: the next request gets the same memory.

Two more functions save memory without owning any:

- `in_place_of(x)`: the gradient of x has the shape of x and is written when x is read for the last time, so inside a
  step it overwrites x. Therefore only the backward of a pair may read the tensors in its cache.
- `saved(x)` and `recomputed(...)`: where recomputing is cheap, a cache keeps a function that recomputes a tensor
  instead of the tensor.

A block grows to the largest request so far and stays, so memory is bounded by the largest step, whatever the order of
batch sizes and lengths. Outside of a step these functions allocate new memory, so a kernel can be called like any
function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .sizes import sizes_of

_current: ContextVar[Arena | None] = ContextVar("arena", default=None)

MOST_VIEWS = 4096  # cached views; every new length needs a new set of them
LINE = 64  # bytes of a cache line: every tensor on the stack starts at one, aligned for all dtypes and vectors


class Arena:
    """The memory blocks of one network. `poisoned`: all memory is filled with NaN first; tests use this to show that no
    kernel reads uninitialized memory."""

    def __init__(self, poisoned: bool = False):
        self.poisoned = poisoned
        self.generation = 0  # increases whenever a block is reallocated
        self.recorded_steps: dict[Any, Any] = {}  # by signature (replay.py), least recently used first
        self._kept: list[Tensor] = []  # bytes
        self._scratch: list[Tensor] = []
        self._next = 0  # of _kept
        self._free: list[int] = []  # blocks of _kept that were given back
        self._ping_pong: list[Tensor] = []  # two, alternating
        self._turn = 0
        self._top = (0, 0, 0)  # of the stack in _scratch: block, byte in it, and bytes below in all blocks
        self._highest = 0  # the largest size of the stack so far [bytes]
        self._views: dict[tuple[Any, ...], Tensor] = {}  # cached views of blocks, by request

    @contextmanager
    def step(self) -> Iterator[None]:
        """The context of a step. It reuses the memory of the step before."""
        self._next, self._free, self._top = 0, [], (0, 0, 0)
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)
            if len(self._scratch) > 1:  # it grew: one block from now on
                device = self._scratch[0].device
                self._scratch = []
                self._forget_views()
                self._scratch = [torch.empty(self._highest, dtype=torch.uint8, device=device)]

    @contextmanager
    def reuse(self) -> Iterator[None]:
        """A context whose `kept` tensors end with it: the memory is reused afterwards."""
        before = self._next, list(self._free)
        try:
            yield
        finally:
            self._next, self._free = before

    def allocated_bytes(self) -> int:
        return sum(block.numel() for block in (*self._kept, *self._ping_pong, *self._scratch))

    def _keep(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if self._free:
            number = self._free.pop()
        else:
            number, self._next = self._next, self._next + 1
        return self._view(self._kept, number, 0, shape, like)

    def _give_back(self, x: Tensor) -> None:
        for number in range(self._next - 1, -1, -1):  # from the last one on
            if _same_memory(self._kept[number], x):
                if number not in self._free:
                    self._free.append(number)
                return

    def _alternate(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if not self._ping_pong:
            self._ping_pong = [torch.empty(0, dtype=torch.uint8, device=like.device) for _ in range(2)]
        if not _same_memory(self._ping_pong[1 - self._turn], like):
            self._turn = 1 - self._turn
        tensor = self._new_view(self._ping_pong, self._turn, 0, shape, like)  # new: `recomputable` sets an attribute
        return tensor.fill_(math.nan) if self.poisoned else tensor

    def _push(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor on top of the stack, in the current block if it fits; an empty block may grow."""
        block, start, below = self._top
        size = -(-_bytes(shape, like) // LINE) * LINE
        if start and start + size > self._scratch[block].numel():
            block, start = block + 1, 0
        self._top = block, start + size, below + size
        self._highest = max(self._highest, below + size)
        return self._view(self._scratch, block, start, shape, like)

    def _view(self, blocks: list[Tensor], block: int, start: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A view from byte `start` of a block, which is allocated or enlarged if it is too small.

        A step asks for the same views as the step before, and creating a view takes longer than a small product.
        """
        key = id(blocks), block, start, shape, like.dtype
        tensor = self._views.get(key)
        if tensor is None:
            tensor = self._new_view(blocks, block, start, shape, like)
            if len(self._views) == MOST_VIEWS:
                self._views.clear()
            self._views[key] = tensor
        return tensor.fill_(math.nan) if self.poisoned else tensor

    def _new_view(self, blocks: list[Tensor], block: int, start: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        end = start + _bytes(shape, like)
        if block == len(blocks):
            blocks.append(torch.empty(0, dtype=torch.uint8, device=like.device))
        if blocks[block].numel() < end:
            self._forget_views()
            blocks[block] = torch.empty(0, dtype=torch.uint8, device=like.device)  # free first: both may not fit
            blocks[block] = torch.empty(end, dtype=torch.uint8, device=like.device)
        return blocks[block][start:end].view(like.dtype).view(shape)

    def _forget_views(self) -> None:
        """Drops views and recorded steps: they would keep the memory of a reallocated block alive."""
        self.generation += 1
        self._views.clear()
        self.recorded_steps.clear()


def _same_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def _bytes(shape: tuple[int, ...], like: Tensor) -> int:
    return math.prod(shape) * like.element_size()


def kept(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialized tensor of `like`'s dtype and device that lives until the step ends."""
    arena = _current.get()
    return like.new_empty(shape) if arena is None else arena._keep(shape, like)


def give_back(x: Tensor) -> None:
    """Frees the memory of x for the next request, if it came from `kept`; does nothing for any other tensor."""
    arena = _current.get()
    if arena is not None:
        arena._give_back(x)


def ping_pong(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialized tensor of `like`'s dtype and device, in one of two alternating buffers. The request after the
    next one overwrites it. If the other buffer is that of `like`, which is still read, the next request does."""
    arena = _current.get()
    return like.new_empty(shape) if arena is None else arena._alternate(shape, like)


@contextmanager
def scratch(shape: tuple[int, ...], like: Tensor) -> Iterator[Tensor]:
    """An uninitialized tensor of `like`'s dtype and device that lives inside the `with`; no view of it may leave it."""
    arena = _current.get()
    if arena is None:
        yield like.new_empty(shape)
        return
    before = arena._top
    try:
        yield arena._push(shape, like)
    finally:
        arena._top = before


def in_place_of(x: Tensor) -> Tensor:
    """The memory for the gradient of x when x is not read again: inside a step x itself, outside of it a new tensor."""
    return x.new_empty(x.shape) if _current.get() is None or not x.is_contiguous() else x


Recomputable = Tensor | Callable[[], Tensor]  # a tensor, or a function that recomputes it


def recomputable(x: Tensor, recompute: Callable[[], Tensor]) -> Tensor:
    """x, marked so that a cache keeps `recompute`, which returns the same numbers, instead of x. Only inside a step:
    elsewhere x belongs to the caller and must not keep other tensors alive."""
    if _current.get() is not None:
        x.recompute = recompute  # type: ignore[attr-defined]
    return x


def is_small(size: int, like: Tensor, weights: int = 0) -> bool:
    """Whether a tensor of `size` numbers, computed with `weights` weights, is small enough to keep instead of
    recomputing it."""
    sizes = sizes_of(like)
    return size <= max(sizes.small, sizes.small_beside_weights * weights)


def persistent(x: Tensor) -> Tensor:
    """x, or a copy if x lies in a ping-pong buffer: for a cache that keeps x itself."""
    arena = _current.get()
    if arena is None or not any(_same_memory(x, block) for block in arena._ping_pong):
        return x
    return kept(tuple(x.shape), x).copy_(x)


def saved(x: Tensor) -> Recomputable:
    """What a cache keeps of x: the function that recomputes it if there is one, else x."""
    return getattr(x, "recompute", x)


def recomputed(x: Recomputable) -> Tensor:
    """The tensor that was given to `saved`."""
    return x if isinstance(x, Tensor) else x()
