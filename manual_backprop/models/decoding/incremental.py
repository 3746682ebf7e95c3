"""Decoding with a key-value cache: the forward of `custom.py`, one token at a time.

A position sees only itself and earlier ones, so the keys and values of earlier positions never change: they are
computed once, and the next token costs one row instead of a whole window. Nothing here is differentiated. This file
reads a network's parameters by name and decodes for every implementation; it must agree with `network.predict` of the
whole window.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ... import ops
from ..network import FlatNetwork, Network, feed_forward_of, gated_feed_forward_of, linear_of, norm_of, packed_names


class IncrementalDecoder:
    """Gives the logits of the next token: call `decoder.read(prompt)`, then `decoder.read(token)` for each new token.

    A network sees `max_seq_len` tokens. When the next one does not fit, the window moves on by half its length and is
    read again, since positions count from the start of the window and no key stays valid. It moves by half: if it moved
    by one token, every token would read the whole window. On average this costs one more row for each token.

    The products are those of `predict`, for one row instead of many. In fp64 and fp32 their sums differ in the last
    bits only. In bf16 and bf16_mixed a logit is rounded to some 3 digits: the two best logits can be equal in one
    computation and a rounding step apart in the other. There the tokens agree if the best logit leads by more than such
    a step.
    """

    def __init__(
        self,
        network: Network,
        batch_size: int = 1,
        memory: Tensor | None = None,
        source_lengths: Tensor | None = None,
    ):
        """An encoder-decoder passes the memory (B, S, D), the encoder's output, and the lengths of the sources (B).
        Keys and values of the memory are computed here, once for each source, however many rows share it. The rows of
        one source lie side by side, the same number for each source."""
        config = network.config
        self.network, self.config = network, config
        self.stack = "" if memory is None else "decoder."
        self.blocks = [self._block_parameters(f"{self.stack}blocks.{block}") for block in range(config.n_blocks)]
        head = network.parameters["token_embedding.weight" if config.tied_head else "head.weight"]
        self.head = head.to(network.compute_dtype)
        norm_forward = getattr(ops, f"residual_{config.traits.norm}_norm_forward")
        self.norm_forward = partial(norm_forward, epsilon=config.epsilon)
        shape = (2, batch_size, config.kv_heads, config.max_seq_len, config.d_head)
        self.kept = [  # keys and values of each block: (2, B, G, max_seq_len, K), filled up to position `length`
            torch.empty(shape, dtype=network.compute_dtype, device=network.device) for _ in range(config.n_blocks)
        ]
        self.of_memory: list[tuple[Tensor, Tensor]] = []  # key and value of each block's cross-attention: (B, S, H, K)
        if memory is not None:
            self.visible = ops.Visible(causal=False, key_lengths=source_lengths)
            self.of_memory = [self._keys_of_memory(memory, block) for block in range(config.n_blocks)]
        self.window = torch.empty(batch_size, 0, dtype=torch.int64, device=network.device)
        self.length = 0

    def _block_parameters(self, block: str) -> dict[str, Tensor]:
        """The parameters of a block as in CustomTransformer, with the matrices already in the dtype of the products."""
        network, prefix = self.network, f"{block}."
        found = {name: p for name, p in network.parameters.items() if name.startswith(prefix)}
        for whole, names in packed_names(self.config, block).items():
            found[whole] = (
                network.flat_parameters.packed(names)
                if isinstance(network, FlatNetwork)
                else torch.cat([network.parameters[name].detach() for name in names])
            )
        return {
            name.removeprefix(prefix): p.to(network.compute_dtype) if p.dim() == 2 else p for name, p in found.items()
        }

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """tokens (B, t), which follow the tokens read so far -> logits (B, V) of the next token.

        Raises InputError for tokens that the network cannot read, and for more than max_seq_len at once.
        """
        self.network.check_tokens(tokens)
        self.window = torch.cat((self.window, tokens), dim=1)
        if self.window.shape[1] > self.config.max_seq_len:
            moved = max(1, self.config.max_seq_len // 2)
            self.window = self.window[:, moved:][:, -self.config.max_seq_len :]
            self.length, tokens = 0, self.window
        x = self._hidden(tokens)
        self.length += tokens.shape[1]
        logits, _ = ops.linear_forward(x[:, -1].to(self.network.compute_dtype), self.head)
        return logits

    def select(self, rows: Tensor) -> None:
        """Continues with these rows, in this order; some may be repeated, others dropped. rows (R) int64."""
        self.window = self.window[rows]
        for block, kept in enumerate(self.kept):
            known = kept[:, rows, :, : self.length]
            if len(rows) != kept.shape[1]:
                kept = self.kept[block] = kept.new_empty((2, len(rows), *kept.shape[2:]))
            kept[:, :, :, : self.length] = known

    def _hidden(self, tokens: Tensor) -> Tensor:
        """tokens (B, t) -> the last hidden state x (B, t, D)."""
        x = self._embedding(tokens)
        if self.config.traits.pre_norm:
            branch = None
            for block in range(self.config.n_blocks):
                x, branch = self._pre_norm_block(x, branch, block)
            (_, x), _ = self.norm_forward(x, branch, *norm_of(self.network.parameters, f"{self.stack}final_norm"))
        else:
            for block in range(self.config.n_blocks):
                x = self._post_norm_block(x, block)
        return x

    def _embedding(self, tokens: Tensor) -> Tensor:
        """tokens (B, t) -> x (B, t, D); their positions follow those of the tokens read so far."""
        scale = math.sqrt(self.config.d_model) if self.config.traits.scaled_embedding else 1.0
        x, _ = ops.token_embedding_forward(tokens, self.network.parameters["token_embedding.weight"], scale)
        if self.config.position_kind == "learned":
            table = self.network.parameters["position_embedding.weight"]
            x, _ = ops.learned_positions_forward(x, table[self.length :])
        elif self.config.position_kind == "sinusoidal":
            x, _ = ops.sinusoidal_positions_forward(x, self.network.position_table[self.length :])
        return x

    def _pre_norm_block(self, x: Tensor, branch: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
        """x += branch; x += attention(norm(x)); with a memory x += cross_attention(norm(x), memory);
        branch = feed_forward(norm(x))."""
        p = self.blocks[block]
        (x, normed), _ = self.norm_forward(x, branch, *norm_of(p, "attention_norm"))
        attended = self._attention(normed, block)
        if self.of_memory:
            (x, normed), _ = self.norm_forward(x, attended, *norm_of(p, "cross_attention_norm"))
            attended = self._cross_attention(normed, block)
        (x, normed), _ = self.norm_forward(x, attended, *norm_of(p, "feed_forward_norm"))
        return x, self._feed_forward(normed, block)

    def _post_norm_block(self, x: Tensor, block: int) -> Tensor:
        """x = norm(x + attention(x)); with a memory x = norm(x + cross_attention(x, memory));
        x = norm(x + feed_forward(x))."""
        p = self.blocks[block]
        (_, x), _ = self.norm_forward(x, self._attention(x, block), *norm_of(p, "attention_norm"))
        if self.of_memory:
            (_, x), _ = self.norm_forward(x, self._cross_attention(x, block), *norm_of(p, "cross_attention_norm"))
        (_, x), _ = self.norm_forward(x, self._feed_forward(x, block), *norm_of(p, "feed_forward_norm"))
        return x

    def _attention(self, x: Tensor, block: int) -> Tensor:
        """x (B, t, D) -> (B, t, D). Queries of the t new positions; keys and values of all positions in the window."""
        p, heads, kv_heads = self.blocks[block], self.config.n_heads, self.config.kv_heads
        qkv, _ = ops.linear_forward(x.to(self.network.compute_dtype), *linear_of(p, "attention.qkv"))
        if self.config.position_kind == "rotary":
            turns = self.network.position_table[:, self.length :]
            qkv, _ = ops.rotary_forward(qkv, turns, heads + kv_heads)
        query, key, value = (
            qkv.unflatten(2, (-1, self.config.d_head)).transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
        )
        kept, end = self.kept[block], self.length + x.shape[1]
        kept[0, :, :, self.length : end], kept[1, :, :, self.length : end] = key, value
        context = attend(query, kept[0, :, :, :end], kept[1, :, :, :end])
        return ops.linear_forward(context.transpose(1, 2).flatten(2), *linear_of(p, "attention.output"))[0]

    def _keys_of_memory(self, memory: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """memory (B, S, D) -> key and value (B, S, H, K), repeated where queries share them."""
        parameters = linear_of(self.blocks[block], "cross_attention.key_value")
        made, _ = ops.linear_forward(memory.to(self.network.compute_dtype), *parameters)
        parts = made.unflatten(2, (2, self.config.kv_heads, -1))
        if (shared := self.config.n_heads // self.config.kv_heads) > 1:
            parts = parts.repeat_interleave(shared, dim=3)
        return parts[:, :, 0], parts[:, :, 1]

    def _cross_attention(self, x: Tensor, block: int) -> Tensor:
        """x (R, t, D) -> (R, t, D). All rows of a source are queries of its one set of keys, so no key is copied."""
        p, (key, value) = self.blocks[block], self.of_memory[block]
        x = x.to(self.network.compute_dtype)
        query, _ = ops.linear_forward(x, *linear_of(p, "cross_attention.query"))
        query = query.reshape(len(key), -1, self.config.n_heads, self.config.d_head)  # (B, R / B t, H, K)
        context, _ = ops.attention_forward(query, key, value, self.visible)
        return ops.linear_forward(context.reshape(*x.shape[:2], -1), *linear_of(p, "cross_attention.output"))[0]

    def _feed_forward(self, x: Tensor, block: int) -> Tensor:
        p, x = self.blocks[block], x.to(self.network.compute_dtype)
        if self.config.traits.gated:
            return ops.gated_feed_forward_forward(x, *gated_feed_forward_of(p))[0]
        return ops.feed_forward_forward(x, *feed_forward_of(p), self.network.activation)[0]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """context = softmax(mask(query key^T / sqrt(K))) value, for the last t of S positions.

    query (B, H, t, K), key and value (B, G, S, K) -> context (B, H, t, K). The H / G query heads that share a key head
    are rows of one product, so no key is copied.
    """
    heads, shared, t, S = query.shape[1], key.shape[1], query.shape[2], key.shape[2]
    rows = (query * (1 / math.sqrt(query.shape[-1]))).unflatten(1, (shared, heads // shared)).flatten(2, 3)
    scores = (rows @ key.mT).unflatten(2, (heads // shared, t))  # (B, G, H / G, t, S)
    visible = ops.CAUSAL.mask(t, S, query.device)  # (1, 1, t, S)
    assert visible is not None
    probabilities, _ = ops.softmax_forward(torch.where(visible, scores, -math.inf))
    context = probabilities.flatten(2, 3) @ value  # (B, G, H / G * t, K)
    return context.unflatten(2, (heads // shared, t)).flatten(1, 2)
