"""Attention in tiles: a few sequences, a block of queries, and only the keys that these may see.

What is above the diagonal of (T, T) is never computed: the work is T (T + BLOCK) / 2, where one product with a mask
takes T^2. A tile's scores stay in the cache from their product through the softmax to the next product. PyTorch's flash
attention has both as well, in tiles that suit long sequences; on a CPU these products are several times faster at a few
hundred positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops.attention import visible_positions
from ..ops.dropout import Dropout, dropout_backward, dropout_forward
from ..ops.numerics import Record, no_record
from .arena import kept

BLOCK = 128  # queries of a tile
TILE = 1 << 20  # scores of a tile, about: they fit into a core's cache
LONGEST_KEPT = 256  # positions: of longer sequences probabilities are computed again in backward, their size is T^2

AttentionCache = tuple[Tensor, list[Tensor], Tensor, Dropout | None, int]


def attention_forward(
    qkv: Tensor,
    n_heads: int,
    segments: Tensor | None = None,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> tuple[Tensor, AttentionCache]:
    """context = dropout(softmax(mask(query key^T / sqrt(K)))) value: `ops.attention_forward`.

    qkv (B, T, 3D) -> context (B, T, D). The cache keeps qkv, and the probabilities of short sequences.
    """
    batch, length, width = qkv.shape
    context = qkv.new_empty(batch, length, n_heads, width // (3 * n_heads))
    hidden = _hidden(length, segments, dropout, qkv)
    keep = length <= LONGEST_KEPT
    cache: AttentionCache = qkv, [], hidden, dropout, n_heads
    squares = _Squares(record, qkv, n_heads)
    for sequences, query, key, value in _sequences(qkv, n_heads, dropout):
        for rows in _row_blocks(length, dropout):
            shape = *query.shape[:2], rows.stop - rows.start, rows.stop
            probabilities = kept(shape, qkv) if keep else qkv.new_empty(shape)
            _fill(probabilities, query, key, hidden, sequences, rows, squares)
            squares.put("probabilities", sequences, rows, probabilities)
            if keep:
                cache[1].append(probabilities)
            dropped, _ = dropout_forward(probabilities, dropout)
            # (b, H, rows, K) to where the next projection reads it
            context[sequences, rows] = (dropped @ value[:, :, : rows.stop]).transpose(1, 2)
    squares.tell()
    return context.flatten(2), cache


def attention_backward(dcontext: Tensor, cache: AttentionCache, record: Record = no_record) -> Tensor:
    """dcontext (B, T, D) -> dqkv (B, T, 3D): `ops.attention_backward`."""
    qkv, saved, hidden, dropout, n_heads = cache
    length, d_head = qkv.shape[1], qkv.shape[2] // (3 * n_heads)
    dqkv = torch.empty_like(qkv)
    tiles = iter(saved)
    squares = _Squares(record, qkv, n_heads)
    for sequences, query, key, value in _sequences(qkv, n_heads, dropout):
        dcontext_by_head = dcontext[sequences].unflatten(2, (n_heads, d_head)).transpose(1, 2).contiguous()
        dquery, dkey, dvalue = (torch.zeros_like(part) for part in (query, key, value))
        for rows in _row_blocks(length, dropout):
            seen = slice(0, rows.stop)
            if saved:
                probabilities = next(tiles)
            else:
                probabilities = qkv.new_empty(*query.shape[:2], rows.stop - rows.start, rows.stop)
                _fill(probabilities, query, key, hidden, sequences, rows)
            dropped, _ = dropout_forward(probabilities, dropout)
            # context = dropped value
            dupstream = dcontext_by_head[:, :, rows]
            ddropped = dupstream @ value[:, :, seen].mT
            dvalue[:, :, seen] += dropped.mT @ dupstream
            # dropped = dropout(probabilities), probabilities = softmax(scores)
            dprobabilities = dropout_backward(ddropped, dropout)
            squares.put("dprobabilities", sequences, rows, dprobabilities)
            dscores = torch._softmax_backward_data(
                dprobabilities, probabilities, -1, probabilities.dtype, grad_input=dprobabilities
            )
            squares.put("dscores", sequences, rows, dscores)
            # scores = query key^T, and the scale is in the query
            dquery[:, :, rows] = dscores @ key[:, :, seen]
            dkey[:, :, seen] += dscores.mT @ query[:, :, rows]
        by_head = dqkv[sequences].unflatten(2, (3, n_heads, d_head)).permute(2, 0, 3, 1, 4)  # a view
        torch.mul(dquery, 1 / math.sqrt(d_head), out=by_head[0])
        by_head[1], by_head[2] = dkey, dvalue
    squares.tell()
    return dqkv


class _Squares:
    """Puts tiles together to (B, H, T, T), for whoever records them; 0 where there was no tile."""

    def __init__(self, record: Record, qkv: Tensor, n_heads: int):
        self.record, self.like = record, qkv
        self.shape = qkv.shape[0], n_heads, qkv.shape[1], qkv.shape[1]
        self.wholes: dict[str, Tensor] = {}

    def put(self, name: str, sequences: slice, rows: slice, tile: Tensor) -> None:
        if self.record is not no_record:
            whole = self.wholes.setdefault(name, self.like.new_zeros(self.shape))
            whole[sequences, :, rows, : rows.stop] = tile

    def tell(self) -> None:
        for name, whole in self.wholes.items():
            self.record(name, whole)


def _sequences(qkv: Tensor, n_heads: int, dropout: Dropout | None) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Some sequences at a time: which, and their query, scaled, key and value (b, H, T, K), contiguous.

    All at once where dropout is drawn: its mask belongs to the whole tensor.
    """
    batch, length, width = qkv.shape
    d_head = width // (3 * n_heads)
    count = batch if dropout is not None else max(1, TILE // (n_heads * length * min(length, BLOCK)))
    for start in range(0, batch, count):
        sequences = slice(start, min(start + count, batch))
        packed = qkv[sequences].view(-1, length, 3, n_heads, d_head).permute(2, 0, 3, 1, 4).contiguous()
        query, key, value = packed
        yield sequences, query * (1 / math.sqrt(d_head)), key, value  # not in place: `packed` may be qkv itself


def _block_size(length: int, dropout: Dropout | None) -> int:
    """All queries at once where dropout is drawn, as all sequences."""
    return length if dropout is not None else min(length, BLOCK)


def _row_blocks(length: int, dropout: Dropout | None) -> Iterator[slice]:
    size = _block_size(length, dropout)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _fill(
    probabilities: Tensor,
    query: Tensor,
    key: Tensor,
    hidden: Tensor,
    sequences: slice,
    rows: slice,
    squares: _Squares | None = None,
) -> None:
    """probabilities (b, H, rows, columns) = softmax(mask(query key^T))."""
    torch.matmul(query[:, :, rows], key[:, :, : rows.stop].mT, out=probabilities)
    if squares is not None:
        squares.put("scores", sequences, rows, probabilities)
    if hidden.dim() == 2:
        size = rows.stop - rows.start
        probabilities[..., rows] += hidden[:size, :size]
    else:
        probabilities += hidden[sequences, :, rows, : rows.stop]
    torch.softmax(probabilities, -1, out=probabilities)


def _hidden(length: int, segments: Tensor | None, dropout: Dropout | None, qkv: Tensor) -> Tensor:
    """What is added to scores: 0 where a position may look, -inf elsewhere.

    With segments (B, T) for all scores, (B, 1, T, T); without, for a block on the diagonal, which is alike in all.
    """
    if segments is None:
        size = _block_size(length, dropout)
        return torch.full((size, size), -math.inf, dtype=qkv.dtype, device=qkv.device).triu(1)
    visible = visible_positions(length, segments, qkv.device)
    return torch.zeros(visible.shape, dtype=qkv.dtype, device=qkv.device).masked_fill_(~visible, -math.inf)
