"""Decides whether Triton kernels are used: if kernels.compile allows it, and Triton is installed and works here."""

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ...common.errors import first_line
from ..cpu.compiled import library_is_wanted
from . import triton

log = logging.getLogger(__name__)

FORMATS = (torch.float32, torch.bfloat16, torch.float16)


def triton_for(x: Tensor) -> Any | None:
    """The module with the Triton kernels if they are used for tensors like x, else None."""
    if not library_is_wanted() or x.dtype not in FORMATS or not triton.installed():
        return None
    return triton if isinstance(x, FakeTensor) or _works(x.device) else None


@functools.cache
def _works(device: torch.device) -> bool:
    """Tried once: Triton wants a C compiler and a GPU that it knows."""
    try:
        triton.gradient_norm(torch.ones(32, device=device))
    except Exception as error:  # a compiler may raise anything
        log.warning("Triton does not work here, so more of a step runs in PyTorch's kernels: %s", first_line(error))
        return False
    return True
