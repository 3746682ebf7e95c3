"""Embeddings of tokens and of positions."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import rows, wide

TokenEmbeddingCache = tuple[Tensor, float]
LearnedPositionsCache = tuple[()]
SinusoidalPositionsCache = tuple[()]


def token_embedding_forward(tokens: Tensor, weight: Tensor, scale: float = 1.0) -> tuple[Tensor, TokenEmbeddingCache]:
    """y_bt = scale * W[token_bt]: a row of the table for each token.

    tokens (B, T) of integers in [0, V), weight (V, D) -> y (B, T, D).
    The scale is sqrt(D) in Vaswani et al. 2017, section 3.4, and 1 in GPT-2.

    A row is read once for each occurrence of its token, so its gradient is the sum over these occurrences:
        dW_v = scale * sum over (b, t) with token_bt = v of dy_bt
    Tokens are integers and have no gradient, so backward ends here.

    >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> y, cache = token_embedding_forward(torch.tensor([[1, 1]]), weight)
    >>> dweight = torch.zeros_like(weight)
    >>> token_embedding_backward(torch.ones(1, 2, 2), cache, dweight)
    >>> y, dweight
    (tensor([[[3., 4.], [3., 4.]]]), tensor([[0., 0.], [2., 2.]]))
    """
    y = weight[tokens]  # (B, T, D)
    if scale != 1.0:
        y = y * scale
    return y, (tokens, scale)


def token_embedding_backward(dy: Tensor, cache: TokenEmbeddingCache, dweight: Tensor) -> None:
    """dy (B, T, D): adds to dweight (V, D)."""
    tokens, scale = cache
    # y = scale * W[tokens]. A frequent token sums thousands of rows: sum in float32 or wider, then round once. The bits
    # of index_add_ do not depend on the number of CPU threads; those of an accumulating index_put_ do.
    dy_rows = rows(wide(dy)) * scale
    drows = torch.zeros(dweight.shape, dtype=dy_rows.dtype, device=dy.device)
    drows.index_add_(0, tokens.reshape(-1), dy_rows)
    dweight += drows


def learned_positions_forward(x: Tensor, weight: Tensor) -> tuple[Tensor, LearnedPositionsCache]:
    """y_bt = x_bt + P_t: every position has a trained vector.

    x (B, T, D), weight (max_seq_len, D) with max_seq_len >= T -> y (B, T, D).

    P_t is added in every sequence of the batch, so dP_t = sum_b dy_bt; and dx = dy.

    >>> weight = torch.tensor([[1.0], [2.0], [3.0]])
    >>> y, cache = learned_positions_forward(torch.zeros(4, 2, 1), weight)
    >>> dweight = torch.zeros_like(weight)
    >>> dx = learned_positions_backward(torch.ones(4, 2, 1), cache, dweight)
    >>> y[0].flatten(), dweight.flatten()
    (tensor([1., 2.]), tensor([4., 4., 0.]))
    """
    return x + weight[: x.shape[1]].to(x.dtype), ()


def learned_positions_backward(dy: Tensor, cache: LearnedPositionsCache, dweight: Tensor) -> Tensor:
    """dy (B, T, D) -> dx (B, T, D); adds to the first T rows of dweight (max_seq_len, D)."""
    # y = x + P[:T]
    dweight[: dy.shape[1]] += dy.sum(0, dtype=dweight.dtype)
    return dy


def sinusoids(length: int, d_model: int) -> Tensor:
    """The table of Vaswani et al. 2017, section 3.5, in float64: (length, D), sines in the even columns, cosines in the
    odd ones, with wavelengths from 2 pi to 10000 * 2 pi.

    >>> sinusoids(2, d_model=2).float()
    tensor([[0.0000, 1.0000], [0.8415, 0.5403]])
    """
    place = torch.arange(length, dtype=torch.float64)[:, None]
    even = torch.arange(0, d_model, 2, dtype=torch.float64)
    angle = place * 10000.0 ** (-even / d_model)  # (length, ceil(D / 2))
    table = torch.empty(length, d_model, dtype=torch.float64)
    table[:, 0::2] = angle.sin()
    table[:, 1::2] = angle.cos()[:, : d_model // 2]
    return table


def sinusoidal_positions_forward(x: Tensor, table: Tensor) -> tuple[Tensor, SinusoidalPositionsCache]:
    """y_bt = x_bt + S_t with the fixed table S of `sinusoids`.

    x (B, T, D), table (max_seq_len, D) with max_seq_len >= T -> y (B, T, D). S is a constant, so dx = dy.

    >>> y, cache = sinusoidal_positions_forward(torch.zeros(1, 2, 2), sinusoids(5, d_model=2))
    >>> y, sinusoidal_positions_backward(torch.ones(1, 2, 2), cache).sum()
    (tensor([[[0.0000, 1.0000], [0.8415, 0.5403]]]), tensor(4.))
    """
    return x + table[: x.shape[1]].to(x.dtype), ()


def sinusoidal_positions_backward(dy: Tensor, cache: SinusoidalPositionsCache) -> Tensor:
    """dy (B, T, D) -> dx (B, T, D)."""
    return dy
