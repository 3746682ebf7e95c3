"""The token embedding, whose gradient touches the rows of the tokens that are there, and no others."""

import torch
from torch import Tensor

from ...ops.embedding import TokenEmbeddingCache
from ...ops.numerics import rows, wide
from ..arena import scratch


def token_embedding_backward(dy: Tensor, cache: TokenEmbeddingCache, dweight: Tensor) -> None:
    """dy (B, T, D): adds to dweight (V, D): `ops.token_embedding_backward`.

    Saves a table of zeros of (V, D) and two passes over it. A narrow dweight gets sums made in the wide format, of the
    tokens that occur where these are fewer than there are. `index_add_` is bitwise the same with any number of threads.
    """
    tokens, scale = cache
    token = tokens.reshape(-1)
    dy_rows = rows(dy)
    if dweight.dtype == wide(dy[:0]).dtype:
        dweight.index_add_(0, token, wide(dy_rows), alpha=scale)
        return
    if _table_is_smaller(dweight, token):
        with scratch(tuple(dweight.shape), wide(dy[:0])) as table:
            dweight += table.zero_().index_add_(0, token, wide(dy_rows), alpha=scale)
        return
    place, owner = _groups(token)
    shape = tuple(dy_rows.shape)
    with scratch(shape, wide(dy[:0])) as wide_rows, scratch(shape, wide(dy[:0])) as drows:
        drows.zero_().index_add_(0, place, wide_rows.copy_(dy_rows), alpha=scale)
        # a place that no group has belongs to the first group: it writes what that one writes
        there = (place.max() >= torch.arange(len(token), device=token.device))[:, None]
        torch.where(there, drows, drows[:1], out=wide_rows)
        dweight[owner] = wide_rows.add_(dweight[owner]).to(dweight.dtype)


def _table_is_smaller(weight: Tensor, token: Tensor) -> bool:
    """Than a row for each token."""
    return len(weight) < len(token)


def _groups(token: Tensor) -> tuple[Tensor, Tensor]:
    """Equal tokens are a group: each token's group, and each group's token, (N) each. Sizes do not depend on values, so
    that no device is waited for."""
    ordered, order = token.sort()
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    group = starts.cumsum(0) - 1
    place = torch.empty_like(group).scatter_(0, order, group)
    owner = ordered[:1].repeat(len(token)).scatter_(0, group, ordered)
    return place, owner
