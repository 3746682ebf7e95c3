"""Feed-forward networks whose cache keeps one tensor of width F: the hidden layer before its activation.

Backward recomputes the activated values in the same pass as the gradient. The Triton kernels also add the bias, and sum
its gradient; for PyTorch's kernels the hidden layer already includes the bias.
"""

from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops.numerics import Record, no_record, rows
from .chosen import triton_for
from .linear import add_product

aten = torch.ops.aten

ACTIVATIONS = ("gelu_tanh", "gelu", "relu")
# x, hidden weight, hidden layer, its bias if not added yet, output weight, activation
FeedForwardCache = tuple[Any, ...]
GatedFeedForwardCache = tuple[Tensor, Tensor, Tensor, Tensor]


def activate(hidden: Tensor, activation: str) -> Tensor:
    """hidden (N, F), with its bias -> (N, F), in one launch."""
    if activation == "relu":
        return aten.relu(hidden)
    return aten.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


def activate_gradient(dy: Tensor, hidden: Tensor, activation: str) -> Tensor:
    """dy (N, F) -> dhidden (N, F), in one launch."""
    if activation == "relu":
        return aten.threshold_backward(dy, hidden, 0)
    return aten.gelu_backward(dy, hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


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
    hidden_weight, output_weight = hidden_weight.to(x.dtype), output_weight.to(x.dtype)
    if activation not in ACTIVATIONS:  # a user's activation
        parameters = hidden_weight, hidden_bias, output_weight, output_bias
        return ops.feed_forward_forward(x, *parameters, activation, record)
    bias_apart: Tensor | None = None
    if (triton := triton_for(x)) is not None:
        hidden, bias_apart = rows(x) @ hidden_weight.T, hidden_bias  # (N, F)
        activated = triton.bias_activation(hidden, hidden_bias, activation)
    else:
        hidden = torch.addmm(hidden_bias.to(x.dtype), rows(x), hidden_weight.T)
        activated = activate(hidden, activation)
    y = torch.addmm(output_bias.to(x.dtype), activated, output_weight.T)
    if record.wants("hidden"):
        _record(record, x, hidden=hidden if bias_apart is None else hidden + bias_apart)
    _record(record, x, activated=activated)
    return y.view(x.shape), (x, hidden_weight, hidden, bias_apart, output_weight, activation)


def feed_forward_backward(
    dy: Tensor,
    cache: FeedForwardCache,
    dhidden_weight: Tensor,
    dhidden_bias: Tensor,
    doutput_weight: Tensor,
    doutput_bias: Tensor,
    hidden_feedback: Tensor | None = None,
    output_feedback: Tensor | None = None,
    record: Record = no_record,
) -> Tensor:
    """dy (..., D) -> dx (..., D); adds to the gradients of weights and biases: `ops.feed_forward_backward`."""
    if cache[-1] not in ACTIVATIONS:
        gradients = dhidden_weight, dhidden_bias, doutput_weight, doutput_bias
        return ops.feed_forward_backward(dy, cache, *gradients, hidden_feedback, output_feedback, record)
    x, hidden_weight, hidden, bias_apart, output_weight, activation = cache
    hidden_back = hidden_weight if hidden_feedback is None else hidden_feedback.to(dy.dtype)
    output_back = output_weight if output_feedback is None else output_feedback.to(dy.dtype)
    dy_rows = rows(dy)
    # y = activated W_output^T + b_output
    doutput_bias += dy_rows.sum(0, dtype=doutput_bias.dtype)
    dactivated = dy_rows @ output_back
    # activated = activation(hidden), hidden = x W_hidden^T + b_hidden
    if bias_apart is not None and (triton := triton_for(x)) is not None:
        activated, dhidden = triton.bias_activation_backward(dactivated, hidden, bias_apart, activation, dhidden_bias)
    else:
        activated, dhidden = activate(hidden, activation), activate_gradient(dactivated, hidden, activation)
        dhidden_bias += dhidden.sum(0, dtype=dhidden_bias.dtype)
    add_product(doutput_weight, dy_rows.T, activated)
    add_product(dhidden_weight, dhidden.T, rows(x))
    _record(record, x, dactivated=dactivated, dhidden=dhidden)
    return (dhidden @ hidden_back).view(x.shape)


def gated_feed_forward_forward(
    x: Tensor, gated_weight: Tensor, output_weight: Tensor, record: Record = no_record
) -> tuple[Tensor, GatedFeedForwardCache]:
    """y = (silu(x W_gate^T) * (x W_hidden^T)) W_output^T: `ops.gated_feed_forward_forward`. x, y (..., D)."""
    gated_weight, output_weight = gated_weight.to(x.dtype), output_weight.to(x.dtype)
    gated = rows(x) @ gated_weight.T  # (N, 2F)
    triton = triton_for(x)
    activated = ops.swiglu_forward(gated)[0] if triton is None else triton.swiglu(gated)
    y = activated @ output_weight.T
    _record(record, x, gated=gated, activated=activated)
    return y.view(x.shape), (x, gated_weight, gated, output_weight)


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
    x, gated_weight, gated, output_weight = cache
    gated_back = gated_weight if gated_feedback is None else gated_feedback.to(dy.dtype)
    output_back = output_weight if output_feedback is None else output_feedback.to(dy.dtype)
    dy_rows = rows(dy)
    # y = activated W_output^T
    dactivated = dy_rows @ output_back
    # activated = swiglu(gated)
    if (triton := triton_for(x)) is not None:
        activated, dgated = triton.swiglu_backward(dactivated, gated)
    else:
        activated, swiglu_cache = ops.swiglu_forward(gated)
        dgated = ops.swiglu_backward(dactivated, swiglu_cache)
    add_product(doutput_weight, dy_rows.T, activated)
    # gated = x W_gated^T
    add_product(dgated_weight, dgated.T, rows(x))
    _record(record, x, dactivated=dactivated, dgated=dgated)
    return (dgated @ gated_back).view(x.shape)


def _record(record: Record, x: Tensor, **tensors: Tensor) -> None:
    """(N, F) each, as (..., F)."""
    for name, tensor in tensors.items():
        if record.wants(name):
            record(name, tensor.view(*x.shape[:-1], -1))
