"""The vocabulary projection and the loss, a few rows at a time, so that the full logits are never stored.

The logits of a chunk give its loss, then become their own gradient in place, then give the chunk's part of dx and dW.
So the forward pass computes the gradient while the chunk is in the processor's cache, and the largest tensor of a step
shrinks from (N, V) to a chunk.

The compiled version computes one exponential for each logit, e = exp(z - max(z)), with softmax(z) = e / sum(e). The sum
is one number a row, so the rows of x (for dW) and of dx are divided by it instead of the logits.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...common.batch import IGNORED
from ...ops.numerics import NARROW, Record, no_record, one_number, rows, wide
from ...optim.parameters import PADDING
from ..arena import in_place_of, scratch
from ..pieces import RecordedPieces, pieces
from ..sizes import Sizes, sizes_of
from .products import add_product, for_products, product
from .rowwise import cross_entropy_of_rows, scale_rows, sum_of_numbers

LinearCrossEntropyCache = tuple[Tensor, Tensor, tuple[Any, ...]]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    denominator: int | Tensor | None,
    label_smoothing: float,
    dweight: Tensor,
    feedback: Tensor | None = None,
    padding: int | None = None,
    dloss: float | Tensor = 1.0,
    record: Record = no_record,
) -> tuple[Tensor, Tensor]:
    """`ops.linear_cross_entropy_forward` and `_backward` at once: loss and dx; adds to dweight.

    x (..., D), weight (V, D), targets (...), dloss, one number -> loss, one number, and dx (..., D). Without label
    smoothing nothing depends on `padding`. With label smoothing and `padding` the textbook pair is called: such
    vocabularies are small.
    """
    if label_smoothing and padding is not None:
        smoothed = targets, denominator, label_smoothing, padding
        textbook, cache = ops.linear_cross_entropy_forward(x, weight.to(x.dtype), *smoothed, record=record)
        return textbook, ops.linear_cross_entropy_backward(dloss, cache, dweight, feedback, record=record)
    weight = for_products(weight, x.dtype)
    back = weight if feedback is None else for_products(feedback, x.dtype)
    vocab_size = weight.shape[0]
    x_rows, target = rows(x), targets.reshape(-1).long()
    if denominator is None:
        denominator = (target != IGNORED).sum()
    dx = in_place_of(x_rows)
    losses, scale = wide(x_rows[:0]).new_empty(2, len(x_rows))
    recorded = RecordedPieces(record, targets.shape)
    sizes = sizes_of(x)
    width = _width(vocab_size, label_smoothing, sizes)
    for part in pieces(len(x_rows), _rows_at_once(x, vocab_size, sizes), x):
        n_rows = part.stop - part.start
        with scratch((n_rows, width), x) as padded, scratch((n_rows, x_rows.shape[1]), x) as scaled:
            logits = padded[:, :vocab_size]
            product(logits, x_rows[part], weight.T)
            recorded.put("logits", logits)
            if width != vocab_size:
                padded[:, vocab_size:].fill_(-math.inf)
            of_rows = losses[part], scale[part], target[part]
            _loss_and_gradient_(padded, *of_rows, denominator, dloss, label_smoothing)
            if record.wants("dlogits"):
                recorded.put("dlogits", (logits * scale[part, None]).to(x.dtype))
            # logits = x W^T
            scale_rows(scaled, x_rows[part], scale[part])
            add_product(dweight, logits.T, scaled)
            product(dx[part], logits, back)
            scale_rows(dx[part], dx[part], scale[part])
    recorded.finish()
    loss = losses.new_empty(())
    sum_of_numbers(loss, losses)
    return loss, dx.view(x.shape)


def _rows_at_once(x: Tensor, vocab_size: int, sizes: Sizes) -> int:
    """The rows of a chunk: few enough that its logits stay in the cache, but enough for efficient products; 16-bit
    products need more."""
    return max(sizes.fewest_rows * (2 if x.dtype == torch.bfloat16 else 1), sizes.logits // vocab_size)


def _width(vocab_size: int, label_smoothing: float, sizes: Sizes) -> int:
    """The columns of a chunk: V and some columns of -inf, whose exponential is 0, so that rows start at a cache line
    and products are faster.

    None are added if the vocabulary is small, or with label smoothing, where every column has a share of the target.
    """
    return vocab_size if label_smoothing or vocab_size < sizes.large_vocabulary else -(-vocab_size // PADDING) * PADDING


def _loss_and_gradient_(
    logits: Tensor,
    losses: Tensor,
    scale: Tensor,
    target: Tensor,
    denominator: int | Tensor,
    dloss: float | Tensor,
    label_smoothing: float,
) -> None:
    """Writes the losses (R) and scale (R). `logits` are overwritten: scale times a row is its gradient. All are 0 in
    rows that do not count.

    logits (R, V), or without label smoothing with more columns, of -inf.
    """
    if cross_entropy_of_rows.compiles(logits, losses, scale, target):
        cross_entropy_of_rows(logits, losses, scale, target, denominator, dloss, label_smoothing)
        return
    share = one_number(denominator, losses).clamp(min=1).reciprocal()
    torch.mul(losses_and_gradient_by_pytorch_(logits, target, label_smoothing), share, out=losses)
    scale.copy_(share * dloss)


def losses_and_gradient_by_pytorch_(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """The chunk's losses (R); `logits` (R, V) become softmax - q."""
    if logits.dtype in NARROW:
        with scratch(tuple(logits.shape), wide(logits[:0])) as wide_logits:
            wide_logits.copy_(logits)
            losses = losses_and_gradient_by_pytorch_(wide_logits, target, label_smoothing)
            logits.copy_(wide_logits)
            return losses
    on_target, counts = target.clamp(min=0)[:, None], target != IGNORED
    largest, place = logits.max(-1, keepdim=True)  # (R, 1)
    expected = (1 - label_smoothing) * logits.gather(1, on_target)
    if label_smoothing:
        expected += label_smoothing * logits.mean(-1, keepdim=True)
    p = torch.softmax(logits, -1, out=logits)
    # softmax = exp(z - logsumexp), read at its largest entry, which is never 0
    logsumexp = largest - p.gather(1, place).log()
    losses = torch.where(counts, (logsumexp - expected)[:, 0], 0)
    if label_smoothing:
        p -= label_smoothing / p.shape[1]
    p.scatter_add_(1, on_target, torch.full_like(expected, label_smoothing - 1))
    p.masked_fill_(~counts[:, None], 0)  # a product with 0 would keep the NaN that an ignored row may hold
    return losses


