"""The vocabulary projection and the loss, a few rows at a time: all logits are never there at once.

A chunk's logits become its loss, then their own gradient in place, then its part of dx and dW. So the gradient is made
in the forward pass, while the chunk is in the cache, and the largest tensor of a step shrinks from (N, V) to a chunk.

Of each logit one exponential is made, e = exp(z - max(z)). softmax(z) is e / sum(e), and a sum is one number a row: it
divides what has fewer numbers than the logits, the rows of x that make dW, and those of dx.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.loss import IGNORED
from ..ops.numerics import Record, no_record, rows, wide
from .arena import in_place_of, scratch
from .pieces import Recorded, pieces
from .products import add_product
from .rowwise import cross_entropy_of_rows

SMALLEST_CHUNK = 256  # rows: each chunk reads and writes all of dW
CHUNK = 1 << 22  # logits of a chunk, where the vocabulary is small

LinearCrossEntropyCache = tuple[Tensor, Tensor]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    denominator: int | Tensor | None,
    label_smoothing: float,
    dweight: Tensor,
    record: Record = no_record,
) -> tuple[Tensor, Tensor]:
    """`ops.linear_cross_entropy_forward` and `_backward` at once, for a dloss of 1: loss and dx; adds to dweight.

    x (..., D), weight (V, D), targets (...) -> loss, one number, and dx (..., D).
    """
    weight = weight.to(x.dtype)
    vocab_size = weight.shape[0]
    x_rows, target = rows(x), targets.reshape(-1).long()
    counts = target != IGNORED
    if denominator is None:
        denominator = counts.sum()
    share = 1 / torch.as_tensor(denominator, dtype=wide(x).dtype, device=x.device).clamp(min=1)
    dx = in_place_of(x_rows)
    loss = torch.zeros_like(share)
    recorded = Recorded(record, targets.shape)
    for part in pieces(len(x_rows), max(SMALLEST_CHUNK, CHUNK // vocab_size)):
        with scratch((part.stop - part.start, vocab_size), x) as logits:
            torch.mm(x_rows[part], weight.T, out=logits)
            recorded.put("logits", logits)
            part_loss, scale = _loss_and_gradient_(logits, target[part], counts[part], share, label_smoothing)
            loss += part_loss
            if record is not no_record:
                recorded.put("dlogits", (logits * scale).to(x.dtype))
            # logits = x W^T
            add_product(dweight, logits.T, (x_rows[part] * scale).to(x.dtype))
            torch.mm(logits, weight, out=dx[part])
            dx[part] *= scale
    recorded.tell()
    return loss * share, dx.view(x.shape)


def _loss_and_gradient_(
    logits: Tensor, target: Tensor, counts: Tensor, share: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """The sum of the chunk's losses, and scale (R, 1): `logits` (R, V) become (softmax - q) share / scale."""
    on_target = torch.arange(len(logits), device=logits.device), target.clamp(min=0)
    at_target, count = logits[on_target], counts.to(logits.dtype)
    losses, total = share.new_empty(2, len(logits))
    cross_entropy_of_rows(logits, at_target, losses, total, count, label_smoothing)
    if label_smoothing:
        logits -= label_smoothing / logits.shape[1] * total[:, None]
    logits[on_target] = at_target  # `scatter_` would copy all logits where they are bfloat16
    return losses.sum(), torch.where(counts, share / total, 0)[:, None]


def linear_cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    denominator: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    record: Record = no_record,
) -> tuple[Tensor, LinearCrossEntropyCache]:
    """The two halves of `linear_cross_entropy`, for whoever has another gradient of the loss than 1."""
    dweight = torch.zeros_like(weight)
    loss, dx = linear_cross_entropy(x, weight, targets, denominator, label_smoothing, dweight, record)
    return loss, (dx, dweight)


def linear_cross_entropy_backward(
    dloss: float | Tensor, cache: LinearCrossEntropyCache, dweight: Tensor, record: Record = no_record
) -> Tensor:
    """dloss, one number -> dx (..., D); adds to dweight (V, D)."""
    dx, dweight_of_one = cache
    dweight += dloss * dweight_of_one
    return dx * dloss
