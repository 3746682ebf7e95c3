"""Attention with rotary positions and grouped queries. The library rotates queries and keys when it reads them, and
reads each key for all its queries without copies."""

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
from ..arena import Recomputable, in_place_of, recomputed, saved
from .attention import (
    Scores,
    SelfAttentionCache,
    library_forward,
    self_attention_backward,
    self_attention_forward,
    tiles_backward,
)

GroupedCache = tuple[Recomputable, int, int, Scores]
RotaryAttentionCache = GroupedCache | tuple[RotaryCache, RepeatHeadsCache, SelfAttentionCache]


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
    heads, n_turned = _split_groups(qkv, n_heads, n_kv_heads), n_heads + n_kv_heads
    found = library_forward(*heads, visible, dropout, record, rotation)
    if found is not None:
        if record.wants("turned"):
            record("turned", rotary_forward(qkv, rotation, n_turned)[0])
        context, scores = found
        return context.flatten(2), (saved(qkv), n_heads, n_kv_heads, scores)
    turned, rotary_cache = rotary_forward(qkv, rotation, n_turned)
    record("turned", turned)
    repeated, repeat_cache = repeat_heads_forward(turned, n_heads, n_kv_heads)
    context, attention_cache = self_attention_forward(repeated, n_heads, visible, dropout, record)
    return context, (rotary_cache, repeat_cache, attention_cache)


def rotary_attention_backward(dcontext: Tensor, cache: RotaryAttentionCache, record: Record = no_record) -> Tensor:
    """dcontext (B, T, H K) -> dqkv (B, T, (H + 2G) K), in the place of qkv: `ops.rotary_attention_backward`."""
    if len(cache) == 4:
        saved_qkv, n_heads, n_kv_heads, scores = cache
        qkv = recomputed(saved_qkv)
        dqkv = in_place_of(qkv)
        gradients = AttentionGradients(*_split_groups(dqkv, n_heads, n_kv_heads))  # views: writing to them fills dqkv
        dcontext = dcontext.unflatten(2, (n_heads, -1))
        tiles_backward(gradients, dcontext, *_split_groups(qkv, n_heads, n_kv_heads), scores, record)
        if record.wants("dturned"):
            assert scores.rotation is not None
            record("dturned", rotary_forward(dqkv, scores.rotation, n_heads + n_kv_heads)[0])  # rotated forward again
        return dqkv
    rotary_cache, repeat_cache, attention_cache = cache
    drepeated = self_attention_backward(dcontext, attention_cache, record)
    dturned = repeat_heads_backward(drepeated, repeat_cache)
    record("dturned", dturned)
    return rotary_backward(dturned, rotary_cache)