def linear_cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    denominator: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    padding: int | None = None,
    record: Record = no_record,
) -> tuple[Tensor, LinearCrossEntropyCache]:
    """`linear_cross_entropy` as a pair, for a gradient of the loss other than 1."""
    dweight = torch.zeros_like(weight)
    inputs = x.clone(), weight, targets, denominator, label_smoothing, padding  # x itself becomes dx
    settings = targets, denominator, label_smoothing
    loss, dx = linear_cross_entropy(x, weight, *settings, dweight, padding=padding, record=record)
    return loss, (dx, dweight, inputs)


def linear_cross_entropy_backward(
    dloss: float | Tensor,
    cache: LinearCrossEntropyCache,
    dweight: Tensor,
    feedback: Tensor | None = None,
    record: Record = no_record,
) -> Tensor:
    """dloss, one number -> dx (..., D); adds to dweight (V, D)."""
    dx, dweight_of_one, inputs = cache
    dweight += dloss * dweight_of_one
    if feedback is not None:  # the forward computed dx with the weight itself: compute it again
        x, weight, targets, denominator, label_smoothing, padding = inputs
        once_more = torch.zeros_like(dweight)
        _, dx = linear_cross_entropy(x, weight, targets, denominator, label_smoothing, once_more, feedback, padding)
    return dx * dloss
