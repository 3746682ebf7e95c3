"""Attention with rotary positions and grouped queries. It reads each key for all its queries without copies."""

from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops.dropout import Dropout
from ...ops.numerics import Record, no_record
from ...ops.rotary_attention import RotaryCache
from ...ops.visible import CAUSAL, Visible
from .attention import Fused, fused_backward, fused_forward, self_attention_backward, self_attention_forward

RotaryAttentionCache = tuple[RotaryCache, tuple[Any, Any]]  # the cache of `rotary`, and that of attention, fused or not


def rotary_attention_forward(
    qkv: Tensor,
    rotation: Tensor,
    n_heads: int,
    n_kv_heads: int,
    visible: Visible = CAUSAL,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> tuple[Tensor, RotaryAttentionCache]:
    """context = self_attention(repeat_heads(rotary(qkv))): `ops.rotary_attention_forward`."""
    turned, rotary_cache = ops.rotary_forward(qkv, rotation, n_heads + n_kv_heads)
    record("turned", turned)
    heads = turned.unflatten(2, (n_heads + 2 * n_kv_heads, -1))
    query, key, value = heads.split((n_heads, n_kv_heads, n_kv_heads), dim=2)
    fused = fused_forward(query, key, value, visible, dropout, record)
    if fused is not None:
        return fused.context.flatten(2), (rotary_cache, (n_heads, fused))
    repeated, repeat_cache = ops.repeat_heads_forward(turned, n_heads, n_kv_heads)
    context, attention_cache = self_attention_forward(repeated, n_heads, visible, dropout, record)
    return context, (rotary_cache, (repeat_cache, attention_cache))


def rotary_attention_backward(dcontext: Tensor, cache: RotaryAttentionCache, record: Record = no_record) -> Tensor:
    """dcontext (B, T, H K) -> dqkv (B, T, (H + 2G) K): `ops.rotary_attention_backward`."""
    rotary_cache, attention_cache = cache
    if isinstance(attention_cache[1], Fused):
        n_heads, fused = attention_cache
        gradients = fused_backward(dcontext.unflatten(2, (n_heads, -1)), fused, record)
        dturned = torch.cat(gradients, dim=2).flatten(2)
    else:
        repeat_cache, repeated_cache = attention_cache
        drepeated = self_attention_backward(dcontext, repeated_cache, record)
        dturned = ops.repeat_heads_backward(drepeated, repeat_cache)
    record("dturned", dturned)
    return ops.rotary_backward(dturned, rotary_cache)
