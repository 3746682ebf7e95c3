"""Attention in tiles: a few sequences, a block of queries, and only the keys that they may see.

With the compiled library, cpp/attention.h computes this for each head, and keeps one number per query for backward.
This file has its calls, and the same tiles as products of PyTorch for machines without a compiler.

What a causal mask hides is not computed, except the corner of a tile: for T queries and T keys, tiles of Q queries take
T (T + Q) / 2 products, where one product with a mask takes T^2. A tile's scores stay in the processor's cache from
their product through the softmax to the next product. Each tile computes its own part of the mask and of dropout's
mask. PyTorch's flash attention has tiles too, but they suit long sequences; on a CPU these products are several times
faster at a few hundred positions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ...ops import attention as textbook
from ...ops.attention import AttentionGradients, CrossAttentionGradients, split_heads
from ...ops.dropout import Dropout, dropout_forward, keep_mask, signed
from ...ops.numerics import Record, no_record, wide
from ...ops.rotary_attention import rotary_forward
from ...ops.visible import CAUSAL, EVERYTHING, Visible
from ..arena import Recomputable, in_place_of, kept, persistent, recomputed, saved, scratch
from ..pieces import pieces
from ..replay import call_library
from ..sizes import sizes_of
from .compiled import FORMATS, kernel, library_is_wanted
from .products import matrices, scaled_product

RECORDED = ("scores", "probabilities", "dprobabilities", "dscores")


class Scores(NamedTuple):
    """What backward needs to recompute the probabilities, and the kept probabilities of short sequences."""

    visible: Visible
    dropout: Dropout | None
    corner: Tensor | None  # a causal mask to be added to scores, the same in all tiles; None for other masks
    saved: list[list[Tensor]]  # kept probabilities: for some sequences each, tile by tile
    sums: Tensor | None = None  # (B, H, T): log-sum-exp of each query, from the library
    rotation: Tensor | None = None  # the library rotates queries and keys by it


AttentionCache = tuple[Tensor, Tensor, Tensor, Scores]
SelfAttentionCache = tuple[Recomputable, Scores, int]
CrossAttentionCache = textbook.CrossAttentionCache | tuple[Tensor, Tensor, Scores, int, int]


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visible = CAUSAL,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> tuple[Tensor, AttentionCache]:
    """context = dropout(softmax(mask(query key^T / sqrt(K)))) value: `ops.attention_forward`.

    query (B, T, H, K), key and value (B, S, H, K) -> context (B, T, H, K). The cache keeps the inputs, and the
    probabilities of short sequences.
    """
    context, scores = tiles_forward(query, key, value, visible, dropout, record)
    return context, (persistent(query), persistent(key), persistent(value), scores)


def attention_backward(dcontext: Tensor, cache: AttentionCache, record: Record = no_record) -> AttentionGradients:
    """dcontext (B, T, H, K) -> dquery (B, T, H, K), dkey and dvalue (B, S, H, K): `ops.attention_backward`.

    Inside a step a contiguous input is overwritten by its gradient, so no two inputs may be one tensor there.
    """
    query, key, value, scores = cache
    gradients = AttentionGradients(in_place_of(query), in_place_of(key), in_place_of(value))
    tiles_backward(gradients, dcontext, query, key, value, scores, record)
    return gradients


def self_attention_forward(
    qkv: Tensor,
    n_heads: int,
    visible: Visible = CAUSAL,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> tuple[Tensor, SelfAttentionCache]:
    """context = attention(query, key, value): `ops.self_attention_forward`. qkv (B, T, 3D) -> context (B, T, D)."""
    context, scores = tiles_forward(*split_heads(qkv, n_heads), visible, dropout, record)
    return context.flatten(2), (saved(qkv), scores, n_heads)


def self_attention_backward(dcontext: Tensor, cache: SelfAttentionCache, record: Record = no_record) -> Tensor:
    """dcontext (B, T, D) -> dqkv (B, T, 3D), in the place of qkv: `ops.self_attention_backward`."""
    saved_qkv, scores, n_heads = cache
    qkv = recomputed(saved_qkv)
    dqkv = in_place_of(qkv)
    gradients = AttentionGradients(*split_heads(dqkv, n_heads))  # views of dqkv: writing to them fills it
    dcontext = dcontext.unflatten(2, (n_heads, -1))
    tiles_backward(gradients, dcontext, *split_heads(qkv, n_heads), scores, record)
    return dqkv


def cross_attention_forward(
    query: Tensor,
    key_value: Tensor,
    n_heads: int,
    n_kv_heads: int,
    visible: Visible = EVERYTHING,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> tuple[Tensor, CrossAttentionCache]:
    """context = attention(query, key, value), key and value side by side: `ops.cross_attention_forward`.

    query (B, T, H K), key_value (B, S, 2 G K) -> context (B, T, H K).
    """
    heads, (key, value) = query.unflatten(2, (n_heads, -1)), _halves(key_value, n_kv_heads)
    found = library_forward(heads, key, value, visible, dropout, record)
    if found is None and n_heads != n_kv_heads:
        return textbook.cross_attention_forward(query, key_value, n_heads, n_kv_heads, visible, dropout, record)
    context, scores = found or _tiles_forward(heads, key, value, visible, dropout, record)
    return context.flatten(2), (persistent(query), persistent(key_value), scores, n_heads, n_kv_heads)


def cross_attention_backward(
    dcontext: Tensor, cache: CrossAttentionCache, record: Record = no_record
) -> CrossAttentionGradients:
    """dcontext (B, T, H K) -> dquery and dkey_value, in the places of query and key_value:
    `ops.cross_attention_backward`."""
    if len(cache) == 3:
        return textbook.cross_attention_backward(dcontext, cache, record)
    query, key_value, scores, n_heads, n_kv_heads = cache
    dquery, dkey_value = in_place_of(query), in_place_of(key_value)
    by_head, gradients = (
        (of_query.unflatten(2, (n_heads, -1)), *_halves(of_keys, n_kv_heads))
        for of_query, of_keys in ((query, key_value), (dquery, dkey_value))
    )
    tiles_backward(AttentionGradients(*gradients), dcontext.unflatten(2, (n_heads, -1)), *by_head, scores, record)
    return CrossAttentionGradients(dquery, dkey_value)


def _halves(key_value: Tensor, n_kv_heads: int) -> tuple[Tensor, Tensor]:
    """(B, S, 2 G K) -> key, value: (B, S, G, K) each, views."""
    key, value = key_value.unflatten(2, (2, n_kv_heads, -1)).unbind(2)
    return key, value


def tiles_forward(
    query: Tensor, key: Tensor, value: Tensor, visible: Visible, dropout: Dropout | None, record: Record
) -> tuple[Tensor, Scores]:
    """context (B, T, H, K), and what backward needs to recompute the probabilities."""
    found = library_forward(query, key, value, visible, dropout, record)
    return found or _tiles_forward(query, key, value, visible, dropout, record)


def library_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visible,
    dropout: Dropout | None,
    record: Record,
    rotation: Tensor | None = None,
) -> tuple[Tensor, Scores] | None:
    """The same, by the library; None if it does not support these arguments.

    key and value may have fewer heads than the query: each serves as many consecutive query heads, without a copy.
    rotation (2, max_seq_len, K / 2): queries and keys are rotated when they are read.
    """
    forward = _kernel("forward", query, key, value, visible, dropout, rotation)
    if forward is None:
        return None
    if any(map(record.wants, RECORDED)):  # the library does not store these
        textbook.attention_forward(*turned(query, key, value, rotation), visible, dropout, record)
    B, T, H, _ = query.shape
    context, sums = kept(tuple(query.shape), query), kept((B, H, T), wide(query[:0]))
    forward((context, query, key, value), (context, sums, query, key, value))
    return context, Scores(visible, dropout, None, [], sums, rotation)


def _tiles_forward(
    query: Tensor, key: Tensor, value: Tensor, visible: Visible, dropout: Dropout | None, record: Record
) -> tuple[Tensor, Scores]:
    """The same, by PyTorch's products."""
    (B, T, H, K), S = query.shape, key.shape[1]
    context = kept((B, T, H, K), query)
    scores = Scores(visible, dropout, _corner(visible, T, S, query), [])
    recorded = _RecordedTiles(record, query, (B, H, T, S))
    for sequences in _some_sequences(query, S):
        tiles: list[Tensor] = []
        scores.saved.append(tiles)
        with (
            _by_head(query[sequences]) as queries,
            _by_head(key[sequences]) as keys,
            _by_head(value[sequences]) as values,
        ):
            for rows in pieces(T, sizes_of(query).queries, query):
                tile = _Tile(scores, T, S, sequences, rows)
                shape = tile.shape(H)
                if max(T, S) <= sizes_of(query).longest_kept:
                    tiles.append(kept(shape, query))
                with _memory(tiles, -1, shape, query) as probabilities, scratch((*shape[:3], K), query) as part:
                    _fill(probabilities, queries, keys, tile, recorded)
                    recorded.put("probabilities", sequences, rows, probabilities)
                    dropped, _ = dropout_forward(probabilities, tile.dropout)
                    torch.bmm(matrices(dropped), values[:, : tile.seen], out=matrices(part))
                    context[sequences, rows] = part.transpose(1, 2)  # where the next projection reads it
    recorded.finish()
    return context, scores


