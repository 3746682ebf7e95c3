"""Multi-head attention between its projections (Vaswani et al. 2017, section 3.2).

`attention` works on any queries, keys and values. In `self_attention` a sequence attends to itself: one
matrix product has computed query, key and value. In `cross_attention` a sequence attends to another one, from which one
matrix product has computed keys and values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import Dropout, dropout_backward, dropout_forward
from .numerics import Record, no_record, wide
from .softmax import SoftmaxCache, softmax_backward, softmax_forward
from .visible import CAUSAL, EVERYTHING, Visible

AttentionCache = tuple[Tensor, Tensor, Tensor, SoftmaxCache, Dropout | None]
SelfAttentionCache = tuple[Tensor, AttentionCache, int]
CrossAttentionCache = tuple[AttentionCache, int, int]


class AttentionGradients(NamedTuple):
    """The gradients of the three inputs, each in the shape of its input.

    >>> AttentionGradients(dquery=torch.zeros(2), dkey=torch.zeros(2), dvalue=torch.ones(2)).dvalue
    tensor([1., 1.])
    """

    dquery: Tensor
    dkey: Tensor
    dvalue: Tensor


class CrossAttentionGradients(NamedTuple):
    """The gradients of both inputs, each in the shape of its input.

    >>> CrossAttentionGradients(dquery=torch.zeros(2), dkey_value=torch.ones(4)).dkey_value
    tensor([1., 1., 1., 1.])
    """

    dquery: Tensor
    dkey_value: Tensor


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visible = CAUSAL,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> tuple[Tensor, AttentionCache]:
    """context = dropout(softmax(mask(query key^T / sqrt(K)))) value, in every head.

    query (B, T, H, K), key and value (B, S, H, K); `visible` says which keys a query may see -> context (B, T, H, K).
    The cache keeps the inputs and the probabilities (B, H, T, S).

    Backward goes from the last line to the first. Dropout and softmax are pairs; the two products have the gradients
        context = dropped value       ddropped = dcontext value^T,  dvalue = dropped^T dcontext
        scores = query key^T scale    dquery = scale dscores key,   dkey = scale dscores^T query
    A masked score is the constant -inf, and its probability is exactly 0. So is its gradient, because softmax_backward
    multiplies by the probability: backward needs no mask. Where a query sees no key, all its scores are masked: its
    probabilities, its context and its gradient are 0.

    >>> query, key, value = torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1), torch.tensor([[[[1.0]], [[3.0]]]])
    >>> context, cache = attention_forward(query, key, value)
    >>> context.flatten()  # the first query sees only the first key, the second one weights both equally
    tensor([1., 2.])
    >>> attention_backward(torch.ones(1, 2, 1, 1), cache).dvalue.flatten()
    tensor([1.5000, 0.5000])
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, H, T or S, K)
    scale = 1 / math.sqrt(query.shape[-1])
    scores = (query * scale) @ key.mT  # (B, H, T, S)
    seen = visible.mask(query.shape[2], key.shape[2], query.device)
    masked = scores if seen is None else torch.where(seen, scores, -math.inf)
    probabilities, softmax_cache = softmax_forward(masked)
    dropped, dropout_cache = dropout_forward(probabilities, dropout)
    context = dropped @ value  # (B, H, T, K)
    record("scores", scores)
    record("probabilities", probabilities)
    return context.transpose(1, 2), (query, key, value, softmax_cache, dropout_cache)


def attention_backward(dcontext: Tensor, cache: AttentionCache, record: Record = no_record) -> AttentionGradients:
    """dcontext (B, T, H, K) -> dquery (B, T, H, K), dkey and dvalue (B, S, H, K)."""
    query, key, value, softmax_cache, dropout_cache = cache
    scale = 1 / math.sqrt(query.shape[-1])
    (probabilities,) = softmax_cache
    dropped, _ = dropout_forward(probabilities, dropout_cache)
    dcontext = dcontext.transpose(1, 2)  # (B, H, T, K)
    # context = dropped value
    ddropped = dcontext @ value.mT
    dvalue = dropped.mT @ dcontext
    # dropped = dropout(probabilities), probabilities = softmax(masked)
    dprobabilities = dropout_backward(ddropped, dropout_cache)
    dscores = softmax_backward(dprobabilities, softmax_cache)
    # scores = (query * scale) key^T
    dquery = (dscores @ key) * scale
    dkey = dscores.mT @ (query * scale)
    record("dprobabilities", dprobabilities)
    record("dscores", dscores)
    return AttentionGradients(dquery.transpose(1, 2), dkey.transpose(1, 2), dvalue.transpose(1, 2))


