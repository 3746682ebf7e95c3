"""The feed-forward network with one kept tensor of its width: the hidden layer before bias and activation.

All other tensors of that width are computed for some rows at a time.
"""

from typing import Any

from torch import Tensor

from ...ops import feed_forward
from ...ops.numerics import Record, no_record, rows
from ..arena import in_place_of, kept, recomputed, saved, scratch
from ..pieces import RecordedPieces, pieces_of
from .activations import ACTIVATIONS
from .products import add_product, add_sum_of_rows, for_products, product

FeedForwardCache = tuple[Any, ...]  # x, hidden weight, hidden, its bias, output weight, activation; or the reference's


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
    if activation not in ACTIVATIONS:  # a user's activation: the textbook pair
        return feed_forward.feed_forward_forward(
            x, hidden_weight, hidden_bias, output_weight, output_bias, activation, record
        )
    activate, _ = ACTIVATIONS[activation]
    hidden_weight, output_weight = for_products(hidden_weight, x.dtype), for_products(output_weight, x.dtype)
    x_rows = rows(x)  # (N, D)
    hidden = kept((x_rows.shape[0], hidden_weight.shape[0]), x)  # (N, F)
    y = kept(tuple(x_rows.shape), x)
    recorded = RecordedPieces(record, x.shape[:-1])
    for part in pieces_of(hidden):
        product(hidden[part], x_rows[part], hidden_weight.T)
        with scratch(tuple(hidden[part].shape), x) as activated:
            activate(activated, hidden[part], hidden_bias)
            recorded.put("activated", activated)
            product(y[part], activated, output_weight.T, output_bias)
    if record.wants("hidden"):
        recorded.put("hidden", hidden + hidden_bias)
    recorded.finish()
    return y.view(x.shape), (saved(x), hidden_weight, hidden, hidden_bias, output_weight, activation)


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
        return feed_forward.feed_forward_backward(dy, cache, *gradients, hidden_feedback, output_feedback, record)
    saved_x, hidden_weight, hidden, hidden_bias, output_weight, activation = cache
    hidden_back = hidden_weight if hidden_feedback is None else for_products(hidden_feedback, dy.dtype)
    output_back = output_weight if output_feedback is None else for_products(output_feedback, dy.dtype)
    x = recomputed(saved_x)
    dx = in_place_of(x)
    _, activate_gradient = ACTIVATIONS[activation]
    x_rows, dy_rows, dx_rows = rows(x), rows(dy), rows(dx)
    add_sum_of_rows(doutput_bias, dy_rows)
    recorded = RecordedPieces(record, x.shape[:-1])
    for part in pieces_of(hidden):
        shape = tuple(hidden[part].shape)
        with scratch(shape, dy) as dhidden, scratch(shape, dy) as activated:
            # y = activated W_output^T + b_output
            product(dhidden, dy_rows[part], output_back)  # dactivated, at first
            recorded.put("dactivated", dhidden)
            # activated = activation(hidden + b_hidden)
            activate_gradient(activated, dhidden, dhidden_bias, hidden[part], hidden_bias)
            recorded.put("dhidden", dhidden)
            add_product(doutput_weight, dy_rows[part].T, activated)
            # hidden = x W_hidden^T
            add_product(dhidden_weight, dhidden.T, x_rows[part])
            product(dx_rows[part], dhidden, hidden_back)
    recorded.finish()
    return dx
