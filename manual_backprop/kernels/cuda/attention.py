"""Attention by PyTorch's fused kernels, forward and backward called by name, with the log-sum-exp as cache.

cuDNN's or flash attention for 16-bit numbers, the memory-efficient one for float32 and on GPUs before Ampere. What
these do not support (a document mask, padding, dropout of the probabilities with this project's masks, odd head sizes,
float64) runs as PyTorch's matrix products, some sequences at a time (`kernels.cpu.attention`), and the run's log says
so once.
"""

import functools
import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops import attention as textbook
from ...ops.attention import AttentionGradients, CrossAttentionGradients, split_heads
from ...ops.dropout import Dropout
from ...ops.numerics import Record, no_record
from ...ops.visible import CAUSAL, EVERYTHING, Visible
from ..cpu import attention as tiles

log = logging.getLogger(__name__)
aten = torch.ops.aten

# As PyTorch chooses (sdp_utils.cpp), by compute capability
FLASH_FROM = (8, 0)
FASTER_CUDNN = ((9, 0), (10, 0), (10, 3))  # than flash attention
CUDNN_VERSION = 91501  # the first one that is right for lengths that are no multiple of 128
WIDEST = 256  # the largest K; cuDNN's kernel supports half of it
WIDEST_ELSEWHERE = 192  # on GPUs with less shared memory than those of data centers: 8.6, 8.9, 12.0

told: set[str] = set()  # reasons, already logged, why attention is not fused; cleared for each network


class Fused(NamedTuple):
    """The cache of a fused forward: query and context (B, T, H, K), key and value (B, S, G, K)."""

    kind: str
    query: Tensor
    key: Tensor
    value: Tensor
    context: Tensor
    causal: bool
    statistics: tuple[Any, ...]  # the log-sum-exp, and the kernel's other inputs of backward


AttentionCache = Fused | tuple[Any, ...]
SelfAttentionCache = tuple[Fused, int] | tuple[Any, ...]
CrossAttentionCache = tuple[Fused, int, int] | tuple[Any, ...]


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visible = CAUSAL,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> tuple[Tensor, AttentionCache]:
    """context = dropout(softmax(mask(query key^T / sqrt(K)))) value: `ops.attention_forward`."""
    fused = fused_forward(query, key, value, visible, dropout, record)
    if fused is None:
        return tiles.attention_forward(query, key, value, visible, dropout, record)
    return fused.context, fused


def attention_backward(dcontext: Tensor, cache: AttentionCache, record: Record = no_record) -> AttentionGradients:
    """dcontext (B, T, H, K) -> dquery (B, T, H, K), dkey and dvalue (B, S, G, K): `ops.attention_backward`."""
    if isinstance(cache, Fused):
        return fused_backward(dcontext, cache, record)
    return tiles.attention_backward(dcontext, cache, record)


