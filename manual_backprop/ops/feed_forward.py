"""The position-wise feed-forward network (Vaswani et al. 2017, section 3.3)."""

from __future__ import annotations

from torch import Tensor

from .activations import ELEMENTWISE, bias_gelu_backward, bias_gelu_forward
from .linear import LinearCache, linear_backward, linear_forward
from .numerics import Record, no_record

FeedForwardCache = tuple[LinearCache, tuple, LinearCache, str]


def feed_forward_forward(
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    activation: str = "gelu_tanh",
    record: Record = no_record,
) -> tuple[Tensor, FeedForwardCache]:
    """y = activation(x W_hidden^T + b_hidden) W_output^T + b_output.

    x (..., D), hidden_weight (F, D), hidden_bias (F), output_weight (D, F), output_bias (D) -> y (..., D).
    `activation` is gelu_tanh, gelu or a key of ELEMENTWISE. Backward calls the backwards of its pairs, last to first.

    >>> x, output_weight = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 3.0], [4.0, 5.0]])
    >>> y, cache = feed_forward_forward(x, torch.eye(2), torch.zeros(2), output_weight, torch.zeros(2), "relu")
    >>> gradients = torch.zeros(2, 2), torch.zeros(2), torch.zeros(2, 2), torch.zeros(2)
    >>> y, feed_forward_backward(torch.ones(1, 2), cache, *gradients)
    (tensor([[2., 4.]]), tensor([[6., 0.]]))
    """
    activation_cache: tuple
    if activation in ELEMENTWISE:
        activation_forward, _ = ELEMENTWISE[activation]
        hidden, hidden_cache = linear_forward(x, hidden_weight, hidden_bias)
        activated, activation_cache = activation_forward(hidden)
    else:
        hidden, hidden_cache = linear_forward(x, hidden_weight)
        tanh = {"gelu_tanh": True, "gelu": False}[activation]
        activated, activation_cache = bias_gelu_forward(hidden, hidden_bias, tanh)
    y, output_cache = linear_forward(activated, output_weight, output_bias)
    if record.wants("hidden"):
        record("hidden", hidden if activation in ELEMENTWISE else hidden + hidden_bias)
    record("activated", activated)
    return y, (hidden_cache, activation_cache, output_cache, activation)


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
    """dy (..., D) -> dx (..., D); adds to the gradients of both weights and biases.

    The feedbacks are the weights that gradients go through, as in `linear_backward`.
    """
    hidden_cache, activation_cache, output_cache, activation = cache
    # y = activated W_output^T + b_output
    dactivated = linear_backward(dy, output_cache, doutput_weight, doutput_bias, output_feedback)
    record("dactivated", dactivated)
    if activation in ELEMENTWISE:
        _, activation_backward = ELEMENTWISE[activation]
        # activated = activation(hidden), hidden = x W_hidden^T + b_hidden
        dhidden = activation_backward(dactivated, activation_cache)
        record("dhidden", dhidden)
        return linear_backward(dhidden, hidden_cache, dhidden_weight, dhidden_bias, hidden_feedback)
    # activated = gelu(hidden + b_hidden), hidden = x W_hidden^T
    dhidden = bias_gelu_backward(dactivated, activation_cache, dhidden_bias)
    record("dhidden", dhidden)
    return linear_backward(dhidden, hidden_cache, dhidden_weight, feedback=hidden_feedback)
