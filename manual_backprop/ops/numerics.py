"""What every pair shares: the dtype of reductions, a tensor as rows, and the recorder of intermediate tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Record(Protocol):
    """Receives intermediate tensors of a step. A pair calls `record(name, tensor)` for those that are worth seeing.

    A tensor that the pair computes anyway is passed without asking; the recorder ignores the names it does not want.
    A tensor that would be computed or copied only for the record is computed only if `record.wants(name)`.
    """

    def wants(self, name: str) -> bool: ...

    def __call__(self, name: str, tensor: Tensor) -> None: ...


class NoRecord:
    """A recorder that wants nothing and does nothing."""

    def wants(self, name: str) -> bool:
        return False

    def __call__(self, name: str, tensor: Tensor) -> None: ...


no_record = NoRecord()


NARROW = (torch.bfloat16, torch.float16)


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype for statistics, exponentials and sums: 16 bits become float32; wider dtypes stay."""
    return x.float() if x.dtype in NARROW else x


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """A context in which, for precision=tf32, a GPU rounds inputs of float32 products to 10 bits of mantissa.

    It uses the older of PyTorch's two settings: `torch.compile` reads that one, and fails if only the newer one is set.
    """
    if precision != "tf32":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def one_number(value: float | Tensor, like: Tensor) -> Tensor:
    """`value` as a tensor with one number, in the dtype and on the device of `like`.

    A Python number is filled in on the device: `torch.as_tensor` would copy it from the host, and the step of a GPU
    would wait for the copy. A tensor that is already on the device is not copied: in a recorded step its value may
    change from step to step.
    """
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), value)


def rows(x: Tensor) -> Tensor:
    """(..., D) -> (N, D): every leading dimension is a batch of independent rows."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
