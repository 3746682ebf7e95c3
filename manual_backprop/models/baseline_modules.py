"""The modules of the baseline: `torch.nn`, one product for query, key and value, SDPA.

Their parameters' names are those of the hand-written network, but for what is fused here: `qkv`, `key_value`, `gated`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.schema import CustomTransformerConfig
from .autograd import block_forward, summed_loss


def norm(config: CustomTransformerConfig) -> nn.Module:
    if config.traits.norm == "rms":
        return nn.RMSNorm(config.d_model, eps=config.epsilon)
    return nn.LayerNorm(config.d_model, eps=config.epsilon)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x (B, heads, T, K), cosine and sine (T, K)."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


class Keys(NamedTuple):
    """Which keys are seen: `mask` (B, 1, T or 1, S) or None for all, or for all up to a query's own place (causal).

    A row without any key sees all of them in `mask`, and `there` (B, 1, 1, 1) makes nothing of that.
    """

    causal: bool = False
    mask: Tensor | None = None
    there: Tensor | None = None

    @classmethod
    def of_lengths(cls, lengths: Tensor, S: int) -> Keys:
        """The first so many of S keys, in every row."""
        mask = torch.arange(S, device=lengths.device) < lengths[:, None]
        there = (lengths > 0)[:, None]
        return cls(False, (mask | ~there)[:, None, None], there[:, None, None])


class AnyAttention(nn.Module):
    """What attention has in common, wherever its keys come from."""

    def __init__(self, config: CustomTransformerConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.kv_heads, config.d_head
        self.dropout = config.dropout
        self.output = nn.Linear(config.d_model, config.d_model, bias=config.traits.biases)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Keys) -> Tensor:
        """query (B, H, T, K), key and value (B, G, S, K) -> (B, T, D)."""
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=keys.mask,
            is_causal=keys.causal and keys.mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )
        if keys.there is not None:
            context = torch.where(keys.there, context, 0)
        return self.output(context.transpose(1, 2).flatten(2))


class Attention(AnyAttention):
    """Of a sequence with itself."""

    def __init__(self, config: CustomTransformerConfig):
        super().__init__(config)
        heads = self.n_heads + 2 * self.n_kv_heads
        self.qkv = nn.Linear(config.d_model, heads * self.d_head, bias=config.traits.biases)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, keys: Keys) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.d_head)).transpose(1, 2)  # (B, H + 2G, T, K)
        query, key, value = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=1)
        if rotation is not None:
            cosine, sine = (table.to(query.dtype) for table in rotation)
            query, key = rotated(query, cosine, sine), rotated(key, cosine, sine)
        return self.attend(query, key, value, keys)


class CrossAttention(AnyAttention):
    """Of the target with the memory, which the encoder has made of the source."""

    def __init__(self, config: CustomTransformerConfig):
        super().__init__(config)
        biases = config.traits.biases
        self.query = nn.Linear(config.d_model, config.d_model, bias=biases)
        self.key_value = nn.Linear(config.d_model, 2 * self.n_kv_heads * self.d_head, bias=biases)

    def forward(self, x: Tensor, memory: Tensor, keys: Keys) -> Tensor:
        query = self.query(x).unflatten(-1, (-1, self.d_head)).transpose(1, 2)
        key, value = self.key_value(memory).unflatten(-1, (-1, self.d_head)).transpose(1, 2).chunk(2, dim=1)
        return self.attend(query, key, value, keys)


class FeedForward(nn.Module):
    def __init__(self, config: CustomTransformerConfig, activation: str):
        super().__init__()
        self.activation = {
            "gelu_tanh": nn.GELU(approximate="tanh"),
            "gelu": nn.GELU(),
            "relu": nn.ReLU(),
        }[activation]
        self.hidden = nn.Linear(config.d_model, config.d_ffn)
        self.output = nn.Linear(config.d_ffn, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.activation(self.hidden(x)))


class GatedFeedForward(nn.Module):
    """SwiGLU, gate and hidden layer in one product."""

    def __init__(self, config: CustomTransformerConfig):
        super().__init__()
        self.gated = nn.Linear(config.d_model, 2 * config.d_ffn, bias=False)
        self.output = nn.Linear(config.d_ffn, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, hidden = self.gated(x).chunk(2, dim=-1)
        return self.output(F.silu(gate) * hidden)


class Block(nn.Module):
    def __init__(self, config: CustomTransformerConfig, activation: str, reads_memory: bool):
        super().__init__()
        self.pre_norm, self.reads_memory = config.traits.pre_norm, reads_memory
        self.attention_norm, self.feed_forward_norm = norm(config), norm(config)
        self.attention = Attention(config)
        if reads_memory:
            self.cross_attention_norm, self.cross_attention = norm(config), CrossAttention(config)
        self.feed_forward = GatedFeedForward(config) if config.traits.gated else FeedForward(config, activation)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        keys: Keys,
        memory: Tensor | None = None,
        memory_keys: Keys | None = None,
    ) -> Tensor:
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), rotation, keys))
            if self.reads_memory:
                x = x + self.dropout(self.cross_attention(self.cross_attention_norm(x), memory, memory_keys))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, rotation, keys)))
        if self.reads_memory:
            x = self.cross_attention_norm(x + self.dropout(self.cross_attention(x, memory, memory_keys)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Blocks(nn.Module):
    """Blocks one after the other, and the norm behind them."""

    def __init__(self, config: CustomTransformerConfig, activation: str, n_blocks: int, reads_memory: bool = False):
        super().__init__()
        self.recompute = config.recompute == "block"
        self.blocks = nn.ModuleList(Block(config, activation, reads_memory) for _ in range(n_blocks))
        self.final_norm = norm(config) if config.traits.pre_norm else nn.Identity()

    def through(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, keys: Keys, *memory: Tensor | Keys) -> Tensor:
        """x (B, T, D) -> (B, T, D); `memory` and which of its places are seen, for blocks that read one."""
        for block in self.blocks:
            x = block_forward(block, self.recompute, x, rotation, keys, *memory)
        return self.final_norm(x)


class Decoder(Blocks):
    """Tokens to logits, and to the loss."""

    def __init__(self, config: CustomTransformerConfig, activation: str, table: Tensor | None):
        super().__init__(config, activation, config.n_blocks)
        traits = config.traits
        self.scale = math.sqrt(config.d_model) if traits.scaled_embedding else 1.0
        self.label_smoothing = config.label_smoothing
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        if traits.positions == "learned":
            self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model)
        self.positions = traits.positions
        self.table = table  # of sinusoids (T, D), or of cosines and sines (2, T, K); not a buffer: it keeps its format
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, V)."""
        length, rotation = tokens.shape[1], None
        x = self.token_embedding(tokens)
        if self.scale != 1.0:
            x = x * self.scale
        if self.positions == "learned":
            x = x + self.position_embedding.weight[:length]
        elif self.positions == "sinusoidal":
            assert self.table is not None
            x = x + self.table[:length].to(x.dtype)
        else:
            assert self.table is not None
            rotation = self.table[0, :length], self.table[1, :length]
        return self.head(self.through(self.dropout(x), rotation, Keys(True, mask)))

    def loss(self, tokens: Tensor, targets: Tensor, mask: Tensor | None, denominator: Tensor) -> Tensor:
        return summed_loss(self(tokens, mask), targets, self.label_smoothing, denominator)
