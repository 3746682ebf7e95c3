"""Every op in plain torch, for autograd: `name_mirror` takes the arguments of `name_forward` and returns its outputs.

It shares no line with `ops` except the dropout mask, whose randomness is not part of the calculus. Where possible it
computes in another way: heads one by one, an additive mask, complex numbers.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.mirror_step import dropout_mirror
from ...ops import CAUSAL, EVERYTHING, IGNORED, Dropout, Visible
from ...ops.numerics import NARROW

# Embedding


def token_embedding_mirror(tokens: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    return F.embedding(tokens, weight) * scale


def learned_positions_mirror(x: Tensor, weight: Tensor) -> Tensor:
    return x + weight[: x.shape[1]]


def sinusoidal_positions_mirror(x: Tensor, table: Tensor) -> Tensor:
    return x + table[: x.shape[1]].to(x.dtype)


# Normalization


def layer_norm_mirror(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


def residual_layer_norm_mirror(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float = 1e-5
) -> tuple[Tensor, Tensor]:
    total = x if branch is None else x + branch
    return total, layer_norm_mirror(total, weight, bias, epsilon)


def rms_norm_mirror(x: Tensor, weight: Tensor, epsilon: float = 1e-6) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, epsilon)


def residual_rms_norm_mirror(
    x: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    total = x if branch is None else x + branch
    return total, rms_norm_mirror(total, weight, epsilon)


# Linear, softmax, attention


def linear_mirror(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def softmax_mirror(x: Tensor) -> Tensor:
    empty = torch.isneginf(x).all(-1, keepdim=True)
    return F.softmax(x.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)


def attention_mirror(
    query: Tensor, key: Tensor, value: Tensor, visible: Visible = CAUSAL, dropout: Dropout | None = None
) -> Tensor:
    """Attention as sums over indices, with an additive mask. A query without keys sees all keys here; its result is
    multiplied by 0."""
    B, T, S = query.shape[0], query.shape[1], key.shape[1]
    hidden = torch.zeros(B, T, S, dtype=torch.bool, device=query.device)
    places, queries = (torch.arange(length, device=query.device) for length in (S, T))
    if visible.causal:  # counted from the end: the last query has the position of the last key
        hidden = hidden | (places.flip(0) < queries.flip(0)[:, None])
    if visible.key_lengths is not None:
        hidden = hidden | torch.stack([places >= length for length in visible.key_lengths])[:, None]
    if visible.query_segments is not None and visible.key_segments is not None:
        hidden = hidden | (visible.query_segments.unsqueeze(2) != visible.key_segments.unsqueeze(1))
    some = (~hidden).any(-1)  # (B, T)
    penalty = torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden & some[..., None], -math.inf)[:, None]
    scores = torch.einsum("bthk,bshk->bhts", query, key) * query.shape[-1] ** -0.5
    probabilities = F.softmax(scores + penalty, dim=-1)
    context = torch.einsum("bhts,bshk->bthk", dropout_mirror(probabilities, dropout), value)
    return context * some[..., None, None]


def self_attention_mirror(
    qkv: Tensor, n_heads: int, visible: Visible = CAUSAL, dropout: Dropout | None = None
) -> Tensor:
    query, key, value = (part.reshape(*qkv.shape[:2], n_heads, -1) for part in qkv.split(qkv.shape[2] // 3, dim=-1))
    return attention_mirror(query, key, value, visible, dropout).reshape(*qkv.shape[:2], -1)


def cross_attention_mirror(
    query: Tensor,
    key_value: Tensor,
    n_heads: int,
    n_kv_heads: int,
    visible: Visible = EVERYTHING,
    dropout: Dropout | None = None,
) -> Tensor:
    """Head by head."""
    keys, values = (part.chunk(n_kv_heads, dim=-1) for part in key_value.chunk(2, dim=-1))
    places = [head * n_kv_heads // n_heads for head in range(n_heads)]
    key, value = (torch.stack([part[place] for place in places], dim=2) for part in (keys, values))
    return attention_mirror(query.reshape(*query.shape[:2], n_heads, -1), key, value, visible, dropout).flatten(2)


# Rotary positions and shared keys and values


def rotary_mirror(qkv: Tensor, rotation: Tensor, n_turned: int) -> Tensor:
    """A pair is a complex number, and a rotation is a product."""
    d_head = 2 * rotation.shape[-1]
    wide = qkv.float() if qkv.dtype in NARROW else qkv
    cosine, sine = rotation[:, : qkv.shape[1]].to(wide.dtype).unsqueeze(2)
    first, second = wide.reshape(*qkv.shape[:2], -1, 2, d_head // 2).unbind(3)  # (B, T, H + 2G, K / 2)
    turned = torch.view_as_real(torch.complex(first, second) * torch.complex(cosine, sine))
    heads = torch.cat((turned[..., 0], turned[..., 1]), -1)
    kept = wide.reshape(*qkv.shape[:2], -1, d_head)
    return torch.cat((heads[:, :, :n_turned], kept[:, :, n_turned:]), 2).reshape(qkv.shape).to(qkv.dtype)


def repeat_heads_mirror(qkv: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """Head by head."""
    heads = qkv.reshape(*qkv.shape[:2], n_heads + 2 * n_kv_heads, -1).unbind(2)
    order = [
        *range(n_heads),
        *(n_heads + head * n_kv_heads // n_heads for head in range(n_heads)),
        *(n_heads + n_kv_heads + head * n_kv_heads // n_heads for head in range(n_heads)),
    ]
    return torch.cat([heads[place] for place in order], -1)


def rotary_attention_mirror(
    qkv: Tensor,
    rotation: Tensor,
    n_heads: int,
    n_kv_heads: int,
    visible: Visible = CAUSAL,
    dropout: Dropout | None = None,
) -> Tensor:
    turned = rotary_mirror(qkv, rotation, n_heads + n_kv_heads)
    return self_attention_mirror(repeat_heads_mirror(turned, n_heads, n_kv_heads), n_heads, visible, dropout)


# Activations and the feed-forward network


def relu_mirror(x: Tensor) -> Tensor:
    return F.relu(x)


def gelu_mirror(x: Tensor) -> Tensor:
    return F.gelu(x)


def gelu_tanh_mirror(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def bias_gelu_mirror(x: Tensor, bias: Tensor, tanh: bool = True) -> Tensor:
    return F.gelu(x + bias, approximate="tanh" if tanh else "none")


def feed_forward_mirror(
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    activation: str = "gelu_tanh",
) -> Tensor:
    activate = {"relu": relu_mirror, "gelu": gelu_mirror, "gelu_tanh": gelu_tanh_mirror}[activation]
    return F.linear(activate(F.linear(x, hidden_weight, hidden_bias)), output_weight, output_bias)


def swiglu_mirror(x: Tensor) -> Tensor:
    gate, hidden = x.chunk(2, dim=-1)
    return F.silu(gate) * hidden


def gated_feed_forward_mirror(x: Tensor, gated_weight: Tensor, output_weight: Tensor) -> Tensor:
    gate_weight, hidden_weight = gated_weight.chunk(2)
    return F.linear(F.silu(F.linear(x, gate_weight)) * F.linear(x, hidden_weight), output_weight)


# Loss


def cross_entropy_mirror(
    logits: Tensor,
    targets: Tensor,
    denominator: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    padding: int | None = None,
) -> Tensor:
    if padding is not None:
        count = max(int((targets != IGNORED).sum() if denominator is None else denominator), 1)
        q = F.one_hot(targets.clamp(min=0), logits.shape[-1]).to(logits.dtype) * (1 - label_smoothing)
        q = q + label_smoothing / (logits.shape[-1] - 1)
        q[..., padding] = 0
        return -(q * logits.log_softmax(-1)).sum(-1)[targets != IGNORED].sum() / count
    total = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        targets.reshape(-1),
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return total / max(int((targets != IGNORED).sum() if denominator is None else denominator), 1)


def linear_cross_entropy_mirror(x: Tensor, weight: Tensor, targets: Tensor, **settings: Any) -> Tensor:
    return cross_entropy_mirror(F.linear(x, weight), targets, **settings)


# One vector of a sequence, and squared error


def mean_pooling_mirror(x: Tensor, lengths: Tensor) -> Tensor:
    """Row by row."""
    return torch.stack(
        [row[:length].mean(0) if length else 0 * row.sum(0) for row, length in zip(x, lengths.tolist(), strict=True)]
    )


def first_position_mirror(x: Tensor) -> Tensor:
    return x.select(1, 0)


def squared_error_mirror(outputs: Tensor, targets: Tensor, denominator: int | Tensor | None = None) -> Tensor:
    counts = ~targets.isnan()
    total = F.mse_loss(outputs[counts], targets[counts], reduction="sum")
    return total / torch.as_tensor(counts.sum() if denominator is None else denominator).clamp(min=1)
