"""What every pair shares: which number format a reduction runs in, and how a tensor is seen as rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Record = Callable[[str, Tensor], None]


def no_record(name: str, tensor: Tensor) -> None:
    """The recorder that nobody reads. A pair calls `record(name, tensor)` for what is worth seeing inside it."""


def wide(x: Tensor) -> Tensor:
    """`x` in the format for statistics, exponentials and sums: bfloat16 widened to float32, all else as it is."""
    return x.float() if x.dtype == torch.bfloat16 else x


def rows(x: Tensor) -> Tensor:
    """(..., D) -> (N, D): every leading dimension is a batch of independent rows."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
