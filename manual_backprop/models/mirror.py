"""The same network in plain PyTorch, line for line beside `custom.py`, with gradients by autograd: the proof.

What is missing here is what autograd does: no caches, no backward functions. What PyTorch users would write instead of
this is another file's business; here every name is the hand-written one's.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from ..ops import Visible
from .autograd import summed_loss
from .mirror_step import MirroredNetwork, dropout_mirror, rotary_attention_mirror, self_attention_mirror
from .network import DropoutSource, feed_forward_of, gated_feed_forward_of, norm_of
from .recorder import scoped


class TorchTransformer(MirroredNetwork):
    """A decoder by autograd, which adds into the same `gradients` that the hand-written backward adds into."""

    def _training_step(
        self, tokens: Tensor, targets: Tensor, visible: Visible, denominator: Tensor, dropout: DropoutSource
    ) -> Tensor:
        record, smoothing = self._recording, self.config.label_smoothing
        x = self._hidden_forward(tokens, visible, dropout)
        logits = F.linear(x, self.head)
        record("logits", logits)
        return summed_loss(logits, targets, smoothing, denominator)

    def _logits_forward(self, tokens: Tensor, visible: Visible, dropout: DropoutSource) -> Tensor:
        x = self._hidden_forward(tokens, visible, dropout)
        return F.linear(x, self.head)

    # From tokens to the last hidden state

    def _hidden_forward(self, tokens: Tensor, visible: Visible, dropout: DropoutSource) -> Tensor:
        """tokens (B, T) -> what the vocabulary projection reads, x (B, T, D)."""
        x = self._embedding_forward(tokens, dropout)
        if self.config.traits.pre_norm:
            branch = None  # what the next norm adds to x before it normalizes: nothing yet
            for block in range(self.config.n_blocks):
                x, branch = self.block_forward(self._pre_norm_block_forward, x, branch, block, visible, dropout)
            _, x = self.norm_forward(x, branch, *norm_of(self.leaves, "final_norm"))
            self._recording("final_norm.output", x)
        else:
            for block in range(self.config.n_blocks):
                x = self.block_forward(self._post_norm_block_forward, x, block, visible, dropout)
        return x

    def _embedding_forward(self, tokens: Tensor, dropout: DropoutSource) -> Tensor:
        """tokens (B, T) -> x = dropout(scale * W[tokens] + positions) (B, T, D); rotary positions come in attention."""
        weight = self.leaves["token_embedding.weight"]
        x = F.embedding(tokens, weight)
        if self.config.traits.scaled_embedding:
            x = x * math.sqrt(self.config.d_model)
        if self.config.traits.positions == "learned":
            x = x + self.leaves["position_embedding.weight"][: tokens.shape[1]]
        elif self.config.traits.positions == "sinusoidal":
            x = x + self.position_table[: tokens.shape[1]].to(x.dtype)
        x = dropout_mirror(x, dropout.at("embedding"))
        self._recording("embedding.output", x)
        return x

    # A block, pre-norm (gpt2, llama)

    def _pre_norm_block_forward(
        self, x: Tensor, branch: Tensor | None, block: int, visible: Visible, dropout: DropoutSource
    ) -> tuple[Tensor, Tensor]:
        """x += branch; x += attention(norm(x)); branch = feed_forward(norm(x)).

        The last sum is left to the next block, whose first norm reads it: sum and norm are one pair.
        x, branch (B, T, D) -> x, branch (B, T, D).
        """
        p = self.block_parameters[block]
        record = scoped(self._recording, f"blocks.{block}.")
        x, normed = self.norm_forward(x, branch, *norm_of(p, "attention_norm"))
        record("input", x)
        record("attention_norm.output", normed)
        attended = self._attention_forward(normed, block, visible, dropout)
        x, normed = self.norm_forward(x, attended, *norm_of(p, "feed_forward_norm"))
        record("residual", x)
        record("feed_forward_norm.output", normed)
        branch = self._feed_forward_forward(normed, block, dropout)
        return x, branch

    # A block, post-norm (vaswani)

    def _post_norm_block_forward(self, x: Tensor, block: int, visible: Visible, dropout: DropoutSource) -> Tensor:
        """x = norm(x + attention(x)); x = norm(x + feed_forward(x)). x (B, T, D) -> x (B, T, D)."""
        p = self.block_parameters[block]
        record = scoped(self._recording, f"blocks.{block}.")
        record("input", x)
        attended = self._attention_forward(x, block, visible, dropout)
        _, x = self.norm_forward(x, attended, *norm_of(p, "attention_norm"))
        record("attention_norm.output", x)
        branch = self._feed_forward_forward(x, block, dropout)
        _, x = self.norm_forward(x, branch, *norm_of(p, "feed_forward_norm"))
        record("feed_forward_norm.output", x)
        return x

    # The two sublayers, which both blocks share

    def _attention_forward(self, x: Tensor, block: int, visible: Visible, dropout: DropoutSource) -> Tensor:
        """y = dropout(attention(x W_qkv^T + b_qkv) W_output^T + b_output). x (B, T, D) -> y (B, T, D).

        Where an architecture has no biases, `get` finds None, which is what `linear` takes for none.
        """
        p = self.block_parameters[block]
        place = f"blocks.{block}.attention."
        record = scoped(self._recording, place)
        qkv = F.linear(x, p["attention.qkv.weight"], p.get("attention.qkv.bias"))  # (B, T, 3D)
        record("qkv", qkv)
        dropped = dropout.at_heads(place + "probabilities")
        if self.config.traits.positions == "rotary":
            heads = self.config.n_heads, self.config.kv_heads
            context = rotary_attention_mirror(qkv, self.position_table, *heads, visible, dropped, record)
        else:
            context = self_attention_mirror(qkv, self.config.n_heads, visible, dropped, record)
        record("context", context)
        y = F.linear(context, p["attention.output.weight"], p.get("attention.output.bias"))
        y = dropout_mirror(y, dropout.at(place + "output"))
        record("output", y)
        return y

    def _feed_forward_forward(self, x: Tensor, block: int, dropout: DropoutSource) -> Tensor:
        """y = dropout(feed_forward(x)). x (B, T, D) -> y (B, T, D)."""
        p = self.block_parameters[block]
        place = f"blocks.{block}.feed_forward."
        record = scoped(self._recording, place)
        if self.config.traits.gated:
            gated_weight, output_weight = gated_feed_forward_of(p)
            gated = F.linear(x, gated_weight)
            record("gated", gated)
            gate, hidden = gated.chunk(2, dim=-1)
            activated, output_bias = F.silu(gate) * hidden, None
        else:
            hidden_weight, hidden_bias, output_weight, output_bias = feed_forward_of(p)
            hidden = F.linear(x, hidden_weight, hidden_bias)
            record("hidden", hidden)
            if self.activation == "relu":
                activated = F.relu(hidden)
            else:
                activated = F.gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        record("activated", activated)
        y = F.linear(activated, output_weight, output_bias)
        y = dropout_mirror(y, dropout.at(place + "output"))
        record("output", y)
        return y
