"""Embeddings that write into a step's memory. The backward of the token embedding touches only the rows of tokens in
the batch."""

import torch
from torch import Tensor

from ... import ops
from ...ops.embedding import LearnedPositionsCache, TokenEmbeddingCache
from ...ops.numerics import rows, wide
from ..arena import in_place_of, kept, scratch
from .compiled import compiled
from .products import add_sum_of_rows


def token_embedding_forward(tokens: Tensor, weight: Tensor, scale: float = 1.0) -> tuple[Tensor, TokenEmbeddingCache]:
    """tokens (B, T), weight (V, D) -> y (B, T, D): `ops.token_embedding_forward`."""
    y = kept((*tokens.shape, weight.shape[1]), weight)
    rows_of_tokens(rows(y), weight, tokens.reshape(-1).long(), scale)
    return y, (tokens, scale)


@compiled("N D: parameter", "V D: parameter", "N: int64", "float")
def rows_of_tokens(y: Tensor, weight: Tensor, token: Tensor, scale: float) -> None:
    """y (N, D) = scale times the rows of weight (V, D), each of a token (N)."""
    torch.index_select(weight, 0, token, out=y)
    if scale != 1.0:
        y.mul_(scale)


def token_embedding_backward(dy: Tensor, cache: TokenEmbeddingCache, dweight: Tensor) -> None:
    """dy (B, T, D): adds to dweight (V, D): `ops.token_embedding_backward`.

    Saves a table of zeros (V, D) and two passes over it. The bits do not depend on the number of threads.
    """
    tokens, scale = cache
    add_rows_of_tokens(dweight, rows(dy), tokens.reshape(-1).long(), scale)


@compiled("V D: parameter", "N D", "N: int64", "float")
def add_rows_of_tokens(dweight: Tensor, dy: Tensor, token: Tensor, scale: float) -> None:
    """dweight (V, D) += scale times the rows of dy (N, D), each to the row of its token (N).

    For a 16-bit dweight the sums run in float32, in a table with a row for each token of the batch if that is smaller
    than (V, D). The bits of `index_add_` do not depend on the number of threads.
    """
    if dweight.dtype == wide(dy[:0]).dtype:
        dweight.index_add_(0, token, wide(dy), alpha=scale)
        return
    if len(dweight) < len(token):  # the table (V, D) is smaller
        with scratch(tuple(dweight.shape), wide(dy[:0])) as table:
            dweight += table.zero_().index_add_(0, token, wide(dy), alpha=scale)
        return
    place, owner = _groups(token)
    shape = tuple(dy.shape)
    with scratch(shape, wide(dy[:0])) as wide_rows, scratch(shape, wide(dy[:0])) as drows:
        drows.zero_().index_add_(0, place, wide_rows.copy_(dy), alpha=scale)
        # unused rows of the table belong to the first group, and write the same sum as that group
        there = (place.max() >= torch.arange(len(token), device=token.device))[:, None]
        torch.where(there, drows, drows[:1], out=wide_rows)
        dweight[owner] = wide_rows.add_(dweight[owner]).to(dweight.dtype)


def _groups(token: Tensor) -> tuple[Tensor, Tensor]:
    """Groups equal tokens: each token's group, and each group's token, (N) each. The sizes do not depend on the values,
    so the host never waits for the device."""
    ordered, order = token.sort()
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    group = starts.cumsum(0) - 1
    place = torch.empty_like(group).scatter_(0, order, group)
    owner = ordered[:1].repeat(len(token)).scatter_(0, group, ordered)
    return place, owner


def learned_positions_forward(x: Tensor, weight: Tensor) -> tuple[Tensor, LearnedPositionsCache]:
    """x (B, T, D), weight (max_seq_len, D) -> y (B, T, D): `ops.learned_positions_forward`. y overwrites x."""
    y = in_place_of(x)
    add_to_rows(y.flatten(1), x.flatten(1), weight[: x.shape[1]].to(x.dtype).flatten())
    return y, ()


@compiled("R C: parameter", "R C: parameter", "C: parameter")
def add_to_rows(y: Tensor, x: Tensor, row: Tensor) -> None:
    """y (R, C), which may be x, = x + row (C)."""
    torch.add(x, row, out=y)


def learned_positions_backward(dy: Tensor, cache: LearnedPositionsCache, dweight: Tensor) -> Tensor:
    """dy (B, T, D) -> dx (B, T, D); adds to the first T rows of dweight: `ops.learned_positions_backward`."""
    # y = x + P[:T]
    of_positions = dweight[: dy.shape[1]]
    if not of_positions.is_contiguous():
        return ops.learned_positions_backward(dy, cache, dweight)
    add_sum_of_rows(of_positions.view(-1), dy.flatten(1))
    return dy
