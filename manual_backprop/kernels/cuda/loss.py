"""The vocabulary projection and the loss, at least 8,192 rows at a time, so that the full logits are never stored.

The logits of a chunk become their own gradient in place, then give the chunk's part of dx and dW. A chunk is large
because each one reads and writes all of dW. It is not larger, so that the number of its logits stays below 2^31.
"""

from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...common.batch import IGNORED
from ...ops.numerics import Record, no_record, one_number, rows, wide
from ...optim.parameters import PADDING
from ..cpu.loss import losses_and_gradient_by_pytorch_
from ..pieces import RecordedPieces, pieces
from ..sizes import sizes_of
from .chosen import triton_for
from .linear import add_product

LinearCrossEntropyCache = tuple[Any, ...]


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

    x (..., D), weight (V, D), targets (...) -> loss, one number, and dx (..., D), times `dloss`. Without label
    smoothing nothing depends on `padding`. With label smoothing and `padding` the pair of `ops` is called: such
    vocabularies are small.
    """
    weight = weight.to(x.dtype)
    if label_smoothing and padding is not None:
        smoothed = targets, denominator, label_smoothing, padding
        textbook, cache = ops.linear_cross_entropy_forward(x, weight, *smoothed, record=record)
        return textbook, ops.linear_cross_entropy_backward(dloss, cache, dweight, feedback, record=record)
    back = weight if feedback is None else feedback.to(x.dtype)
    vocab_size = weight.shape[0]
    x_rows, target = rows(x), targets.reshape(-1).long()
    if denominator is None:
        denominator = (target != IGNORED).sum()
    share = 1 / one_number(denominator, wide(x_rows[:0])).clamp(min=1)
    scale = share * dloss
    dx, losses, triton = torch.empty_like(x_rows), [], triton_for(x)
    recorded, sizes = RecordedPieces(record, targets.shape), sizes_of(x)
    width = -(-vocab_size // PADDING) * PADDING  # aligned rows of logits make products faster
    for part in pieces(len(x_rows), max(sizes.fewest_rows, sizes.logits // vocab_size)):
        logits = x.new_empty(part.stop - part.start, width)[:, :vocab_size]
        torch.mm(x_rows[part], weight.T, out=logits)
        recorded.put("logits", logits)
        if triton is not None:
            losses.append(triton.cross_entropy_(logits, target[part], scale, label_smoothing))
        else:
            losses.append(losses_and_gradient_by_pytorch_(logits, target[part], label_smoothing))
            logits.mul_(scale)
        recorded.put("dlogits", logits)
        # logits = x W^T
        add_product(dweight, logits.T, x_rows[part])
        torch.mm(logits, back, out=dx[part])
    recorded.finish()
    return torch.cat(losses).sum() * share, dx.view(x.shape)


def linear_cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    denominator: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    padding: int | None = None,
    record: Record = no_record,
) -> tuple[Tensor, LinearCrossEntropyCache]:
    """The pair of `ops`, for a gradient of the loss other than 1."""
    return ops.linear_cross_entropy_forward(
        x, weight.to(x.dtype), targets, denominator, label_smoothing, padding, record
    )


def linear_cross_entropy_backward(
    dloss: float | Tensor,
    cache: LinearCrossEntropyCache,
    dweight: Tensor,
    feedback: Tensor | None = None,
    record: Record = no_record,
) -> Tensor:
    """dloss, one number -> dx (..., D); adds to dweight (V, D)."""
    return ops.linear_cross_entropy_backward(dloss, cache, dweight, feedback, record)
