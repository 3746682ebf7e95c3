"""The gated feed-forward network. It keeps gate and hidden layer, and SwiGLU takes one pass forward and one
backward."""

import torch
from torch import Tensor

from ...ops.numerics import Record, no_record, rows, wide
from ..arena import Recomputable, in_place_of, kept, recomputed, saved, scratch
from ..pieces import RecordedPieces, pieces_of
from .activations import gate_and_rest
from .compiled import compiled
from .products import add_product, for_products, product

GatedFeedForwardCache = tuple[Recomputable, Tensor, Tensor, Tensor]


@compiled("N F", "N 2F", by_rows=True)
def swiglu(y: Tensor, x: Tensor) -> None:
    """y = silu(gate) * hidden. x (N, 2F) -> y (N, F): `ops.swiglu_forward`."""
    width = y.shape[1]
    gate, hidden = wide(x[:, :width]), wide(x[:, width:])
    y.copy_(gate * torch.sigmoid(gate) * hidden)


@compiled("N F", "N 2F", "N F", "N 2F", by_rows=True)
def swiglu_gradient(y: Tensor, dx: Tensor, dy: Tensor, x: Tensor) -> None:
    """Recomputes y = silu(gate) * hidden, (N, F); from dy (N, F), dx (N, 2F) = dgate and dhidden side by side:
    `ops.swiglu_backward`."""
    width = y.shape[1]
    gate, hidden, upstream = wide(x[:, :width]), wide(x[:, width:]), wide(dy)
    opening, rest = gate_and_rest(gate)
    silu = gate * opening
    y.copy_(silu * hidden)
    dx[:, :width].copy_(upstream * hidden * opening * (1 + gate * rest))
    dx[:, width:].copy_(upstream * silu)


def gated_feed_forward_forward(
    x: Tensor, gated_weight: Tensor, output_weight: Tensor, record: Record = no_record
) -> tuple[Tensor, GatedFeedForwardCache]:
    """y = (silu(x W_gate^T) * (x W_hidden^T)) W_output^T: `ops.gated_feed_forward_forward`. x, y (..., D)."""
    gated_weight, output_weight = for_products(gated_weight, x.dtype), for_products(output_weight, x.dtype)
    x_rows = rows(x)  # (N, D)
    gated = kept((x_rows.shape[0], gated_weight.shape[0]), x)  # (N, 2F)
    y = kept(tuple(x_rows.shape), x)
    recorded = RecordedPieces(record, x.shape[:-1])
    for part in pieces_of(gated):
        product(gated[part], x_rows[part], gated_weight.T)
        with scratch((part.stop - part.start, gated.shape[1] // 2), x) as activated:
            swiglu(activated, gated[part])
            recorded.put("activated", activated)
            product(y[part], activated, output_weight.T)
    recorded.put("gated", gated)
    recorded.finish()
    return y.view(x.shape), (saved(x), gated_weight, gated, output_weight)


def gated_feed_forward_backward(
    dy: Tensor,
    cache: GatedFeedForwardCache,
    dgated_weight: Tensor,
    doutput_weight: Tensor,
    gated_feedback: Tensor | None = None,
    output_feedback: Tensor | None = None,
    record: Record = no_record,
) -> Tensor:
    """dy (..., D) -> dx (..., D); adds to the gradients of both weights: `ops.gated_feed_forward_backward`."""
    saved_x, gated_weight, gated, output_weight = cache
    gated_back = gated_weight if gated_feedback is None else for_products(gated_feedback, dy.dtype)
    output_back = output_weight if output_feedback is None else for_products(output_feedback, dy.dtype)
    x = recomputed(saved_x)
    dx = in_place_of(x)
    x_rows, dy_rows, dx_rows = rows(x), rows(dy), rows(dx)
    recorded = RecordedPieces(record, x.shape[:-1])
    for part in pieces_of(gated):
        wide_shape = tuple(gated[part].shape)
        shape = wide_shape[0], wide_shape[1] // 2
        with scratch(wide_shape, dy) as dgated, scratch(shape, dy) as dactivated, scratch(shape, dy) as activated:
            # y = activated W_output^T
            product(dactivated, dy_rows[part], output_back)
            recorded.put("dactivated", dactivated)
            # activated = swiglu(gated)
            swiglu_gradient(activated, dgated, dactivated, gated[part])
            recorded.put("dgated", dgated)
            add_product(doutput_weight, dy_rows[part].T, activated)
            # gated = x W_gated^T
            add_product(dgated_weight, dgated.T, x_rows[part])
            product(dx_rows[part], dgated, gated_back)
    recorded.finish()
    return dx
