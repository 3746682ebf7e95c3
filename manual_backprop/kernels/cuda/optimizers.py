"""AdamW and SGD on a GPU: the textbook's, of which one launch takes millions of numbers."""

import torch
from torch import Tensor

from ...optim import optimizers as reference


class OnDevice(reference.FlatOptimizer):
    """What both kinds share."""

    chunk = 1 << 25

    def _gradient_norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.gradients.buffer, dtype=self.wide)


class AdamW(OnDevice, reference.AdamW):
    """`optim.AdamW`."""


class SGD(OnDevice, reference.SGD):
    """`optim.SGD`."""
