"""Attention with rotary positions (Su et al. 2021) and grouped queries (Ainslie et al. 2023).

Two small pairs before the attention of `ops/attention.py`: `rotary` turns queries and keys by angles that grow with
their position, so that a score depends on how far apart two positions are; `repeat_heads` lets H / G queries read the
same key and value (Ainslie et al. 2023). `rotary_attention` is all three, the pair that a network calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import SelfAttentionCache, self_attention_backward, self_attention_forward
from .dropout import Dropout
from .numerics import Record, no_record, wide
from .visible import CAUSAL, Visible

BASE = 10000.0  # of the angles, as in Su et al. 2021, section 3.2.2

RotaryCache = tuple[Tensor, int]
RepeatHeadsCache = tuple[int, int]
RotaryAttentionCache = tuple[RotaryCache, RepeatHeadsCache, SelfAttentionCache]


def rotations(length: int, d_head: int, base: float = BASE) -> Tensor:
    """Cosines and sines of the angle of pair i at position t, t base^(-2i / K) -> (2, length, K / 2).

    The slowest pair makes one turn in about 2 pi base positions: networks for long texts have a larger base.

    In float32, as in Touvron et al.'s code: weights that were trained elsewhere were trained with these angles.

    >>> cosines, sines = rotations(2, d_head=2)
    >>> cosines.flatten(), sines.flatten()
    (tensor([1.0000, 0.5403]), tensor([0.0000, 0.8415]))
    """
    even = torch.arange(0, d_head, 2, dtype=torch.float32)
    speed = 1 / base ** (even / d_head)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * speed  # (length, K / 2)
    return torch.stack((angle.cos(), angle.sin()))


def halves(qkv: Tensor, d_head: int, n_turned: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, (H + 2G) K) -> the two halves of the first `n_turned` heads, (B, T, H + G, K / 2) each, and the other
    heads, (B, T, G, K): views."""
    heads = qkv.unflatten(2, (-1, d_head))  # (B, T, H + 2G, K)
    first, second = heads[:, :, :n_turned].chunk(2, dim=-1)
    return first, second, heads[:, :, n_turned:]


def joined(first: Tensor, second: Tensor, rest: Tensor) -> Tensor:
    """The inverse of `halves`: its three parts side by side, (B, T, (H + 2G) K)."""
    return torch.cat((torch.cat((first, second), dim=-1), rest), dim=2).flatten(2)


def rotary_forward(qkv: Tensor, rotation: Tensor, n_turned: int) -> tuple[Tensor, RotaryCache]:
    """turned_1 = first cos - second sin, turned_2 = second cos + first sin: every pair (first_i, second_i) is rotated.

    qkv (B, T, (H + 2G) K): query, key and value heads side by side. The first `n_turned` = H + G heads are rotated, the
    values are not. rotation (2, max_seq_len, K / 2) of `rotations` -> (B, T, (H + 2G) K). Element i of a head is paired
    with element i + K / 2, as in transformers.

    A rotation is an orthogonal matrix, and its transpose rotates back: the gradient is rotated by the negative angle.
        dfirst = dturned_1 cos + dturned_2 sin      dsecond = dturned_2 cos - dturned_1 sin
    The product of query t, rotated by the angle t a, and key s, rotated by s a, depends on the positions only through
    (t - s) a: on their distance.

    >>> qkv = torch.tensor([[[1.0, 0.0, 1.0, 0.0, 7.0, 8.0]]]).expand(1, 2, 6)  # the same at both positions
    >>> y, cache = rotary_forward(qkv, rotations(2, d_head=2), n_turned=2)
    >>> y[0, 1]  # query and key are turned by 1, and the value stays
    tensor([0.5403, 0.8415, 0.5403, 0.8415, 7.0000, 8.0000])
    >>> torch.allclose(rotary_backward(y, cache), qkv)
    True
    """
    first, second, values = halves(wide(qkv), 2 * rotation.shape[-1], n_turned)
    cosine, sine = rotation[:, : qkv.shape[1], None].to(first.dtype)  # (T, 1, K / 2) each
    turned_1 = first * cosine - second * sine
    turned_2 = second * cosine + first * sine
    return joined(turned_1, turned_2, values).to(qkv.dtype), (rotation, n_turned)


