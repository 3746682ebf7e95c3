"""The modules of the baseline: `torch.nn`, one product for query, key and value, SDPA.

Their parameters have the names of the hand-written network, except the fused ones: `qkv`, `key_value`, `gated`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.schema import CustomTransformerConfig
from .autograd import ACTIVATIONS, block_forward, head_loss


def norm(config: CustomTransformerConfig) -> nn.Module:
    if config.traits.norm == "rms":
        return nn.RMSNorm(config.d_model, eps=config.epsilon)
    return nn.LayerNorm(config.d_model, eps=config.epsilon)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x with rotary positions. x (B, heads, T, K), cosine and sine (T, K)."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


class Keys(NamedTuple):
    """The keys that a query sees: those of `mask` (B, 1, T or 1, S), or all, or those up to its position (causal).

    SDPA may return NaN where a query sees no key. So `mask` lets the queries of an empty row see all keys, and `there`
    (B, 1, 1, 1), False for such a row, sets their output to 0.
    """

    causal: bool = False
    mask: Tensor | None = None
    there: Tensor | None = None

    @classmethod
    def of_lengths(cls, lengths: Tensor, S: int) -> Keys:
        """The first `lengths[b]` of S keys are visible in row b."""
        mask = torch.arange(S, device=lengths.device) < lengths[:, None]
        there = (lengths > 0)[:, None]
        return cls(False, (mask | ~there)[:, None, None], there[:, None, None])


class AnyAttention(nn.Module):
    """What self-attention and cross-attention share."""

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
    """Self-attention."""

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
    """Attention of the target to the memory, the encoder's output for the source."""

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
        self.activation = ACTIVATIONS[activation]
        self.hidden = nn.Linear(config.d_model, config.d_ffn)
        self.output = nn.Linear(config.d_ffn, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.activation(self.hidden(x)))


class GatedFeedForward(nn.Module):
    """SwiGLU, with gate and hidden layer in one product."""

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
    """A stack of blocks, and the norm after them."""

    def __init__(self, config: CustomTransformerConfig, activation: str, n_blocks: int, reads_memory: bool = False):
        super().__init__()
        self.recompute = config.recompute == "block"
        self.blocks = nn.ModuleList(Block(config, activation, reads_memory) for _ in range(n_blocks))
        self.final_norm = norm(config) if config.traits.pre_norm else nn.Identity()

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, keys: Keys, *memory: Tensor | Keys) -> Tensor:
        """x (B, T, D) -> (B, T, D); `memory` and its visible positions, for blocks with cross-attention."""
        for block in self.blocks:
            x = block_forward(block, self.recompute, x, rotation, keys, *memory)
        return self.final_norm(x)


class Transformer(nn.Module):
    """What decoder, encoder and encoder-decoder share: scale of the embeddings, positions, dropout, a head and its
    loss."""

    def __init__(self, config: CustomTransformerConfig, table: Tensor | None, outputs: int, bias: bool = False):
        super().__init__()
        self.scale = math.sqrt(config.d_model) if config.traits.scaled_embedding else 1.0
        self.positions, self.reads_tokens = config.position_kind, config.n_inputs is None
        self.table = table  # sinusoids (T, D), or cosines and sines (2, T, K); not a buffer, so that it keeps its dtype
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.d_model, outputs, bias=bias)
        self.config = config

    def learned_positions(self, length: int) -> nn.Embedding | None:
        return nn.Embedding(length, self.config.d_model) if self.positions == "learned" else None

    def placed(self, x: Tensor, places: nn.Embedding | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x (B, T, D) with positions added, and the rotation of queries and keys (rotary positions)."""
        length, rotation = x.shape[1], None
        if self.scale != 1.0 and self.reads_tokens:
            x = x * self.scale
        if places is not None:
            x = x + places.weight[:length]
        elif self.positions == "sinusoidal":
            assert self.table is not None
            x = x + self.table[:length].to(x.dtype)
        elif self.positions == "rotary":
            assert self.table is not None
            rotation = self.table[0, :length], self.table[1, :length]
        return self.dropout(x), rotation

    def loss(self, *arguments: Any) -> Tensor:
        """arguments: those of `forward`, targets, denominator."""
        *inputs, targets, denominator = arguments
        return head_loss(self.config, self(*inputs), targets, denominator)


class Decoder(Transformer):
    """Maps tokens to logits."""

    def __init__(self, config: CustomTransformerConfig, activation: str, table: Tensor | None):
        super().__init__(config, table, config.vocab_size)
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = self.learned_positions(config.max_seq_len)
        self.decoder = Blocks(config, activation, config.n_blocks, reads_memory=config.network == "encoder_decoder")

    def forward(self, tokens: Tensor, mask: Tensor | None, *memory: Tensor | Keys) -> Tensor:
        """tokens (B, T) -> logits (B, T, V)."""
        x, rotation = self.placed(self.token_embedding(tokens), self.position_embedding)
        return self.head(self.decoder(x, rotation, Keys(True, mask), *memory))


class EncoderDecoder(Decoder):
    """Maps sources and shifted targets to logits."""

    def __init__(self, config: CustomTransformerConfig, activation: str, table: Tensor | None):
        super().__init__(config, activation, table)
        own = config.source_vocab_size
        self.source_embedding = nn.Embedding(own, config.d_model) if own else None
        self.source_position_embedding = self.learned_positions(config.source_length)
        self.encoder = Blocks(config, activation, config.encoder_blocks)

    def encode(self, source: Tensor, lengths: Tensor) -> Tensor:
        """source (B, S) -> memory (B, S, D)."""
        embedding = self.source_embedding or self.token_embedding
        x, rotation = self.placed(embedding(source), self.source_position_embedding)
        return self.encoder(x, rotation, Keys.of_lengths(lengths, source.shape[1]))

    def forward(self, source: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """source (B, S), tokens (B, T) -> logits (B, T, V)."""
        keys = Keys.of_lengths(lengths, source.shape[1])
        return super().forward(tokens, None, self.encode(source, lengths), keys)


class Encoder(Transformer):
    """Maps a sequence of tokens, or of vectors, to one vector of outputs."""

    def __init__(self, config: CustomTransformerConfig, activation: str, table: Tensor | None):
        assert config.n_outputs is not None
        super().__init__(config, table, config.n_outputs, bias=True)
        if config.n_inputs is None:
            self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        else:
            self.input = nn.Linear(config.n_inputs, config.d_model)
        self.position_embedding = self.learned_positions(config.max_seq_len)
        self.encoder = Blocks(config, activation, config.encoder_blocks)
        self.pooling = config.pooling

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """inputs (B, T) or (B, T, C) -> (B, n_outputs)."""
        x = self.token_embedding(inputs) if self.reads_tokens else self.input(inputs)
        x, rotation = self.placed(x, self.position_embedding)
        x = self.encoder(x, rotation, Keys.of_lengths(lengths, x.shape[1]))
        if self.pooling == "first":
            return self.head(x[:, 0])
        real = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
        return self.head(torch.where(real, x, 0).sum(1) / lengths.clamp(min=1)[:, None])
