"""The same network in plain PyTorch, line for line beside `custom.py`, with gradients by autograd: the proof.

What is missing here is what autograd does: there are no caches and no backward functions. Every name is that of the
hand-written network; `baseline.py` is the network as PyTorch users would write it.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from ..ops import Visible
from .mirror_step import (
    MirroredNetwork,
    cross_attention_mirror,
    dropout_mirror,
    feed_forward_mirror,
    gated_feed_forward_mirror,
    rotary_attention_mirror,
    self_attention_mirror,
)
from .network import DropoutSource, Memory, feed_forward_of, gated_feed_forward_of, linear_of, norm_of
from .recorder import scoped


class TorchTransformer(MirroredNetwork):
    """A decoder by autograd. It adds into the same `gradients` as the hand-written backward. Raises the errors of
    CustomTransformer.

    >>> from manual_backprop.common.batch import Batch
    >>> sizes = {"vocab_size": 16, "d_model": 16, "n_blocks": 1, "n_heads": 2, "d_ffn": 32, "precision": "fp64"}
    >>> by_hand, by_autograd = CustomTransformer(sizes), TorchTransformer(sizes)  # the same initial weights
    >>> batch = Batch(tokens=torch.tensor([[1, 2, 3]]), targets=torch.tensor([[2, 3, -100]]))
    >>> for network in (by_hand, by_autograd):
    ...     loss = network.loss_and_gradients(batch, denominator=2, step=1)
    >>> all(torch.allclose(by_hand.gradients[name], want) for name, want in by_autograd.gradients.items())
    True
    """

    def _training_step(
        self, tokens: Tensor, targets: Tensor, visible: Visible, denominator: int | Tensor, dropout: DropoutSource
    ) -> Tensor:
        x = self._hidden_forward(tokens, visible, dropout)
        return self._loss_forward(x, targets, denominator)

    def _step(
        self,
        tokens: Tensor,
        segments: Tensor | None,
        targets: Tensor,
        *,
        denominator: int | Tensor,
        dropout: DropoutSource,
    ) -> Tensor:
        return self._training_step(tokens, targets, Visible.within(segments), denominator, dropout)

    def _outputs_forward(self, tokens: Tensor, segments: Tensor | None, *, dropout: DropoutSource) -> Tensor:
        x = self._hidden_forward(tokens, Visible.within(segments), dropout)
        return F.linear(x, self.head)

    # From tokens to the last hidden state

    def _hidden_forward(
        self,
        tokens: Tensor,
        visible: Visible,
        dropout: DropoutSource,
        stack: str = "",
        memory: Memory | None = None,
    ) -> Tensor:
        """tokens (B, T) -> the last hidden state x (B, T, D).

        `stack` is the prefix of the blocks' names; `memory` is what their cross-attention reads.
        """
        x = self._embedding_forward(tokens, dropout, stack)
        return self._stack_forward(x, visible, dropout, stack, memory)

    def _stack_forward(
        self, x: Tensor, visible: Visible, dropout: DropoutSource, stack: str, memory: Memory | None
    ) -> Tensor:
        """x (B, T, D) -> x (B, T, D): all blocks, and the norm after them."""
        if self.config.traits.pre_norm:
            branch = None  # the next norm adds it to x first; before the first block there is none
            for block in self.stacks[stack]:
                x, branch = self.block_forward(self._pre_norm_block_forward, x, branch, block, visible, dropout, memory)
            _, x = self.norm_forward(x, branch, *norm_of(self.leaves, f"{stack}final_norm"))
            self._recording(f"{stack}final_norm.output", x)
        else:
            for block in self.stacks[stack]:
                x = self.block_forward(self._post_norm_block_forward, x, block, visible, dropout, memory)
        return x

    def _embedding_forward(self, tokens: Tensor, dropout: DropoutSource, stack: str = "") -> Tensor:
        """tokens (B, T) -> x = dropout(scale * W[tokens] + positions) (B, T, D); rotary positions come in attention.

        An encoder may read rows of numbers (B, T, C) in place of tokens: x = dropout(numbers W^T + b + positions).
        """
        table, places = self.tables[stack]
        if self.config.n_inputs is not None:
            x = F.linear(tokens, self.leaves[table], self.leaves["input.bias"]).to(self.config.get_dtype())
        else:
            x = F.embedding(tokens, self.leaves[table])
            if self.config.traits.scaled_embedding:
                x = x * math.sqrt(self.config.d_model)
        if self.config.position_kind == "learned":
            x = x + self.leaves[places][: tokens.shape[1]]
        elif self.config.position_kind == "sinusoidal":
            x = x + self.position_table[: tokens.shape[1]].to(x.dtype)
        x = dropout_mirror(x, dropout.at(f"{stack}embedding"))
        self._recording(f"{stack}embedding.output", x)
        return x

    # A block, pre-norm (gpt2, llama)

    def _pre_norm_block_forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        block: str,
        visible: Visible,
        dropout: DropoutSource,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x += branch; x += attention(norm(x)); x += cross_attention(norm(x), memory); branch = feed_forward(norm(x)).

        Without a memory there is no cross-attention. The next block computes the last sum, since its first norm reads
        it: sum and norm are one pair.
        x, branch (B, T, D) -> x, branch (B, T, D).
        """
        p = self.block_parameters[block]
        record = scoped(self._recording, f"{block}.")
        x, normed = self.norm_forward(x, branch, *norm_of(p, "attention_norm"))
        record("input", x)
        record("attention_norm.output", normed)
        attended = self._attention_forward(normed, block, visible, dropout)
        if memory is not None:
            x, normed = self.norm_forward(x, attended, *norm_of(p, "cross_attention_norm"))
            record("cross_attention_norm.output", normed)
            attended = self._cross_attention_forward(normed, memory, block, dropout)
        x, normed = self.norm_forward(x, attended, *norm_of(p, "feed_forward_norm"))
        record("residual", x)
        record("feed_forward_norm.output", normed)
        branch = self._feed_forward_forward(normed, block, dropout)
        return x, branch

    # A block, post-norm (vaswani)

    def _post_norm_block_forward(
        self, x: Tensor, block: str, visible: Visible, dropout: DropoutSource, memory: Memory | None = None
    ) -> Tensor:
        """x = norm(x + attention(x)); x = norm(x + cross_attention(x, memory)); x = norm(x + feed_forward(x)).

        x (B, T, D) -> x (B, T, D). Without a memory there is no cross-attention.
        """
        p = self.block_parameters[block]
        record = scoped(self._recording, f"{block}.")
        record("input", x)
        attended = self._attention_forward(x, block, visible, dropout)
        _, x = self.norm_forward(x, attended, *norm_of(p, "attention_norm"))
        record("attention_norm.output", x)
        if memory is not None:
            crossed = self._cross_attention_forward(x, memory, block, dropout)
            _, x = self.norm_forward(x, crossed, *norm_of(p, "cross_attention_norm"))
            record("cross_attention_norm.output", x)
        branch = self._feed_forward_forward(x, block, dropout)
        _, x = self.norm_forward(x, branch, *norm_of(p, "feed_forward_norm"))
        record("feed_forward_norm.output", x)
        return x

    # The sublayers, which both blocks share

    def _attention_forward(self, x: Tensor, block: str, visible: Visible, dropout: DropoutSource) -> Tensor:
        """y = dropout(attention(x W_qkv^T + b_qkv) W_output^T + b_output). x (B, T, D) -> y (B, T, D)."""
        p = self.block_parameters[block]
        place = f"{block}.attention."
        record = scoped(self._recording, place)
        qkv = F.linear(x, *linear_of(p, "attention.qkv"))  # (B, T, 3D)
        record("qkv", qkv)
        dropped = dropout.at_heads(place + "probabilities")
        if self.config.traits.positions == "rotary":
            heads = self.config.n_heads, self.config.kv_heads
            context = rotary_attention_mirror(qkv, self.position_table, *heads, visible, dropped, record)
        else:
            context = self_attention_mirror(qkv, self.config.n_heads, visible, dropped, record)
        record("context", context)
        y = F.linear(context, *linear_of(p, "attention.output"))
        y = dropout_mirror(y, dropout.at(place + "output"))
        record("output", y)
        return y

    def _cross_attention_forward(self, x: Tensor, memory: Memory, block: str, dropout: DropoutSource) -> Tensor:
        """y = dropout(attention(x W_query^T, memory W_key_value^T) W_output^T). x (B, T, D), memory (B, S, D) ->
        y (B, T, D). No rotary positions here: positions of the target and of the source cannot be compared."""
        p = self.block_parameters[block]
        place = f"{block}.cross_attention."
        record = scoped(self._recording, place)
        query = F.linear(x, *linear_of(p, "cross_attention.query"))
        key_value = F.linear(memory.states, *linear_of(p, "cross_attention.key_value"))  # (B, S, 2GK)
        record("query", query)
        record("key_value", key_value)
        dropped = dropout.at_heads(place + "probabilities")
        heads = self.config.n_heads, self.config.kv_heads
        context = cross_attention_mirror(query, key_value, *heads, memory.visible, dropped, record)
        record("context", context)
        y = F.linear(context, *linear_of(p, "cross_attention.output"))
        y = dropout_mirror(y, dropout.at(place + "output"))
        record("output", y)
        return y

    def _feed_forward_forward(self, x: Tensor, block: str, dropout: DropoutSource) -> Tensor:
        """y = dropout(feed_forward(x)). x (B, T, D) -> y (B, T, D)."""
        p = self.block_parameters[block]
        place = f"{block}.feed_forward."
        record = scoped(self._recording, place)
        if self.config.traits.gated:
            y = gated_feed_forward_mirror(x, *gated_feed_forward_of(p), record=record)
        else:
            y = feed_forward_mirror(x, *feed_forward_of(p), self.activation, record=record)
        y = dropout_mirror(y, dropout.at(place + "output"))
        record("output", y)
        return y