def tiles_backward(
    gradients: AttentionGradients,
    dcontext: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    record: Record,
) -> None:
    """Writes all three gradients. They may overwrite the inputs, which are copied for some sequences at a time.

    The blocks of queries run from last to first. The last block sees all keys and writes the sums; the others add.
    """
    if scores.sums is not None:
        rotation = scores.rotation
        backward = _kernel("backward", query, key, value, scores.visible, scores.dropout, rotation)
        assert backward is not None  # since the forward was there
        dcontext = dcontext.to(query.dtype).contiguous()
        if any(map(record.wants, RECORDED)):
            heads = turned(query, key, value, rotation)
            _, cache = textbook.attention_forward(*heads, scores.visible, scores.dropout)
            textbook.attention_backward(dcontext, cache, record)
        backward((*gradients, dcontext, query, key, value), (*gradients, dcontext, scores.sums, query, key, value))
        return
    (B, T, H, K), S = query.shape, key.shape[1]
    recorded = _RecordedTiles(record, query, (B, H, T, S))
    for sequences, tiles in zip(_some_sequences(query, S), scores.saved, strict=True):
        blocks = list(enumerate(pieces(T, sizes_of(query).queries, query)))
        with (
            _by_head(query[sequences]) as queries,
            _by_head(key[sequences]) as keys,
            _by_head(value[sequences]) as values,
            _by_head(dcontext[sequences]) as dcontexts,
            _from_heads(gradients.dquery[sequences]) as dqueries,
            _from_heads(gradients.dkey[sequences]) as dkeys,
            _from_heads(gradients.dvalue[sequences]) as dvalues,
        ):
            for number, rows in reversed(blocks):
                tile = _Tile(scores, T, S, sequences, rows)
                adds = number != blocks[-1][0]
                shape = tile.shape(H)
                with _memory(tiles, number, shape, query) as probabilities, scratch(shape, query) as ddropped:
                    if not tiles:
                        _fill(probabilities, queries, keys, tile)
                    mask, share = tile.dropout_mask(probabilities)  # drawn once for both
                    dropped = probabilities if mask is None else probabilities * mask / share
                    # context = dropped value
                    torch.bmm(dcontexts[:, rows], values[:, : tile.seen].mT, out=matrices(ddropped))
                    _add_product(dvalues, matrices(dropped).mT, dcontexts[:, rows], adds)
                    # dropped = dropout(probabilities), probabilities = softmax(scores)
                    dprobabilities = ddropped if mask is None else ddropped.mul_(mask).div_(share)
                    recorded.put("dprobabilities", sequences, rows, dprobabilities)
                    dscores = torch._softmax_backward_data(
                        dprobabilities, probabilities, -1, probabilities.dtype, grad_input=dprobabilities
                    )
                    recorded.put("dscores", sequences, rows, dscores)
                    # scores = query key^T / sqrt(K)
                    scale = 1 / math.sqrt(K)
                    dscores = matrices(dscores)
                    scaled_product(dscores, keys[:, : tile.seen], scale, dqueries[:, rows])
                    _add_product(dkeys, dscores.mT, queries[:, rows], adds, scale)
    recorded.finish()


