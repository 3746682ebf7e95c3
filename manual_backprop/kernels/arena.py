"""Memory that a step hands out in the same order as the step before, and never gives back.

A training step asks for the same tensors again and again. From the system each of them costs a page fault for every
4 KiB (glibc returns blocks above 32 MB at once), and freed ones leave holes. Inside `with arena.step():` a kernel's
big tensors come from here:

- `kept(...)`: lives until the step ends. The n-th request of a step gets the n-th block.
- `with scratch(...) as buffer:` lives inside the `with`. Blocks are a stack: the next request gets the same memory.

A block grows to the largest request it has met and stays, so memory is bounded by the largest step, whatever the order
of batch sizes and lengths. Outside of a step both allocate afresh, so that a kernel can be called like any function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_current: ContextVar[Arena | None] = ContextVar("arena", default=None)


class Arena:
    """The blocks of one network. `poisoned`: every byte handed out is NaN first, which tests use to show that no kernel
    reads what it has not written."""

    def __init__(self, poisoned: bool = False):
        self.poisoned = poisoned
        self._kept: list[Tensor] = []  # bytes
        self._scratch: list[Tensor] = []
        self._next = 0  # of _kept
        self._depth = 0  # of _scratch

    @contextmanager
    def step(self) -> Iterator[None]:
        """What was kept in the step before is overwritten from here on."""
        self._next = self._depth = 0
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    @contextmanager
    def handing_out_again(self) -> Iterator[None]:
        """What is kept inside lives no longer than that: the next one gets the same memory."""
        before = self._next
        try:
            yield
        finally:
            self._next = before

    def allocated_bytes(self) -> int:
        return sum(block.numel() for block in (*self._kept, *self._scratch))

    def _from(self, blocks: list[Tensor], place: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        size = math.prod(shape) * like.element_size()
        if place == len(blocks):
            blocks.append(torch.empty(0, dtype=torch.uint8, device=like.device))
        if blocks[place].numel() < size:
            blocks[place] = torch.empty(0, dtype=torch.uint8, device=like.device)  # the old one first: both never fit
            blocks[place] = torch.empty(size, dtype=torch.uint8, device=like.device)
        tensor = blocks[place][:size].view(like.dtype).view(shape)
        return tensor.fill_(math.nan) if self.poisoned else tensor


def kept(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialized tensor of `like`'s format and device that lives until the step ends."""
    arena = _current.get()
    if arena is None:
        return like.new_empty(shape)
    arena._next += 1
    return arena._from(arena._kept, arena._next - 1, shape, like)


@contextmanager
def scratch(shape: tuple[int, ...], like: Tensor) -> Iterator[Tensor]:
    """An uninitialized tensor of `like`'s format and device that lives inside the `with`; no view of it may get out."""
    arena = _current.get()
    if arena is None:
        yield like.new_empty(shape)
        return
    arena._depth += 1
    try:
        yield arena._from(arena._scratch, arena._depth - 1, shape, like)
    finally:
        arena._depth -= 1
