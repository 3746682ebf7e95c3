"""One vector of a whole sequence: the mean over its real positions, or its first position."""

import torch
from torch import Tensor

MeanPoolingCache = tuple[Tensor, Tensor]
FirstPositionCache = torch.Size


def mean_pooling_forward(x: Tensor, lengths: Tensor) -> tuple[Tensor, MeanPoolingCache]:
    """y_b = sum over t < lengths_b of x_bt / lengths_b.

    x (B, T, D), lengths (B) of integers up to T -> y (B, D); 0 for an empty sequence. Padded positions may hold
    anything, also NaN. Each real position gets the same share of the gradient, a padded one gets 0:
        dx_bt = dy_b / lengths_b for t < lengths_b, else 0

    >>> x = torch.tensor([[[1.0], [3.0], [torch.nan]]])
    >>> y, cache = mean_pooling_forward(x, lengths=torch.tensor([2]))
    >>> y, mean_pooling_backward(torch.ones(1, 1), cache).flatten()
    (tensor([[2.]]), tensor([0.5000, 0.5000, 0.0000]))
    """
    real = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]  # (B, T, 1)
    count = lengths.clamp(min=1)[:, None].to(x.dtype)  # (B, 1)
    y = torch.where(real, x, 0).sum(1) / count
    return y, (real, count)


def mean_pooling_backward(dy: Tensor, cache: MeanPoolingCache) -> Tensor:
    """dy (B, D) -> dx (B, T, D)."""
    real, count = cache
    # y = sum(where(real, x, 0)) / count
    return torch.where(real, (dy / count)[:, None], 0)


def first_position_forward(x: Tensor) -> tuple[Tensor, FirstPositionCache]:
    """y_b = x_b0. x (B, T, D) -> y (B, D). All positions but the first get no gradient.

    >>> y, cache = first_position_forward(torch.tensor([[[1.0], [3.0]]]))
    >>> y, first_position_backward(torch.ones(1, 1), cache).flatten()
    (tensor([[1.]]), tensor([1., 0.]))
    """
    return x[:, 0].clone(), x.shape


def first_position_backward(dy: Tensor, cache: FirstPositionCache) -> Tensor:
    """dy (B, D) -> dx (B, T, D)."""
    shape = cache
    dx = dy.new_zeros(shape)
    # y = x[:, 0]
    dx[:, 0] = dy
    return dx
