"""Causal multi-head self-attention between its projections (Vaswani et al. 2017, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dropout import Dropout, dropout_backward, dropout_forward
from .numerics import Record, no_record
from .softmax import SoftmaxCache, softmax_backward, softmax_forward

AttentionCache = tuple[Tensor, SoftmaxCache, Dropout | None, int]


def visible_positions(length: int, segments: Tensor | None, device: torch.device) -> Tensor:
    """True where position t may look at position s: s <= t, and both in the same segment.

    segments (B, T) of whole numbers, or None for one segment -> (T, T), or (B, 1, T, T) with segments. Padding is a
    segment of its own, so that real tokens never see it, and no row is ever empty: each position sees itself.
    """
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if segments is None:
        return causal
    same = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
    return (causal & same)[:, None]


def split_heads(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3D) -> query, key, value: (B, H, T, K) each, views."""
    batch, length, width = qkv.shape
    query, key, value = qkv.view(batch, length, 3, n_heads, width // (3 * n_heads)).permute(2, 0, 3, 1, 4)
    return query, key, value


def attention_forward(
    qkv: Tensor,
    n_heads: int,
    segments: Tensor | None = None,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> tuple[Tensor, AttentionCache]:
    """context = dropout(softmax(mask(query key^T / sqrt(K)))) value, in every head.

    qkv (B, T, 3D): query, key and value side by side, each H heads of K = D / H; segments (B, T) keeps documents and
    padding apart -> context (B, T, D). The cache keeps qkv and the probabilities (B, H, T, T).

    From the last line to the first, each a product or a pair of its own:
        context = dropped value       ddropped = dcontext value^T,  dvalue = dropped^T dcontext
        scores = query key^T scale    dquery = scale dscores key,   dkey = scale dscores^T query
    A masked score is the constant -inf. Its probability is exactly 0, and with it its gradient: softmax_backward
    multiplies by the probability, so backward needs no mask.
    """
    query, key, value = split_heads(qkv, n_heads)
    scale = 1 / math.sqrt(query.shape[-1])
    scores = (query * scale) @ key.mT  # (B, H, T, T)
    visible = visible_positions(qkv.shape[1], segments, qkv.device)
    masked = torch.where(visible, scores, -math.inf)
    probabilities, softmax_cache = softmax_forward(masked)
    dropped, dropout_cache = dropout_forward(probabilities, dropout)
    context = dropped @ value  # (B, H, T, K)
    record("scores", scores)
    record("probabilities", probabilities)
    return context.transpose(1, 2).flatten(2), (qkv, softmax_cache, dropout_cache, n_heads)


def attention_backward(dcontext: Tensor, cache: AttentionCache, record: Record = no_record) -> Tensor:
    """dcontext (B, T, D) -> dqkv (B, T, 3D)."""
    qkv, softmax_cache, dropout_cache, n_heads = cache
    query, key, value = split_heads(qkv, n_heads)
    scale = 1 / math.sqrt(query.shape[-1])
    (probabilities,) = softmax_cache
    dropped, _ = dropout_forward(probabilities, dropout_cache)
    dcontext = dcontext.unflatten(2, (n_heads, -1)).transpose(1, 2)  # (B, H, T, K)
    dqkv = torch.empty_like(qkv)
    dquery, dkey, dvalue = split_heads(dqkv, n_heads)  # views: what is written here is written there
    # context = dropped value
    ddropped = dcontext @ value.mT
    dvalue.copy_(dropped.mT @ dcontext)
    # dropped = dropout(probabilities), probabilities = softmax(masked)
    dprobabilities = dropout_backward(ddropped, dropout_cache)
    dscores = softmax_backward(dprobabilities, softmax_cache)
    # scores = (query * scale) key^T
    dquery.copy_((dscores @ key) * scale)
    dkey.copy_(dscores.mT @ (query * scale))
    record("dprobabilities", dprobabilities)
    record("dscores", dscores)
    return dqkv