def rotary_backward(dy: Tensor, cache: RotaryCache) -> Tensor:
    """dy (B, T, (H + 2G) K) -> dqkv (B, T, (H + 2G) K)."""
    rotation, n_turned = cache
    dturned_1, dturned_2, dvalues = halves(wide(dy), 2 * rotation.shape[-1], n_turned)
    cosine, sine = rotation[:, : dy.shape[1], None].to(dturned_1.dtype)
    # turned_1 = first cos - second sin, turned_2 = second cos + first sin
    dfirst = dturned_1 * cosine + dturned_2 * sine
    dsecond = dturned_2 * cosine - dturned_1 * sine
    return joined(dfirst, dsecond, dvalues).to(dy.dtype)


def repeat_heads_forward(qkv: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, RepeatHeadsCache]:
    """y = every query head once, and every key and value head H / G times: the input of attention.

    qkv (B, T, (H + 2G) K) -> (B, T, 3 H K). Query head h reads key and value head h // (H / G). The gradient of a key
    or value head is the sum over its H / G copies. Where G = H, y is qkv itself.

    >>> y, cache = repeat_heads_forward(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), n_heads=2, n_kv_heads=1)
    >>> y, repeat_heads_backward(torch.ones(1, 1, 6), cache)
    (tensor([[[1., 2., 3., 3., 4., 4.]]]), tensor([[[1., 1., 2., 2.]]]))
    """
    if n_kv_heads == n_heads:
        return qkv, (n_heads, n_kv_heads)
    heads = qkv.unflatten(2, (n_heads + 2 * n_kv_heads, -1))  # (B, T, H + 2G, K)
    query, shared = heads[:, :, :n_heads], heads[:, :, n_heads:]
    repeated = shared.repeat_interleave(n_heads // n_kv_heads, dim=2)  # (B, T, 2H, K)
    return torch.cat((query, repeated), dim=2).flatten(2), (n_heads, n_kv_heads)


def repeat_heads_backward(dy: Tensor, cache: RepeatHeadsCache) -> Tensor:
    """dy (B, T, 3 H K) -> dqkv (B, T, (H + 2G) K)."""
    n_heads, n_kv_heads = cache
    if n_kv_heads == n_heads:
        return dy
    by_head = dy.unflatten(2, (3 * n_heads, -1))  # (B, T, 3H, K)
    dquery, drepeated = by_head[:, :, :n_heads], by_head[:, :, n_heads:]
    # repeated = shared, repeated H / G times: sum in float32 or wider, round once
    by_reader = wide(drepeated).unflatten(2, (2 * n_kv_heads, -1))  # (B, T, 2G, H / G, K)
    dshared = by_reader.sum(3).to(dy.dtype)
    return torch.cat((dquery, dshared), dim=2).flatten(2)


def rotary_attention_forward(
    qkv: Tensor,
    rotation: Tensor,
    n_heads: int,
    n_kv_heads: int,
    visible: Visible = CAUSAL,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> tuple[Tensor, RotaryAttentionCache]:
    """context = self_attention(repeat_heads(rotary(qkv))).

    qkv (B, T, (H + 2G) K): H query, G key and G value heads side by side; rotation (2, max_seq_len, K / 2); `visible`
    says which keys a query may see -> context (B, T, H K).

    >>> qkv = torch.ones(1, 2, 8)  # two query heads, one key head and one value head of K = 2
    >>> context, cache = rotary_attention_forward(qkv, rotations(2, d_head=2), n_heads=2, n_kv_heads=1)
    >>> context.shape, rotary_attention_backward(torch.ones(1, 2, 4), cache).shape
    (torch.Size([1, 2, 4]), torch.Size([1, 2, 8]))
    """
    turned, rotary_cache = rotary_forward(qkv, rotation, n_heads + n_kv_heads)
    repeated, repeat_cache = repeat_heads_forward(turned, n_heads, n_kv_heads)
    context, attention_cache = self_attention_forward(repeated, n_heads, visible, dropout, record)
    record("turned", turned)
    return context, (rotary_cache, repeat_cache, attention_cache)


def rotary_attention_backward(dcontext: Tensor, cache: RotaryAttentionCache, record: Record = no_record) -> Tensor:
    """dcontext (B, T, H K) -> dqkv (B, T, (H + 2G) K)."""
    rotary_cache, repeat_cache, attention_cache = cache
    # context = self_attention(repeated)
    drepeated = self_attention_backward(dcontext, attention_cache, record)
    # repeated = repeat_heads(turned)
    dturned = repeat_heads_backward(drepeated, repeat_cache)
    record("dturned", dturned)
    # turned = rotary(qkv)
    return rotary_backward(dturned, rotary_cache)
