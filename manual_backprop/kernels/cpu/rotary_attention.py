"""Rotary positions and grouped queries around the tiles of `self_attention`."""

from torch import Tensor

from ...ops.dropout import Dropout
from ...ops.numerics import Record, no_record
from ...ops.rotary_attention import (
    RepeatHeadsCache,
    RotaryCache,
    repeat_heads_backward,
    repeat_heads_forward,
    rotary_backward,
    rotary_forward,
)
from ...ops.visible import CAUSAL, Visible
from .attention import SelfAttentionCache, self_attention_backward, self_attention_forward

RotaryAttentionCache = tuple[RotaryCache, RepeatHeadsCache, SelfAttentionCache]


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
    turned, rotary_cache = rotary_forward(qkv, rotation, n_heads + n_kv_heads)
    repeated, repeat_cache = repeat_heads_forward(turned, n_heads, n_kv_heads)
    context, attention_cache = self_attention_forward(repeated, n_heads, visible, dropout, record)
    record("turned", turned)
    return context, (rotary_cache, repeat_cache, attention_cache)


def rotary_attention_backward(dcontext: Tensor, cache: RotaryAttentionCache, record: Record = no_record) -> Tensor:
    """dcontext (B, T, H K) -> dqkv (B, T, (H + 2G) K): `ops.rotary_attention_backward`."""
    rotary_cache, repeat_cache, attention_cache = cache
    drepeated = self_attention_backward(dcontext, attention_cache, record)
    dturned = repeat_heads_backward(drepeated, repeat_cache)
    record("dturned", dturned)
    return rotary_backward(dturned, rotary_cache)
