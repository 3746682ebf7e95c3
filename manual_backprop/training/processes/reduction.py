"""Sums the gradients of all processes, those of each block as soon as its backward pass has ended.

A hand-written backward knows when the gradients of a block are complete (`Network.on_gradients_complete`). Then they
are sent while the backward pass of the block below runs. The ranges of the flat buffer that are sent together are
fixed, so that two runs with the same number of processes have the same bits. Sums are in the dtype of the moments:
float32 for bfloat16 gradients.
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

# The parameters outside of blocks: embeddings, final norm and head. Their gradients are complete last.
REST = None


SIGNALS = tuple(int(number) for number in interruption.SIGNALS)


PIECE = 1 << 20  # numbers that enter a digest at a time
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Requests:
    """What one process requests of all: to stop because of a signal, and to save now."""

    signal: int | None = None
    save: bool = False


class NullObject:
    """Replaces what only the first process has (directory, tracker, report): accepts every call and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self


def digest_of(tensors: Iterable[Tensor]) -> int:
    """A digest of the bits of some tensors: it changes, almost surely, with any bit and with its position."""
    total = 0
    for tensor in tensors:
        for piece in tensor.detach().flatten().split(PIECE):
            bits = piece.view(BITS[piece.element_size()]).long()
            weights = torch.arange(1, len(bits) + 1, device=bits.device) * 2 + 1  # odd: every flipped bit counts
            total = (31 * total + int((bits * weights).sum())) % 2**61
    return total


class GroupReduction(Reduction):
    """The reduction over several processes, which all call it in the same order."""

    shared = True

    def __init__(self, group: Group, network: Network, requests: Callable[[], Requests]):
        self.group, self.network, self.requests = group, network, requests
        self.agreed = Requests()  # of all processes, in the last step
        self.order = [*reversed(block_names(network.config)), REST]  # in which gradients become complete
        self.ranges = {block: self._ranges(block) for block in self.order}
        self._sent: list[tuple[Sum, Tensor]] = []
        self._next = 0  # index in `order` of what completes next

    def _ranges(self, block: str | None) -> list[slice]:
        """The ranges of the flat buffer with the gradients that are complete with a block."""
        if not isinstance(self.network, FlatNetwork):
            return []
        layout = self.network.layout
        prefixes = tuple(f"{one}." for one in ([block] if block else self.order) if one)
        mine = [name for name in layout.offsets if name.startswith(prefixes) == (block is not REST)]
        ranges: list[list[int]] = []
        for begin, name in sorted((layout.offsets[name], name) for name in mine):
            end = begin + math.prod(layout.shapes[name])
            if ranges and begin - ranges[-1][1] < PADDING:  # only zero padding between them
                ranges[-1][1] = end
            else:
                ranges.append([begin, end])
        return [slice(*range_) for range_ in ranges]

    def _gradients(self, block: str | None) -> list[Tensor]:
        if isinstance(self.network, FlatNetwork):
            return [self.network.flat_gradients.buffer[range_] for range_ in self.ranges[block]]
        return self.network.gradient_tensors() if block is REST else []  # leaves of autograd are summed at the end

    def watched(self, batches: Iterable[AnyBatch]) -> Iterator[AnyBatch]:
        waiting: list[AnyBatch] = []
        for batch in batches:
            yield from waiting
            waiting = [batch]
        self.network.on_gradients_complete = self._complete
        yield from waiting

    def finish(self, loss: Tensor) -> Tensor:
        self.network.on_gradients_complete = no_callback
        for block in self.order[self._next :]:  # a process may have no batch in an incomplete step
            self._complete(block)
        for sum_, gradient in self._sent:
            total = self.group.wait(sum_)
            if total is not gradient:
                gradient.copy_(total)
        self._sent, self._next = [], 0
        # The host reads the requests but not the loss of a GPU: there these are two sums, and on a CPU one.
        requests = self.requests()
        asked = [float(requests.signal == number) for number in SIGNALS] + [float(requests.save)]
        if loss.device.type == "cpu":
            total, *found = self.group.summed(torch.tensor([loss.item(), *asked], dtype=torch.float64))
            loss = total.to(loss.dtype)
        else:
            loss = self.group.summed(loss)
            found = list(self.group.summed(torch.tensor(asked)))
        *signals, save = (bool(number) for number in found)
        received = [number for number, is_asked in zip(SIGNALS, signals, strict=True) if is_asked]
        self.agreed = Requests(received[0] if received else None, save)
        return loss

    def _complete(self, block: str | None) -> None:
        if self._next >= len(self.order) or block != self.order[self._next]:
            raise AssertionError(f"{block} is complete, and {self.order[self._next :][:1]} was to be: see Network")
        self._next += 1
        for gradient in self._gradients(block):
            wide = gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
            self._sent.append((self.group.begin_sum(wide), gradient))
