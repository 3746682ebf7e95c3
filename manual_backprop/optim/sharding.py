"""An optimizer whose moments are sharded: each process updates its part of the parameters and keeps the moments of that
part alone (Rajbhandari et al. 2020, ZeRO stage 1).

Every process has the whole gradient and computes its whole norm, so the parameters have the same bits as with one
optimizer for all of them. After an update each process sends its part of the parameters to the others. A checkpoint
contains whole moments, so a run can resume with any other number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..common.processes import Processes
from .optimizers import FlatOptimizer, Optimizer
from .parameters import PADDING, Layout, copy_into


class ShardedOptimizer(Optimizer):
    """Shards the moments of `optimizer`, which has made no step yet, over the processes of `group`."""

    def __init__(self, optimizer: FlatOptimizer, layout: Layout, group: Processes):
        super().__init__(optimizer.counts.device)
        self.optimizer, self.layout, self.group = optimizer, layout, group
        self.counts, self.loss_scale = optimizer.counts, optimizer.loss_scale
        self.updates, self.nonfinite_steps, self.nonfinite_in_a_row, self.nonfinite_longest = self.counts
        size = layout.size
        self.length = -(-size // group.size // PADDING) * PADDING  # of a part; the last parts may be shorter, or empty
        begin = min(group.rank * self.length, size)
        self.part = slice(begin, min(begin + self.length, size))
        optimizer.keep_part(self.part)

    def step(self, loss: Tensor, learning_rate: float | Tensor, max_grad_norm: float | None = None) -> Tensor:
        norm = self.optimizer.step(loss, learning_rate, max_grad_norm)
        buffer = self.optimizer.parameters.buffer
        whole = buffer.new_empty(self.length * self.group.size)
        self.group.all_parts(whole, self._padded(buffer[self.part]))
        buffer.copy_(whole[: len(buffer)])
        return norm

    def _padded(self, part: Tensor) -> Tensor:
        padded = part.new_zeros(self.length)
        padded[: len(part)] = part
        return padded

    def moment_views(self) -> dict[str, Mapping[str, Tensor]]:
        """The whole moments in the first process, nothing in the others. All processes must call it."""
        found: dict[str, Mapping[str, Tensor]] = {}
        for name, moment in self.optimizer.moments.items():
            parts = self.group.parts_for_first(self._padded(moment.buffer))
            if parts is None:
                continue
            whole = self.layout.allocate(moment.buffer.dtype, moment.buffer.device)
            whole.buffer.copy_(torch.cat(parts)[: self.layout.size])
            found[name] = whole.views
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        moments = self.optimizer.moments
        wholes = {
            name: self.layout.allocate(moment.buffer.dtype, moment.buffer.device) for name, moment in moments.items()
        }
        views = {f"{name}/{key}": view for name, whole in wholes.items() for key, view in whole.views.items()}
        copy_into(views | self.whole_views(), state, what="optimizer state")
        for name, whole in wholes.items():
            moments[name].buffer.copy_(whole.buffer[self.part])
