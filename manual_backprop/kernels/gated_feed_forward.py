"""The gated feed-forward network, of which gate and hidden layer are kept; one pass each way for SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.numerics import Record, no_record, rows, wide
from .arena import kept, scratch
from .compiled import elementwise
from .products import add_product

GatedFeedForwardCache = tuple[Tensor, Tensor, Tensor, Tensor]


@elementwise
def swiglu(y: Tensor, x: Tensor) -> None:
    """y = silu(gate) * hidden. x (N, 2F) -> y (N, F): `ops.swiglu_forward`."""
    gate, hidden = wide(x).chunk(2, dim=-1)
    y.copy_(gate * torch.sigmoid(gate) * hidden)


@elementwise
def swiglu_gradient(y: Tensor, dx: Tensor, dy: Tensor, x: Tensor) -> None:
    """y = silu(gate) * hidden once more, and dx (N, 2F) from dy (N, F): `ops.swiglu_backward`."""
    gate, hidden = wide(x).chunk(2, dim=-1)
    dgate, dhidden = dx.chunk(2, dim=-1)
    opening, rest = torch.sigmoid(gate), torch.sigmoid(-gate)
    silu = gate * opening
    y.copy_(silu * hidden)
    dgate.copy_(wide(dy) * hidden * opening * (1 + gate * rest))
    dhidden.copy_(wide(dy) * silu)


def gated_feed_forward_forward(
    x: Tensor, gated_weight: Tensor, output_weight: Tensor, record: Record = no_record
) -> tuple[Tensor, GatedFeedForwardCache]:
    """y = (silu(x W_gate^T) * (x W_hidden^T)) W_output^T: `ops.gated_feed_forward_forward`. x, y (..., D)."""
    gated_weight, output_weight = gated_weight.to(x.dtype), output_weight.to(x.dtype)
    x_rows = rows(x)  # (N, D)
    gated = kept((x_rows.shape[0], gated_weight.shape[0]), x)  # (N, 2F)
    torch.mm(x_rows, gated_weight.T, out=gated)
    with scratch((gated.shape[0], gated.shape[1] // 2), x) as activated:
        swiglu(activated, gated)
        y = activated @ output_weight.T
        record("gated", gated.unflatten(0, x.shape[:-1]))
        record("activated", activated.unflatten(0, x.shape[:-1]))
    return y.view(x.shape), (x, gated_weight, gated, output_weight)


def gated_feed_forward_backward(
    dy: Tensor,
    cache: GatedFeedForwardCache,
    dgated_weight: Tensor,
    doutput_weight: Tensor,
    record: Record = no_record,
) -> Tensor:
    """dy (..., D) -> dx (..., D); adds to the gradients of both weights: `ops.gated_feed_forward_backward`."""
    x, gated_weight, gated, output_weight = cache
    dy_rows = rows(dy)
    shape = gated.shape[0], gated.shape[1] // 2
    with scratch(tuple(gated.shape), dy) as dgated:
        with scratch(shape, dy) as dactivated, scratch(shape, dy) as activated:
            # y = activated W_output^T
            torch.mm(dy_rows, output_weight, out=dactivated)
            record("dactivated", dactivated.unflatten(0, x.shape[:-1]))
            # activated = swiglu(gated)
            swiglu_gradient(activated, dgated, dactivated, gated)
            add_product(doutput_weight, dy_rows.T, activated)
        record("dgated", dgated.unflatten(0, x.shape[:-1]))
        # gated = x W_gated^T
        add_product(dgated_weight, dgated.T, rows(x))
        return (dgated @ gated_weight).view(x.shape)
