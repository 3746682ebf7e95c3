"""The sum of all processes' gradients, of each block as soon as its backward pass has ended.

A hand-written backward knows the moment when nothing more is added to a block's gradients
(`Network.on_gradients_complete`): from then on they travel while the block below is calculated. The ranges of the flat
buffer that travel together are fixed, so that two runs of as many processes have the same bits. Sums are made in the
format of the moments: of bfloat16 gradients, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...common import interruption
from ...common.batch import AnyBatch
from ...models.network import FlatNetwork, Network, block_names, no_callback
from ...models.training_step import Reduction
from ...optim.parameters import PADDING
from .group import Group, Sum

# What has no name of its own: embeddings, final norm and head, whose gradients are complete last.
REST = None


SIGNALS = tuple(int(number) for number in interruption.SIGNALS)


PIECE = 1 << 20  # numbers of which a digest is made at a time
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Wishes:
    """What one process asks of all: to stop because of a signal, and to save now."""

    signal: int | None = None
    save: bool = False


class Nothing:
    """In place of what the first process alone has (its directory, tracker, report): takes every call."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self


def digest_of(tensors: Iterable[Tensor]) -> int:
    """Of the bits of some tensors: another one where any bit, or its place, is another one (but for luck)."""
    total = 0
    for tensor in tensors:
        for piece in tensor.detach().flatten().split(PIECE):
            bits = piece.view(BITS[piece.element_size()]).long()
            weights = torch.arange(1, len(bits) + 1, device=bits.device) * 2 + 1  # odd: a bit that flips is seen
            total = (31 * total + int((bits * weights).sum())) % 2**61
    return total


class GroupReduction(Reduction):
    """Of several processes, which call it in the same order."""

    shared = True

    def __init__(self, group: Group, network: Network, wishes: Callable[[], Wishes]):
        self.group, self.network, self.wishes = group, network, wishes
        self.agreed = Wishes()  # of all processes, in the last step
        self.order = [*reversed(block_names(network.config)), REST]  # in which they become complete
        self.ranges = {block: self._ranges(block) for block in self.order}
        self._sent: list[tuple[Sum, Tensor]] = []
        self._next = 0  # of `order`: what is complete next

    def _ranges(self, block: str | None) -> list[slice]:
        """Of the flat buffer: where the gradients lie that are complete with a block."""
        if not isinstance(self.network, FlatNetwork):
            return []
        layout = self.network.layout
        prefixes = tuple(f"{one}." for one in ([block] if block else self.order) if one)
        mine = [name for name in layout.offsets if name.startswith(prefixes) == (block is not REST)]
        ranges: list[list[int]] = []
        for begin, name in sorted((layout.offsets[name], name) for name in mine):
            end = begin + math.prod(layout.shapes[name])
            if ranges and begin - ranges[-1][1] < PADDING:  # only padding between them, which is 0
                ranges[-1][1] = end
            else:
                ranges.append([begin, end])
        return [slice(*range_) for range_ in ranges]

    def _gradients(self, block: str | None) -> list[Tensor]:
        if isinstance(self.network, FlatNetwork):
            return [self.network.flat_gradients.buffer[range_] for range_ in self.ranges[block]]
        return self.network.gradient_tensors() if block is REST else []  # autograd's own leaves: all at the end

    def watched(self, batches: Iterable[AnyBatch]) -> Iterator[AnyBatch]:
        waiting: list[AnyBatch] = []
        for batch in batches:
            yield from waiting
            waiting = [batch]
        self.network.on_gradients_complete = self._complete
        yield from waiting

    def finish(self, loss: Tensor) -> Tensor:
        self.network.on_gradients_complete = no_callback
        for block in self.order[self._next :]:  # a process may have no batch in a ragged step
            self._complete(block)
        for sum_, gradient in self._sent:
            total = self.group.wait(sum_)
            if total is not gradient:
                gradient.copy_(total)
        self._sent, self._next = [], 0
        # One sum for the loss and the wishes, of which the host has to know: on a GPU the loss does not go there.
        wishes = self.wishes()
        asked = [float(wishes.signal == number) for number in SIGNALS] + [float(wishes.save)]
        if loss.device.type == "cpu":
            total, *found = self.group.summed(torch.tensor([loss.item(), *asked], dtype=torch.float64))
            loss = total.to(loss.dtype)
        else:
            loss = self.group.summed(loss)
            found = list(self.group.summed(torch.tensor(asked)))
        *signals, save = (bool(number) for number in found)
        received = [number for number, is_asked in zip(SIGNALS, signals, strict=True) if is_asked]
        self.agreed = Wishes(received[0] if received else None, save)
        return loss

    def _complete(self, block: str | None) -> None:
        if self._next >= len(self.order) or block != self.order[self._next]:
            raise AssertionError(f"{block} is complete, and {self.order[self._next :][:1]} was to be: see Network")
        self._next += 1
        for gradient in self._gradients(block):
            wide = gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
            self._sent.append((self.group.begin_sum(wide), gradient))
