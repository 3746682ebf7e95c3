"""Rotary positions and grouped queries around attention. The library reads a key where it is, for all its queries."""

from torch import Tensor

from ...ops.attention import AttentionGradients
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
from ..arena import in_place_of
from .attention import (
    Scores,
    SelfAttentionCache,
    groups_are_served,
    self_attention_backward,
    self_attention_forward,
    tiles_backward,
    tiles_forward,
)

GroupedCache = tuple[Tensor, int, int, Scores]
RotaryAttentionCache = tuple[RotaryCache, GroupedCache | tuple[RepeatHeadsCache, SelfAttentionCache]]


def _split_groups(qkv: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, (H + 2G) K) -> query (B, T, H, K), key and value (B, T, G, K), views."""
    heads = qkv.unflatten(2, (n_heads + 2 * n_kv_heads, -1))
    query, key, value = heads.split([n_heads, n_kv_heads, n_kv_heads], dim=2)
    return query, key, value


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
    record("turned", turned)
    heads = _split_groups(turned, n_heads, n_kv_heads)
    if groups_are_served(*heads, visible, dropout):
        context, scores = tiles_forward(*heads, visible, dropout, record)
        return context.flatten(2), (rotary_cache, (turned, n_heads, n_kv_heads, scores))
    repeated, repeat_cache = repeat_heads_forward(turned, n_heads, n_kv_heads)
    context, attention_cache = self_attention_forward(repeated, n_heads, visible, dropout, record)
    return context, (rotary_cache, (repeat_cache, attention_cache))


def rotary_attention_backward(dcontext: Tensor, cache: RotaryAttentionCache, record: Record = no_record) -> Tensor:
    """dcontext (B, T, H K) -> dqkv (B, T, (H + 2G) K): `ops.rotary_attention_backward`."""
    rotary_cache, attention_cache = cache
    if len(attention_cache) == 4:
        turned, n_heads, n_kv_heads, scores = attention_cache
        dturned = in_place_of(turned)
        gradients = AttentionGradients(*_split_groups(dturned, n_heads, n_kv_heads))  # views of it, which are written
        dcontext = dcontext.unflatten(2, (n_heads, -1))
        tiles_backward(gradients, dcontext, *_split_groups(turned, n_heads, n_kv_heads), scores, record)
    else:
        repeat_cache, repeated_cache = attention_cache
        drepeated = self_attention_backward(dcontext, repeated_cache, record)
        dturned = repeat_heads_backward(drepeated, repeat_cache)
    record("dturned", dturned)
    return rotary_backward(dturned, rotary_cache)
