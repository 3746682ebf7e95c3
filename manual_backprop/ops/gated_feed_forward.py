"""The feed-forward network with a gate, SwiGLU (Shazeer 2020, equation 6; Touvron et al. 2023, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import LinearCache, linear_backward, linear_forward
from .numerics import Record, no_record, wide

SwigluCache = tuple[Tensor]
GatedFeedForwardCache = tuple[LinearCache, SwigluCache, LinearCache]


def swiglu_forward(x: Tensor) -> tuple[Tensor, SwigluCache]:
    """y = silu(gate) * hidden, with silu(gate) = gate sigmoid(gate); x is gate and hidden side by side.

    x (..., 2F) -> y (..., F). With s = sigmoid(gate) and s' = s (1 - s), the derivative of silu is s + gate s (1 - s),
    so
        dgate = dy hidden s (1 + gate (1 - s))      dhidden = dy silu(gate)

    >>> y, cache = swiglu_forward(torch.tensor([0.0, 100.0, 3.0, 5.0]))  # two gates, then what they let through
    >>> y, swiglu_backward(torch.ones(2), cache)
    (tensor([  0., 500.]), tensor([  1.5000,   5.0000,   0.0000, 100.0000]))
    """
    gate, hidden = wide(x).chunk(2, dim=-1)
    y = gate * gate.sigmoid() * hidden
    return y.to(x.dtype), (x,)


def swiglu_backward(dy: Tensor, cache: SwigluCache) -> Tensor:
    """dy (..., F) -> dx (..., 2F)."""
    (x,) = cache
    dy_wide = wide(dy)
    gate, hidden = wide(x).chunk(2, dim=-1)
    opening, rest = gate.sigmoid(), gate.neg().sigmoid()  # s, and 1 - s without cancellation
    # y = silu(gate) * hidden
    dgate = dy_wide * hidden * opening * (1 + gate * rest)
    dhidden = dy_wide * gate * opening
    return torch.cat((dgate, dhidden), dim=-1).to(x.dtype)


def gated_feed_forward_forward(
    x: Tensor, gated_weight: Tensor, output_weight: Tensor, record: Record = no_record
) -> tuple[Tensor, GatedFeedForwardCache]:
    """y = (silu(x W_gate^T) * (x W_hidden^T)) W_output^T.

    x (..., D), gated_weight (2F, D): W_gate above W_hidden, so that one product serves both; output_weight (D, F)
    -> y (..., D). No biases. Backward calls the backwards of its pairs, last to first.

    >>> gated_weight, output_weight = torch.tensor([[100.0], [3.0]]), torch.tensor([[2.0]])
    >>> y, cache = gated_feed_forward_forward(torch.ones(1, 1), gated_weight, output_weight)
    >>> dgated_weight, doutput_weight = torch.zeros(2, 1), torch.zeros(1, 1)
    >>> y, gated_feed_forward_backward(torch.ones(1, 1), cache, dgated_weight, doutput_weight), doutput_weight
    (tensor([[600.]]), tensor([[1200.]]), tensor([[300.]]))
    """
    gated, gated_cache = linear_forward(x, gated_weight)  # (..., 2F)
    activated, swiglu_cache = swiglu_forward(gated)
    y, output_cache = linear_forward(activated, output_weight)
    record("gated", gated)
    record("activated", activated)
    return y, (gated_cache, swiglu_cache, output_cache)


def gated_feed_forward_backward(
    dy: Tensor,
    cache: GatedFeedForwardCache,
    dgated_weight: Tensor,
    doutput_weight: Tensor,
    gated_feedback: Tensor | None = None,
    output_feedback: Tensor | None = None,
    record: Record = no_record,
) -> Tensor:
    """dy (..., D) -> dx (..., D); adds to the gradients of both weights.

    The feedbacks are the weights that gradients go through, as in `linear_backward`.
    """
    gated_cache, swiglu_cache, output_cache = cache
    # y = activated W_output^T
    dactivated = linear_backward(dy, output_cache, doutput_weight, feedback=output_feedback)
    record("dactivated", dactivated)
    # activated = swiglu(gated)
    dgated = swiglu_backward(dactivated, swiglu_cache)
    record("dgated", dgated)
    # gated = x W_gated^T
    return linear_backward(dgated, gated_cache, dgated_weight, feedback=gated_feedback)