def turned(query: Tensor, key: Tensor, value: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys rotated, and keys and values repeated for every head: the inputs of the textbook pair."""
    if rotation is not None:
        query, key = (rotary_forward(x.flatten(2), rotation, x.shape[2])[0].view(x.shape) for x in (query, key))
    times = query.shape[2] // key.shape[2]
    return query, key.repeat_interleave(times, dim=2), value.repeat_interleave(times, dim=2)


def _kernel(
    which: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visible,
    dropout: Dropout | None,
    rotation: Tensor | None,
) -> Callable[[Sequence[Tensor], Sequence[Tensor]], None] | None:
    """The library's forward or backward as a function of (the tensors with strides, all tensors); None if the library
    does not support these arguments."""
    (B, T, H, K), (S, G) = query.shape, key.shape[1:3]
    formats = FORMATS.get((query.dtype, query.dtype))
    lie_well = query.is_cpu and all(x.dtype == query.dtype and x.stride(-1) == 1 for x in (query, key, value))
    if formats is None or not lie_well or K % 2 or H % G:
        return None
    if type(query) is FakeTensor:  # when a step's memory is estimated
        return (lambda strided, tensors: None) if library_is_wanted() else None
    pointers, strides = (9, 12) if which == "forward" else (12, 21)
    address = kernel(f"attention_{which}_{formats}", pointers, strides + 15, 1)
    if address is None:
        return None
    _, lengths, *segments = visible
    if any(x is None for x in segments):  # one alone hides nothing
        segments = [None, None]
    rest = [*(None if x is None else x.long().contiguous() for x in (lengths, *segments)), rotation]
    angles = 0 if rotation is None else rotation.shape[1]
    probability, number, sizes, first = (0.0, 0, (1, 1), ()) if dropout is None else dropout
    number = signed(number, 64) if isinstance(number, int) else int(number)
    numbers = B, T, S, H, G, K, angles, visible.causal, number, *sizes, *(*first, 0, 0, 0, 0)[:4], probability

    def call(strided: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        call_library(address, (*tensors, *rest), (*[step for x in strided for step in x.stride()[:3]], *numbers))

    return call


class _RecordedTiles:
    """Collects tiles in a (B, H, T, S) tensor for the recorder; 0 where there was no tile."""

    def __init__(self, record: Record, like: Tensor, shape: tuple[int, ...]):
        self.record, self.like, self.shape = record, like, shape
        self.wholes: dict[str, Tensor] = {}

    def put(self, name: str, sequences: slice, rows: slice, tile: Tensor) -> None:
        if self.record.wants(name):
            if name not in self.wholes:
                self.wholes[name] = self.like.new_zeros(self.shape)
            self.wholes[name][sequences, :, rows, : tile.shape[-1]] = tile

    def finish(self) -> None:
        for name, whole in self.wholes.items():
            self.record(name, whole)


class _Tile:
    """The scores of the queries `rows` of some sequences; the last of these queries sees the first `seen` keys."""

    def __init__(self, scores: Scores, T: int, S: int, sequences: slice, rows: slice):
        self.visible, self.corner, self.T, self.S = scores.visible, scores.corner, T, S
        self.sequences, self.rows, self.seen = sequences, rows, self.visible.keys_up_to(rows.stop, T, S)
        dropout = scores.dropout
        self.dropout = None if dropout is None else dropout.tile(sequences.start, 0, rows.start)

    def shape(self, n_heads: int) -> tuple[int, int, int, int]:
        """(b, H, t, s)"""
        return self.sequences.stop - self.sequences.start, n_heads, self.rows.stop - self.rows.start, self.seen

    def dropout_mask(self, probabilities: Tensor) -> tuple[Tensor | None, float]:
        """Dropout's mask of this tile, None without dropout, and the keep probability 1 - p."""
        if self.dropout is None or self.dropout.probability == 0:
            return None, 1.0
        mask = keep_mask(tuple(probabilities.shape), self.dropout, probabilities.device)
        return mask, 1 - self.dropout.probability

    def mask_(self, scores: Tensor) -> None:
        """Sets hidden scores (b, H, t, s) to -inf, by adding a mask of 0 and -inf: this is faster than filling."""
        if self.corner is not None:
            size = self.rows.stop - self.rows.start
            scores[..., self.seen - size :].add_(self.corner[:size, :size])
        elif (hidden := self._hidden(scores.device)) is not None:
            with scratch(tuple(hidden.shape), scores) as penalty:
                scores.add_(penalty.zero_().masked_fill_(hidden, -math.inf))

    def empty_(self, probabilities: Tensor) -> None:
        """Sets the probabilities of queries that see no key to 0."""
        if self.visible.may_leave_none(self.T, self.S) and (hidden := self._hidden(probabilities.device)) is not None:
            probabilities.masked_fill_(hidden.all(-1, keepdim=True), 0)

    def _hidden(self, device: torch.device) -> Tensor | None:
        """True where a key is hidden, (b or 1, 1, t, s); None if all are visible."""
        seen = self.visible.mask(self.T, self.S, device, self.sequences, self.rows, slice(self.seen))
        return None if seen is None else ~seen


def _corner(visible: Visible, T: int, S: int, like: Tensor) -> Tensor | None:
    """-inf above the diagonal, 0 elsewhere, for the queries of one tile; None if the mask is not only causal."""
    if not visible.is_only_causal or T > S:
        return None
    size = min(T, sizes_of(like).queries)
    return torch.full((size, size), -math.inf, dtype=like.dtype, device=like.device).triu(1)


def _some_sequences(query: Tensor, S: int) -> Iterator[slice]:
    """Slices of sequences, so large that the scores of a tile have their usual size."""
    batch, T, n_heads, _ = query.shape
    sizes = sizes_of(query)
    at_once = max(1, sizes.scores // (n_heads * S * min(T, sizes.queries)))
    may_be_kept = max(T, S) <= sizes.longest_kept  # the probabilities of a sequence
    return pieces(batch, at_once, None if may_be_kept else query)


@contextmanager
def _by_head(x: Tensor) -> Iterator[Tensor]:
    """Some sequences (b, T, H, K) as a matrix for each head: (b H, T, K)."""
    by_head = x.transpose(1, 2)
    with scratch(tuple(by_head.shape), x) as copy:
        yield matrices(copy.copy_(by_head))


@contextmanager
def _from_heads(x: Tensor) -> Iterator[Tensor]:
    """A matrix for each head, (b H, T, K), to write into; at the end its content is in x (b, T, H, K)."""
    by_head = x.transpose(1, 2)
    with scratch(tuple(by_head.shape), x) as copy:
        yield matrices(copy)
        by_head.copy_(copy)


def _memory(
    kept_tiles: list[Tensor], number: int, shape: tuple[int, ...], like: Tensor
) -> AbstractContextManager[Tensor]:
    """Memory for a tile of probabilities: kept for backward, or scratch memory to recompute them."""
    return nullcontext(kept_tiles[number]) if kept_tiles else scratch(shape, like)


def _add_product(total: Tensor, left: Tensor, right: Tensor, adds: bool, scale: float = 1) -> None:
    """total (b H, S, K) = scale left right, or +=, in the rows of the visible keys."""
    seen = left.shape[1]
    if not adds:
        scaled_product(left, right, scale, total)
        return
    with scratch((total.shape[0], seen, total.shape[2]), total) as part:
        scaled_product(left, right, scale, part)
        total[:, :seen].add_(part)


def _fill(
    probabilities: Tensor, query: Tensor, key: Tensor, tile: _Tile, recorded: _RecordedTiles | None = None
) -> None:
    """probabilities (b, H, t, s) = softmax(mask(query key^T / sqrt(K)))."""
    rows, scale = tile.rows, 1 / math.sqrt(query.shape[2])
    scaled_product(query[:, rows], key[:, : tile.seen].mT, scale, matrices(probabilities))
    if recorded is not None:
        recorded.put("scores", tile.sequences, rows, probabilities)
    tile.mask_(probabilities)
    torch.softmax(probabilities, -1, out=probabilities)
    tile.empty_(probabilities)
