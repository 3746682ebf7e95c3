"""What every pair shares: which number format a reduction runs in, how a tensor is seen as rows, who looks inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Record(Protocol):
    """Who looks inside a step. A pair calls `record(name, tensor)` for what is worth seeing inside it.

    What it has anyway it may offer under any name: who does not want that does nothing with it. What it would compute
    or copy for the record alone, it does only where `record.wants(name)`.
    """

    def wants(self, name: str) -> bool: ...

    def __call__(self, name: str, tensor: Tensor) -> None: ...


class NoRecord:
    """The recorder that nobody reads."""

    def wants(self, name: str) -> bool:
        return False

    def __call__(self, name: str, tensor: Tensor) -> None: ...


no_record = NoRecord()


NARROW = (torch.bfloat16, torch.float16)


def wide(x: Tensor) -> Tensor:
    """`x` in the format for statistics, exponentials and sums: 16 bits widened to float32, all else as it is."""
    return x.float() if x.dtype in NARROW else x


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Around a calculation: in precision=tf32 a GPU rounds what enters a float32 product to 10 bits of mantissa.

    By the older of PyTorch's two settings: `torch.compile` reads that one, and fails where only the newer one is set.
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
    """`value` as one number in the format and on the device of `like`.

    A number of Python is filled in on the device: `torch.as_tensor` would copy it there from the host, and a GPU's step
    would wait for that. A tensor that lies there already is not copied, so that it may change from step to step where a
    step's calls are recorded.
    """
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), value)


def rows(x: Tensor) -> Tensor:
    """(..., D) -> (N, D): every leading dimension is a batch of independent rows."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
