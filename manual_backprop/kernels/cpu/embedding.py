"""The token embedding, whose backward touches only the rows of tokens in the batch."""

import torch
from torch import Tensor

from ...ops.embedding import TokenEmbeddingCache
from ...ops.numerics import rows, wide
from ..arena import scratch


def token_embedding_backward(dy: Tensor, cache: TokenEmbeddingCache, dweight: Tensor) -> None:
    """dy (B, T, D): adds to dweight (V, D): `ops.token_embedding_backward`.

    Saves a table of zeros (V, D) and two passes over it. For a 16-bit dweight the sums run in float32, in a table with
    a row for each token of the batch if that is smaller than (V, D). The bits of `index_add_` do not depend on the
    number of threads.
    """
    tokens, scale = cache
    token = tokens.reshape(-1)
    dy_rows = rows(dy)
    if dweight.dtype == wide(dy[:0]).dtype:
        dweight.index_add_(0, token, wide(dy_rows), alpha=scale)
        return
    if len(dweight) < len(token):  # the table (V, D) is smaller
        with scratch(tuple(dweight.shape), wide(dy[:0])) as table:
            dweight += table.zero_().index_add_(0, token, wide(dy_rows), alpha=scale)
        return
    place, owner = _groups(token)
    shape = tuple(dy_rows.shape)
    with scratch(shape, wide(dy[:0])) as wide_rows, scratch(shape, wide(dy[:0])) as drows:
        drows.zero_().index_add_(0, place, wide_rows.copy_(dy_rows), alpha=scale)
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