def split_heads(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3D) -> query, key, value: (B, T, H, K) each, views."""
    query, key, value = qkv.unflatten(2, (3, n_heads, -1)).unbind(2)
    return query, key, value


def self_attention_forward(
    qkv: Tensor,
    n_heads: int,
    visible: Visible = CAUSAL,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> tuple[Tensor, SelfAttentionCache]:
    """context = attention(query, key, value), which lie side by side in qkv.

    qkv (B, T, 3D): each of the three has H heads of K = D / H -> context (B, T, D).

    >>> qkv = torch.tensor([[[0.0, 0.0, 1.0], [0.0, 0.0, 3.0]]])  # query and key are 0, the values 1 and 3
    >>> context, cache = self_attention_forward(qkv, n_heads=1)
    >>> context.flatten(), self_attention_backward(torch.ones(1, 2, 1), cache)[0, :, 2]
    (tensor([1., 2.]), tensor([1.5000, 0.5000]))
    """
    query, key, value = split_heads(qkv, n_heads)
    context, attention_cache = attention_forward(query, key, value, visible, dropout, record)
    return context.flatten(2), (qkv, attention_cache, n_heads)


def self_attention_backward(dcontext: Tensor, cache: SelfAttentionCache, record: Record = no_record) -> Tensor:
    """dcontext (B, T, D) -> dqkv (B, T, 3D)."""
    qkv, attention_cache, n_heads = cache
    dqkv = torch.empty_like(qkv)
    dquery, dkey, dvalue = split_heads(dqkv, n_heads)  # views of dqkv: writing to them fills it
    dcontext = dcontext.unflatten(2, (n_heads, -1))  # (B, T, H, K)
    # context = attention(query, key, value)
    gradients = attention_backward(dcontext, attention_cache, record)
    dquery.copy_(gradients.dquery)
    dkey.copy_(gradients.dkey)
    dvalue.copy_(gradients.dvalue)
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
    """context = attention(query, key, value), where key and value lie side by side in key_value, of another sequence.

    query (B, T, H K), key_value (B, S, 2 G K) -> context (B, T, H K). Each of the G key and value heads serves H / G
    query heads, so its gradient is the sum of H / G gradients.

    >>> key_value = torch.tensor([[[0.0, 1.0], [0.0, 3.0]]])  # keys are 0, the values 1 and 3
    >>> context, cache = cross_attention_forward(torch.zeros(1, 1, 1), key_value, n_heads=1, n_kv_heads=1)
    >>> context, cross_attention_backward(torch.ones(1, 1, 1), cache).dkey_value
    (tensor([[[2.]]]), tensor([[[0.0000, 0.5000], [0.0000, 0.5000]]]))
    """
    heads = query.unflatten(2, (n_heads, -1))  # (B, T, H, K)
    shared = key_value.unflatten(2, (2, n_kv_heads, -1))  # (B, S, 2, G, K)
    key, value = shared.repeat_interleave(n_heads // n_kv_heads, dim=3).unbind(2)  # (B, S, H, K) each
    context, attention_cache = attention_forward(heads, key, value, visible, dropout, record)
    return context.flatten(2), (attention_cache, n_heads, n_kv_heads)


def cross_attention_backward(
    dcontext: Tensor, cache: CrossAttentionCache, record: Record = no_record
) -> CrossAttentionGradients:
    """dcontext (B, T, H K) -> dquery (B, T, H K), dkey_value (B, S, 2 G K)."""
    attention_cache, n_heads, n_kv_heads = cache
    # context = attention(query, key, value)
    dquery, dkey, dvalue = attention_backward(dcontext.unflatten(2, (n_heads, -1)), attention_cache, record)
    # key, value = shared, repeated H / G times: sum in float32 or wider, round once
    by_reader = wide(torch.stack((dkey, dvalue), dim=2)).unflatten(3, (n_kv_heads, -1))  # (B, S, 2, G, H / G, K)
    return CrossAttentionGradients(dquery.flatten(2), by_reader.sum(4).flatten(2).to(dcontext.dtype))
