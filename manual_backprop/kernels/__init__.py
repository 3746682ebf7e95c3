"""The pairs of `manual_backprop.ops` as fast as the machine allows: the same names, signatures, formulas and tests.

`kernels=fused` calls these. A pair without a faster version is that of `ops`. The docstring of each file says what its
pairs save.

A network calls them inside `with step(arena, uses_library, device):` (`arena`, `cpu.products`, `cpu.compiled`). Outside
of it they are ordinary functions: they allocate their memory and run uncompiled.
May import: optim and below.
"""

# ruff: noqa: F401  the names are exported
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from .. import ops
from .arena import Arena
from .cpu.attention import (
    attention_backward,
    attention_forward,
    cross_attention_backward,
    cross_attention_forward,
    self_attention_backward,
    self_attention_forward,
)
from .cpu.compiled import compiled_functions, compiles, compiling_failed
from .cpu.embedding import (
    learned_positions_backward,
    learned_positions_forward,
    token_embedding_backward,
    token_embedding_forward,
)
from .cpu.feed_forward import feed_forward_backward, feed_forward_forward
from .cpu.gated_feed_forward import gated_feed_forward_backward, gated_feed_forward_forward
from .cpu.linear import linear_backward, linear_forward
from .cpu.loss import linear_cross_entropy, linear_cross_entropy_backward, linear_cross_entropy_forward
from .cpu.normalization import (
    layer_norm_backward,
    layer_norm_forward,
    residual_layer_norm_backward,
    residual_layer_norm_forward,
    residual_rms_norm_backward,
    residual_rms_norm_forward,
)
from .cpu.products import fastest_products
from .cpu.rotary_attention import rotary_attention_backward, rotary_attention_forward
from .replay import Replay, is_replayable
from .table import Table


def __getattr__(name: str) -> Any:
    """A pair without a faster version: that of `ops`."""
    if name in ops.__all__:
        return getattr(ops, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@contextmanager
def fast(uses_library: bool, device: torch.device) -> Iterator[None]:
    """A context with PyTorch's fastest matrix products, and with `uses_library` the compiled library."""
    with fastest_products() if device.type == "cpu" else nullcontext(), compiled_functions(uses_library):
        yield


@contextmanager
def step(arena: Arena, uses_library: bool, device: torch.device) -> Iterator[None]:
    """The context of a training step, forward and backward: `fast`, and memory from the arena."""
    with arena.step(), fast(uses_library, device):
        yield
