"""AdamW and SGD on a GPU, over whole flat buffers. With Triton, AdamW is one launch.

That kernel writes each parameter twice: in its own dtype, and rounded as products read it.
"""

import torch
from torch import Tensor

from ...optim import optimizers as reference
from ..cpu.compiled import compiled_functions
from .chosen import triton_for


class OnDevice(reference.FlatOptimizer):
    """What AdamW and SGD share."""

    chunk = 1 << 25  # elements: the update of `optim` makes some copies of a chunk

    def step(self, loss: Tensor, learning_rate: float | Tensor, max_grad_norm: float | None = None) -> Tensor:
        with compiled_functions(self.uses_library):
            norm = super().step(loss, learning_rate, max_grad_norm)
        if self.rounded is not None:
            self.rounded.refresh()  # if no kernel has written them
        return norm

    def _gradient_norm(self) -> Tensor:
        if (triton := triton_for(self.gradients.buffer)) is not None:
            norm: Tensor = triton.gradient_norm(self.gradients.buffer)
            return norm
        return torch.linalg.vector_norm(self.gradients.buffer, dtype=self.wide)


class AdamW(OnDevice, reference.AdamW):
    """`optim.AdamW`."""

    def _update_all(self, clip: Tensor, rate: Tensor, finite: Tensor) -> None:
        moments = [flat.buffer for flat in self.moments.values()]
        buffers = [flat.buffer[self.part] for flat in (self.parameters, self.gradients)] + moments
        if (triton := triton_for(buffers[0])) is None:
            super()._update_all(clip, rate, finite)
            return
        beta1, beta2 = self.betas
        updates = self.updates.clamp(min=1).double()
        numbers = torch.stack((finite, clip, rate, 1 - beta1**updates, (1 - beta2**updates).sqrt())).float()
        narrow = None if self.rounded is None else self.rounded.flat.buffer[self.part]
        decayed_size = min(max(self.parameters.decayed_size - self.part.start, 0), len(buffers[0]))
        triton.adamw_(*buffers, narrow, numbers, decayed_size, beta1, beta2, self.epsilon, self.weight_decay)
        if self.rounded is not None and len(buffers[0]) == len(self.parameters.buffer):
            self.rounded.is_written()


class SGD(OnDevice, reference.SGD):
    """`optim.SGD`."""