def self_attention_forward(
    qkv: Tensor,
    n_heads: int,
    visible: Visible = CAUSAL,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> tuple[Tensor, SelfAttentionCache]:
    """context = attention(query, key, value): `ops.self_attention_forward`. qkv (B, T, 3D) -> context (B, T, D)."""
    fused = fused_forward(*split_heads(qkv, n_heads), visible, dropout, record)
    if fused is None:
        return tiles.self_attention_forward(qkv, n_heads, visible, dropout, record)
    return fused.context.flatten(2), (fused, n_heads)


def self_attention_backward(dcontext: Tensor, cache: SelfAttentionCache, record: Record = no_record) -> Tensor:
    """dcontext (B, T, D) -> dqkv (B, T, 3D): `ops.self_attention_backward`."""
    if not isinstance(cache[0], Fused):
        return tiles.self_attention_backward(dcontext, cache, record)
    fused, n_heads = cache
    gradients = fused_backward(dcontext.unflatten(2, (n_heads, -1)), fused, record)
    return torch.cat(gradients, dim=2).flatten(2)


def cross_attention_forward(
    query: Tensor,
    key_value: Tensor,
    n_heads: int,
    n_kv_heads: int,
    visible: Visible = EVERYTHING,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> tuple[Tensor, CrossAttentionCache]:
    """context = attention(query, key, value), key and value side by side: `ops.cross_attention_forward`."""
    key, value = key_value.unflatten(2, (2, n_kv_heads, -1)).unbind(2)
    fused = fused_forward(query.unflatten(2, (n_heads, -1)), key, value, visible, dropout, record)
    if fused is None:
        return tiles.cross_attention_forward(query, key_value, n_heads, n_kv_heads, visible, dropout, record)
    return fused.context.flatten(2), (fused, n_heads, n_kv_heads)


def cross_attention_backward(
    dcontext: Tensor, cache: CrossAttentionCache, record: Record = no_record
) -> CrossAttentionGradients:
    """dcontext (B, T, H K) -> dquery (B, T, H K), dkey_value (B, S, 2 G K): `ops.cross_attention_backward`."""
    if not isinstance(cache[0], Fused):
        return tiles.cross_attention_backward(dcontext, cache, record)
    fused, n_heads, _ = cache
    dquery, dkey, dvalue = fused_backward(dcontext.unflatten(2, (n_heads, -1)), fused, record)
    return CrossAttentionGradients(dquery.flatten(2), torch.cat((dkey, dvalue), dim=2).flatten(2))


def fused_forward(
    query: Tensor, key: Tensor, value: Tensor, visible: Visible, dropout: Dropout | None, record: Record
) -> Fused | None:
    """query (B, T, H, K), key and value (B, S, G, K), each for H / G consecutive query heads -> the cache, which
    holds the context. None if no fused kernel supports these; the log gives the reason."""
    kind, reason = _choose(query, key, visible, dropout)
    if kind is None:
        if reason not in told:
            told.add(reason)
            log.warning("attention takes more time and memory than fused: %s", reason)
        return None
    if any(map(record.wants, tiles.RECORDED)):  # a fused kernel does not store these
        textbook.attention_forward(*tiles.turned(query, key, value, None), visible, dropout, record)
    by_head = [x.transpose(1, 2) for x in (query, key, value)]  # (B, H, T, K)
    causal, scale = visible.causal, 1 / math.sqrt(query.shape[-1])
    if kind == "cudnn":
        context, *statistics, _ = aten._scaled_dot_product_cudnn_attention(
            *by_head, None, True, 0.0, causal, False, scale=scale
        )
    elif kind == "flash":
        context, *statistics, _ = aten._scaled_dot_product_flash_attention(*by_head, 0.0, causal, False, scale=scale)
    else:
        context, *statistics = aten._scaled_dot_product_efficient_attention(
            *by_head, None, True, 0.0, causal, scale=scale
        )
    return Fused(kind, query, key, value, context.transpose(1, 2), causal, tuple(statistics))


def fused_backward(dcontext: Tensor, cache: Fused, record: Record) -> AttentionGradients:
    """dcontext (B, T, H, K) -> dquery (B, T, H, K), dkey and dvalue (B, S, G, K)."""
    kind, query, key, value, context, causal, statistics = cache
    dcontext = dcontext.to(query.dtype)
    if any(map(record.wants, tiles.RECORDED)):
        _, textbook_cache = textbook.attention_forward(*tiles.turned(query, key, value, None), Visible(causal))
        textbook.attention_backward(dcontext, textbook_cache, record)
    inputs = [x.transpose(1, 2) for x in (dcontext, query, key, value)]
    context, scale = context.transpose(1, 2), 1 / math.sqrt(query.shape[-1])
    if kind == "cudnn":
        logsumexp, cum_q, cum_k, max_q, max_k, seed, offset = statistics
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            *inputs, context, logsumexp, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, causal, scale=scale
        )
    elif kind == "flash":
        logsumexp, cum_q, cum_k, max_q, max_k, seed, offset = statistics
        gradients = aten._scaled_dot_product_flash_attention_backward(
            *inputs, context, logsumexp, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset, scale=scale
        )
    else:
        logsumexp, seed, offset = statistics
        *gradients, _ = aten._scaled_dot_product_efficient_attention_backward(
            *inputs, None, context, logsumexp, seed, offset, 0.0, [True, True, True, False], causal, scale=scale
        )
    return AttentionGradients(*[gradient.transpose(1, 2) for gradient in gradients])


def _choose(query: Tensor, key: Tensor, visible: Visible, dropout: Dropout | None) -> tuple[str | None, str]:
    """The kernel that supports these, or the reason why none does."""
    (_, T, H, K), (S, G) = query.shape, key.shape[1:3]
    if visible.query_segments is not None:
        return None, "documents are masked (batching.mask_documents=false trains without)"
    if visible.key_lengths is not None:
        return None, "what is padded is masked"
    if dropout is not None and dropout.probability:
        return None, f"its probabilities are dropped (model.dropout={dropout.probability})"
    if visible.causal and T != S:
        return None, f"{T} queries see {S} keys causally"
    narrow, dtype = query.dtype in (torch.float16, torch.bfloat16), str(query.dtype).removeprefix("torch.")
    if not narrow and query.dtype != torch.float32:
        return None, f"no kernel takes {dtype}"
    kind, capability = "efficient", _capability(query.device)
    if narrow and capability >= FLASH_FROM:
        # cuDNN does not support S = 1 (PyTorch's can_use_cudnn_attention)
        kind = "cudnn" if H == G and S > 1 and 2 * K <= WIDEST and _prefers_cudnn(query.device) else "flash"
    large = kind == "efficient" or capability in (FLASH_FROM, *FASTER_CUDNN)
    widest = WIDEST if large else WIDEST_ELSEWHERE
    if K % 8 or widest < K:
        return None, f"a head of {K} is no multiple of 8 up to {widest} (model.d_model / model.n_heads)"
    if kind == "efficient" and torch.are_deterministic_algorithms_enabled():
        return None, f"in {dtype} no kernel promises the same bits each time on this GPU (device.deterministic)"
    if kind == "efficient" and H != G:
        return None, f"in {dtype}, keys and values that several queries share are repeated for each on this GPU"
    return kind, ""


def _prefers_cudnn(device: torch.device) -> bool:
    """Whether to use cuDNN's kernel: not in deterministic mode, where flash attention guarantees the same bits."""
    return not torch.are_deterministic_algorithms_enabled() and _has_fast_cudnn(device)


@functools.cache
def _has_fast_cudnn(device: torch.device) -> bool:
    if not torch.cuda.is_available() or not torch.backends.cudnn.is_available():
        return False
    version = torch.backends.cudnn.version() or 0
    return _capability(device) in FASTER_CUDNN and version >= CUDNN_VERSION


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; that of an H100 if there is none and a step is only traced."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)
