"""The feed-forward network, of which one tensor of its width is kept: the hidden layer before bias and activation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.numerics import Record, no_record, rows
from .activations import ACTIVATIONS
from .arena import kept, scratch
from .products import add_product

FeedForwardCache = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, str]


def feed_forward_forward(
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    activation: str = "gelu_tanh",
    record: Record = no_record,
) -> tuple[Tensor, FeedForwardCache]:
    """y = activation(x W_hidden^T + b_hidden) W_output^T + b_output: `ops.feed_forward_forward`. x, y (..., D)."""
    activate, _ = ACTIVATIONS[activation]
    hidden_weight, output_weight = hidden_weight.to(x.dtype), output_weight.to(x.dtype)
    x_rows = rows(x)  # (N, D)
    hidden = kept((x_rows.shape[0], hidden_weight.shape[0]), x)  # (N, F)
    torch.mm(x_rows, hidden_weight.T, out=hidden)
    with scratch(tuple(hidden.shape), x) as activated:
        activate(activated, hidden, hidden_bias)
        y = torch.addmm(output_bias.to(x.dtype), activated, output_weight.T)
        if record is not no_record:
            record("hidden", (hidden + hidden_bias).unflatten(0, x.shape[:-1]))
        record("activated", activated.unflatten(0, x.shape[:-1]))
    return y.view(x.shape), (x, hidden_weight, hidden, hidden_bias, output_weight, activation)


def feed_forward_backward(
    dy: Tensor,
    cache: FeedForwardCache,
    dhidden_weight: Tensor,
    dhidden_bias: Tensor,
    doutput_weight: Tensor,
    doutput_bias: Tensor,
    record: Record = no_record,
) -> Tensor:
    """dy (..., D) -> dx (..., D); adds to the gradients of weights and biases: `ops.feed_forward_backward`."""
    x, hidden_weight, hidden, hidden_bias, output_weight, activation = cache
    _, activate_gradient = ACTIVATIONS[activation]
    dy_rows = rows(dy)
    shape = tuple(hidden.shape)
    with scratch(shape, dy) as dhidden, scratch(shape, dy) as activated:
        # y = activated W_output^T + b_output
        torch.mm(dy_rows, output_weight, out=dhidden)  # dactivated, at first
        record("dactivated", dhidden.unflatten(0, x.shape[:-1]))
        # activated = activation(hidden + b_hidden)
        activate_gradient(activated, dhidden, hidden, hidden_bias)
        add_product(doutput_weight, dy_rows.T, activated)
        doutput_bias += dy_rows.sum(0, dtype=doutput_bias.dtype)
        record("dhidden", dhidden.unflatten(0, x.shape[:-1]))
        # hidden = x W_hidden^T
        add_product(dhidden_weight, dhidden.T, rows(x))
        dhidden_bias += dhidden.sum(0, dtype=dhidden_bias.dtype)
        return (dhidden @ hidden_weight).view(x.shape)
