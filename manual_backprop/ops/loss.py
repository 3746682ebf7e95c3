"""The losses: cross-entropy of the next token, and squared error. Every backward pass starts here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.batch import IGNORED
from .linear import LinearCache, linear_backward, linear_forward
from .numerics import Record, no_record, one_number, rows, wide

# logits, logsumexp, targets, denominator, smoothing, padding
CrossEntropyCache = tuple[Tensor, Tensor, Tensor, Tensor, float, int | None]
LinearCrossEntropyCache = tuple[LinearCache, CrossEntropyCache]


def cross_entropy_forward(
    logits: Tensor,
    targets: Tensor,
    denominator: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    padding: int | None = None,
) -> tuple[Tensor, CrossEntropyCache]:
    """loss = sum over the targets that count of (logsumexp(z) - sum_v q_v z_v) / denominator.

    logits (..., V), targets (...) of integers in [0, V), or -100 where they do not count -> loss, one number.
    q is the target distribution: 1 - s on the target plus s / V on every token, with s = `label_smoothing` (Szegedy et
    al. 2016, section 7). `padding` is a token that is never a target: it gets 0, and every other token s / (V - 1).
    The denominator is the number of targets that count in the whole optimizer step (None: in this call), so that the
    losses of the pieces of a batch add up to its loss. Where no target counts, loss and gradients are 0.

    With p = softmax(z), d logsumexp(z) / dz = p and sum_v q_v = 1, so for each row that counts
        dz = dloss (p - q) / denominator
    The cache keeps the logits and one number a row; backward computes p = exp(z - logsumexp(z)).

    >>> loss, cache = cross_entropy_forward(torch.zeros(2, 2), torch.tensor([0, -100]))
    >>> loss, cross_entropy_backward(1.0, cache)
    (tensor(0.6931), tensor([[-0.5000,  0.5000], [ 0.0000,  0.0000]]))
    """
    z, target = rows(logits), targets.reshape(-1)  # (N, V), (N)
    counts = target != IGNORED
    if denominator is None:
        denominator = counts.sum()
    z_wide = wide(z)
    denominator = one_number(denominator, z_wide).clamp(min=1)
    logsumexp = z_wide.logsumexp(-1)  # (N)
    expected = (1 - label_smoothing) * z_wide.gather(1, target.clamp(min=0)[:, None])[:, 0]
    if label_smoothing:
        smoothed = z_wide.sum(-1) if padding is None else z_wide.sum(-1) - z_wide[:, padding]
        expected = expected + label_smoothing / (z.shape[1] - (padding is not None)) * smoothed
    loss = torch.where(counts, logsumexp - expected, 0).sum() / denominator
    return loss, (logits, logsumexp, targets, denominator, label_smoothing, padding)


def cross_entropy_backward(dloss: float | Tensor, cache: CrossEntropyCache) -> Tensor:
    """dloss, one number -> dlogits (..., V)."""
    logits, logsumexp, targets, denominator, label_smoothing, padding = cache
    z, target = rows(logits), targets.reshape(-1)
    counts = (target != IGNORED)[:, None]  # (N, 1)
    # loss = (logsumexp(z) - sum_v q_v z_v) / denominator
    dz = (wide(z) - logsumexp[:, None]).exp_()  # p
    if label_smoothing:
        share = label_smoothing / (z.shape[1] - (padding is not None))
        dz -= share
        if padding is not None:
            dz[:, padding] += share
    on_target = target.clamp(min=0)[:, None]
    dz.scatter_add_(1, on_target, torch.full_like(on_target, label_smoothing - 1, dtype=dz.dtype))  # p - q
    dz *= dloss / denominator
    dz.masked_fill_(~counts, 0)  # a product with 0 would keep the NaN that an ignored row may hold
    return dz.to(logits.dtype).view(logits.shape)


def linear_cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    denominator: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    padding: int | None = None,
    record: Record = no_record,
) -> tuple[Tensor, LinearCrossEntropyCache]:
    """loss = cross_entropy(x W^T, targets): the vocabulary projection and the loss in one pair.

    x (..., D), weight (V, D), targets (...) -> loss, one number. It is one pair because the logits are the largest
    tensor of a step: a fast version never stores all of them.

    >>> loss, cache = linear_cross_entropy_forward(torch.tensor([[2.0, 2.0]]), torch.eye(2), torch.tensor([0]))
    >>> dweight = torch.zeros(2, 2)
    >>> loss, linear_cross_entropy_backward(1.0, cache, dweight), dweight
    (tensor(0.6931), tensor([[-0.5000,  0.5000]]), tensor([[-1., -1.], [ 1.,  1.]]))
    """
    logits, linear_cache = linear_forward(x, weight)  # (..., V)
    loss, loss_cache = cross_entropy_forward(logits, targets, denominator, label_smoothing, padding)
    record("logits", logits)
    return loss, (linear_cache, loss_cache)


def linear_cross_entropy_backward(
    dloss: float | Tensor,
    cache: LinearCrossEntropyCache,
    dweight: Tensor,
    feedback: Tensor | None = None,
    record: Record = no_record,
) -> Tensor:
    """dloss, one number -> dx (..., D), through `feedback` as in `linear_backward`; adds to dweight (V, D)."""
    linear_cache, loss_cache = cache
    # loss = cross_entropy(logits, targets)
    dlogits = cross_entropy_backward(dloss, loss_cache)
    record("dlogits", dlogits)
    # logits = x W^T
    return linear_backward(dlogits, linear_cache, dweight, feedback=feedback)


SquaredErrorCache = tuple[Tensor, Tensor, Tensor]


def squared_error_forward(
    outputs: Tensor, targets: Tensor, denominator: int | Tensor | None = None
) -> tuple[Tensor, SquaredErrorCache]:
    """loss = sum over the targets that count of (y - t)^2 / denominator: the mean squared error.

    outputs y, targets t (..., n); a target of NaN does not count -> loss, one number. The denominator is the number of
    targets that count in the whole optimizer step (of this call where None), as in `cross_entropy_forward`.
        dy = dloss 2 (y - t) / denominator

    >>> loss, cache = squared_error_forward(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, torch.nan]]))
    >>> loss, squared_error_backward(1.0, cache)
    (tensor(1.), tensor([[2., 0.]]))
    """
    y, t = wide(outputs), wide(targets)
    counts = ~t.isnan()
    if denominator is None:
        denominator = counts.sum()
    denominator = one_number(denominator, y).clamp(min=1)
    difference = torch.where(counts, y - t, 0)  # not a product with 0: an ignored output may be NaN
    return difference.square().sum() / denominator, (outputs, difference, denominator)


def squared_error_backward(dloss: float | Tensor, cache: SquaredErrorCache) -> Tensor:
    """dloss, one number -> doutputs (..., n)."""
    outputs, difference, denominator = cache
    # loss = sum((y - t)^2) / denominator
    return (difference * (2 * dloss / denominator)).to(outputs.dtype)


# Loss functions that users register (`models.extensions`), by name: a network's `head_loss` names one of them

OBJECTIVES: dict[str, tuple[Callable[..., tuple[Tensor, Any]], Callable[[float | Tensor, Any], Tensor]]] = {}
ObjectiveCache = tuple[Tensor, Any, str]


def objective_loss(
    outputs: Tensor, targets: Tensor, denominator: int | Tensor, name: str
) -> tuple[Tensor, ObjectiveCache]:
    """loss = objective(outputs, targets, denominator), with outputs and denominator in float32 or wider."""
    forward, _ = OBJECTIVES[name]
    loss, cache = forward(wide(outputs), targets, one_number(denominator, wide(outputs)))
    return loss, (outputs, cache, name)


def objective_gradient(dloss: float | Tensor, cache: ObjectiveCache) -> Tensor:
    """dloss, one number -> doutputs, of the outputs' shape."""
    outputs, inner, name = cache
    _, backward = OBJECTIVES[name]
    # loss = objective(outputs, targets, denominator)
    return backward(dloss, inner).to(outputs.dtype)
