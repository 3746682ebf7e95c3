"""Attention in tiles: a few sequences, a block of queries, and only the keys that these may see.

What is above the diagonal of (T, T) is never computed: the work is T (T + BLOCK) / 2, where one product with a mask
takes T^2. A tile's scores stay in the cache from their product through the softmax to the next product. PyTorch's flash
attention has both as well, in tiles that suit long sequences; on a CPU these products are several times faster at a few
hundred positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ..ops.attention import visible_positions
from ..ops.dropout import Dropout, dropout_backward, dropout_forward
from ..ops.numerics import Record, no_record
from .arena import Held, again, held, in_place_of, kept, scratch
from .pieces import pieces
from .products import matrices, scaled_product

BLOCK = 128  # queries of a tile
TILE = 1 << 20  # scores of a tile, about: they fit into a core's cache
LONGEST_KEPT = 128  # positions: of longer sequences probabilities are computed again in backward, their size is T^2

AttentionCache = tuple[Held, list[list[Tensor]], Tensor, Dropout | None, int]


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
    d_head = width // (3 * n_heads)
    context = kept((batch, length, n_heads, d_head), qkv)
    hidden = _hidden(length, segments, dropout, qkv)
    saved: list[list[Tensor]] = []
    squares = _Squares(record, qkv, n_heads)
    for sequences in _some_sequences(qkv, n_heads, dropout):
        saved.append([])
        with _by_head(qkv[sequences], n_heads) as (query, key, value):
            for rows in pieces(length, _block_size(length, dropout), qkv):
                of_rows = sequences.stop - sequences.start, n_heads, rows.stop - rows.start
                shape = *of_rows, rows.stop
                if length <= LONGEST_KEPT:
                    saved[-1].append(kept(shape, qkv))
                with _tile(saved[-1], -1, shape, qkv) as probabilities, scratch((*of_rows, d_head), qkv) as part:
                    _fill(probabilities, query, key, hidden, sequences, rows, squares)
                    squares.put("probabilities", sequences, rows, probabilities)
                    dropped, _ = dropout_forward(probabilities, dropout)
                    torch.bmm(matrices(dropped), value[:, : rows.stop], out=matrices(part))
                    context[sequences, rows] = part.transpose(1, 2)  # where the next projection reads it
    squares.tell()
    return context.flatten(2), (held(qkv), saved, hidden, dropout, n_heads)


def attention_backward(dcontext: Tensor, cache: AttentionCache, record: Record = no_record) -> Tensor:
    """dcontext (B, T, D) -> dqkv (B, T, 3D): `ops.attention_backward`.

    The blocks of queries are taken from the last, which sees all keys: it writes the sums that the others add to.
    """
    made_from, saved, hidden, dropout, n_heads = cache
    qkv = again(made_from)
    _, length, width = qkv.shape
    d_head = width // (3 * n_heads)
    dqkv = in_place_of(qkv)  # some sequences at a time, of which copies were made
    squares = _Squares(record, qkv, n_heads)
    for sequences, tiles in zip(_some_sequences(qkv, n_heads, dropout), saved, strict=True):
        blocks = list(enumerate(pieces(length, _block_size(length, dropout), qkv)))
        by_head = sequences.stop - sequences.start, n_heads, length, d_head
        with (
            _by_head(qkv[sequences], n_heads) as (query, key, value),
            scratch((3, *by_head), qkv) as dpacked,
            scratch(by_head, qkv) as dcontext_by_head,
        ):
            dquery, dkey, dvalue = dpacked.flatten(1, 2)
            dcontext_by_head.copy_(dcontext[sequences].unflatten(2, (n_heads, d_head)).transpose(1, 2))
            for number, rows in reversed(blocks):
                square = *by_head[:2], rows.stop - rows.start, rows.stop
                with _tile(tiles, number, square, qkv) as probabilities, scratch(square, qkv) as ddropped:
                    if not tiles:
                        _fill(probabilities, query, key, hidden, sequences, rows)
                    dropped, _ = dropout_forward(probabilities, dropout)
                    # context = dropped value
                    dupstream = matrices(dcontext_by_head)[:, rows]
                    torch.bmm(dupstream, value[:, : rows.stop].mT, out=matrices(ddropped))
                    _add_product(dvalue, matrices(dropped).mT, dupstream)
                    # dropped = dropout(probabilities), probabilities = softmax(scores)
                    dprobabilities = dropout_backward(ddropped, dropout)
                    squares.put("dprobabilities", sequences, rows, dprobabilities)
                    dscores = torch._softmax_backward_data(
                        dprobabilities, probabilities, -1, probabilities.dtype, grad_input=dprobabilities
                    )
                    squares.put("dscores", sequences, rows, dscores)
                    # scores = query key^T / sqrt(K)
                    scale = 1 / math.sqrt(d_head)
                    dscores = matrices(dscores)
                    scaled_product(dscores, key[:, : rows.stop], scale, dquery[:, rows])
                    _add_product(dkey, dscores.mT, query[:, rows], scale)
            dqkv[sequences].unflatten(2, (3, n_heads, d_head)).permute(2, 0, 3, 1, 4).copy_(dpacked)
    squares.tell()
    return dqkv


class _Squares:
    """Puts tiles together to (B, H, T, T), for whoever records them; 0 where there was no tile."""

    def __init__(self, record: Record, qkv: Tensor, n_heads: int):
        self.record, self.like = record, qkv
        self.shape = qkv.shape[0], n_heads, qkv.shape[1], qkv.shape[1]
        self.wholes: dict[str, Tensor] = {}

    def put(self, name: str, sequences: slice, rows: slice, tile: Tensor) -> None:
        if self.record.wants(name):
            if name not in self.wholes:
                self.wholes[name] = self.like.new_zeros(self.shape)
            self.wholes[name][sequences, :, rows, : rows.stop] = tile

    def tell(self) -> None:
        for name, whole in self.wholes.items():
            self.record(name, whole)


def _some_sequences(qkv: Tensor, n_heads: int, dropout: Dropout | None) -> Iterator[slice]:
    """At a time: all where dropout is drawn, whose mask belongs to the whole tensor."""
    batch, length, _ = qkv.shape
    at_once = batch if dropout is not None else max(1, TILE // (n_heads * length * min(length, BLOCK)))
    return pieces(batch, at_once, qkv if length > LONGEST_KEPT else None)  # of each the probabilities may be kept


def _block_size(length: int, dropout: Dropout | None) -> int:
    """All queries at once where dropout is drawn, as all sequences."""
    return length if dropout is not None else min(length, BLOCK)


@contextmanager
def _by_head(qkv: Tensor, n_heads: int) -> Iterator[Tensor]:
    """Query, key and value of some sequences, a matrix for each head: (3, b H, T, K)."""
    by_head = qkv.unflatten(2, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)  # a view
    with scratch(tuple(by_head.shape), qkv) as packed:
        packed.copy_(by_head)
        yield packed.flatten(1, 2)


def _tile(saved: list[Tensor], number: int, shape: tuple[int, ...], like: Tensor) -> AbstractContextManager[Tensor]:
    """The probabilities that are kept, or memory to compute them again."""
    return nullcontext(saved[number]) if saved else scratch(shape, like)


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1) -> None:
    """total (b H, T, K) = scale left right where all keys are seen, which is first, and elsewhere += it."""
    seen = left.shape[1]
    if seen == total.shape[1]:
        scaled_product(left, right, scale, total)
        return
    with scratch((total.shape[0], seen, total.shape[2]), total) as part:
        scaled_product(left, right, scale, part)
        total[:, :seen].add_(part)


def _fill(
    probabilities: Tensor,
    query: Tensor,
    key: Tensor,
    hidden: Tensor,
    sequences: slice,
    rows: slice,
    squares: _Squares | None = None,
) -> None:
    """probabilities (b, H, rows, columns) = softmax(mask(query key^T / sqrt(K)))."""
    scaled_product(query[:, rows], key[:, : rows.stop].mT, 1 / math.sqrt(query.shape[2]), matrices(probabilities))
    if squares is not None:
        squares.put("scores", sequences, rows, probabilities)
    if hidden.dim() == 2:
        size = rows.stop - rows.start
        probabilities[..., rows].add_(hidden[:size, :size])  # `+=` would copy the sum onto itself
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
