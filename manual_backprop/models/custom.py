"""The transformer whose backward pass is written by hand: raw tensors, no autograd anywhere.

Every forward function is followed by its backward, which reads it from the last line to the first. `mirror.py` has the
same functions in the same order for autograd; the difference between the two files is what autograd does. Which kernels
serve the pairs, in which memory, and which steps are replayed, is the business of `step.py`.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..ops import Visible
from .network import DropoutSource, feed_forward_of, gated_feed_forward_of, norm_of
from .recorder import scoped
from .step import Cache, HandWrittenNetwork


class CustomTransformer(HandWrittenNetwork):
    """A decoder by hand. The gradient of `parameters[name]` is added into `gradients[name]`.

    In bf16_mixed the residual stream x stays in float32, as autocast leaves it, and what enters a matrix product is
    rounded: a stream in bfloat16 would be rounded at every sum, and past some 10 blocks its gradients' errors are more
    than twice autocast's. In the other precisions `.to(self.compute_dtype)` does nothing.
    """

    def _training_step(
        self, tokens: Tensor, targets: Tensor, visible: Visible, denominator: int | Tensor, dropout: DropoutSource
    ) -> Tensor:
        ops, record, smoothing = self.ops, self.recorder, self.config.label_smoothing
        x, hidden_cache = self._hidden_forward(tokens, visible, dropout)
        if ops.serves("linear_cross_entropy"):  # both halves at once: no logits have to be kept between them
            loss, dx = ops.linear_cross_entropy(
                x, self.head, targets, denominator, smoothing, self.dhead, record=record
            )
        else:
            loss, loss_cache = ops.linear_cross_entropy_forward(
                x, self.head, targets, denominator, smoothing, record=record
            )
            dx = ops.linear_cross_entropy_backward(1.0, loss_cache, self.dhead, record=record)
        self._hidden_backward(dx, hidden_cache)
        return loss

    def _logits_forward(
        self, tokens: Tensor, visible: Visible, dropout: DropoutSource, keep: bool = True
    ) -> tuple[Tensor, Cache]:
        x, hidden_cache = self._hidden_forward(tokens, visible, dropout, keep)
        logits, head_cache = self.ops.linear_forward(x, self.head)
        return logits, (hidden_cache, head_cache)

    def _logits_backward(self, dlogits: Tensor, cache: Cache) -> None:
        hidden_cache, head_cache = cache
        # logits = x head^T
        dx = self.ops.linear_backward(dlogits, head_cache, self.dhead)
        self._hidden_backward(dx, hidden_cache)

    # From tokens to the last hidden state

    def _hidden_forward(
        self, tokens: Tensor, visible: Visible, dropout: DropoutSource, keep: bool = True
    ) -> tuple[Tensor, Cache]:
        """tokens (B, T) -> what the vocabulary projection reads, x (B, T, D). `keep` the caches, for backward."""
        x, embedding_cache = self._embedding_forward(tokens, dropout)
        blocks, norm_cache = self._blocks(keep), None
        if self.config.traits.pre_norm:
            branch = None  # what the next norm adds to x before it normalizes: nothing yet
            for block in range(self.config.n_blocks):
                x, branch = blocks.forward(self._pre_norm_block_forward, x, branch, block, visible, dropout)
            (_, x), norm_cache = self.norm_forward(x, branch, *norm_of(self.parameters, "final_norm"))
            self.recorder("final_norm.output", x)
        else:
            for block in range(self.config.n_blocks):
                x = blocks.forward(self._post_norm_block_forward, x, block, visible, dropout)
        return x.to(self.compute_dtype), (embedding_cache, blocks, norm_cache)

    def _hidden_backward(self, dx: Tensor, cache: Cache) -> None:
        """dx (B, T, D); says of every block, from the last, when its gradients are complete, and then of the rest."""
        embedding_cache, blocks, norm_cache = cache
        if self.config.traits.pre_norm:
            self.recorder("final_norm.doutput", dx)
            # _, x = norm(x + branch); the sum is not used again, so nothing reaches it past the norm
            dx = dbranch = self.norm_backward(None, dx, norm_cache, *norm_of(self.gradients, "final_norm"))
            for block in reversed(range(self.config.n_blocks)):
                with blocks.last() as block_cache:
                    dx = dbranch = self._pre_norm_block_backward(dx, dbranch, block, block_cache)
                self.on_gradients_complete(block)
        else:
            for block in reversed(range(self.config.n_blocks)):
                with blocks.last() as block_cache:
                    dx = self._post_norm_block_backward(dx, block, block_cache)
                self.on_gradients_complete(block)
        self._embedding_backward(dx, embedding_cache)
        self.on_gradients_complete(None)

    def _embedding_forward(self, tokens: Tensor, dropout: DropoutSource) -> tuple[Tensor, Cache]:
        """tokens (B, T) -> x = dropout(scale * W[tokens] + positions) (B, T, D); rotary positions come in attention."""
        scale = math.sqrt(self.config.d_model) if self.config.traits.scaled_embedding else 1.0
        weight = self.parameters["token_embedding.weight"]
        x, token_cache = self.ops.token_embedding_forward(tokens, weight, scale)
        position_cache: Cache = None
        if self.config.traits.positions == "learned":
            x, position_cache = self.ops.learned_positions_forward(x, self.parameters["position_embedding.weight"])
        elif self.config.traits.positions == "sinusoidal":
            x, position_cache = self.ops.sinusoidal_positions_forward(x, self.position_table)
        x, dropout_cache = self.ops.dropout_forward(x, dropout.at("embedding"))
        self.recorder("embedding.output", x)
        return x, (token_cache, position_cache, dropout_cache)

    def _embedding_backward(self, dx: Tensor, cache: Cache) -> None:
        token_cache, position_cache, dropout_cache = cache
        self.recorder("embedding.doutput", dx)
        # x = dropout(scale * W[tokens] + positions)
        dx = self.ops.dropout_backward(dx, dropout_cache)
        if self.config.traits.positions == "learned":
            dx = self.ops.learned_positions_backward(dx, position_cache, self.gradients["position_embedding.weight"])
        elif self.config.traits.positions == "sinusoidal":
            dx = self.ops.sinusoidal_positions_backward(dx, position_cache)
        self.ops.token_embedding_backward(dx, token_cache, self.gradients["token_embedding.weight"])

    # A block, pre-norm (gpt2, llama)

    def _pre_norm_block_forward(
        self, x: Tensor, branch: Tensor | None, block: int, visible: Visible, dropout: DropoutSource
    ) -> tuple[tuple[Tensor, Tensor], Cache]:
        """x += branch; x += attention(norm(x)); branch = feed_forward(norm(x)).

        The last sum is left to the next block, whose first norm reads it: sum and norm are one pair.
        x, branch (B, T, D) -> x, branch (B, T, D).
        """
        p = self.block_parameters[block]
        record = scoped(self.recorder, f"blocks.{block}.")
        (x, normed), attention_norm_cache = self.norm_forward(x, branch, *norm_of(p, "attention_norm"))
        record("input", x)
        record("attention_norm.output", normed)
        attended, attention_cache = self._attention_forward(normed, block, visible, dropout)
        (x, normed), feed_forward_norm_cache = self.norm_forward(x, attended, *norm_of(p, "feed_forward_norm"))
        record("residual", x)
        record("feed_forward_norm.output", normed)
        branch, feed_forward_cache = self._feed_forward_forward(normed, block, dropout)
        return (x, branch), (attention_norm_cache, attention_cache, feed_forward_norm_cache, feed_forward_cache)

    def _pre_norm_block_backward(self, dx: Tensor, dbranch: Tensor, block: int, cache: Cache) -> Tensor:
        """dx, dbranch (B, T, D) -> the gradient of the block's x and branch alike (B, T, D)."""
        attention_norm_cache, attention_cache, feed_forward_norm_cache, feed_forward_cache = cache
        d = self.block_gradients[block]
        record = scoped(self.recorder, f"blocks.{block}.")
        # branch = feed_forward(normed)
        dnormed = self._feed_forward_backward(dbranch, block, feed_forward_cache)
        record("feed_forward_norm.doutput", dnormed)
        # x, normed = norm(x + attended)
        dx = dattended = self.norm_backward(dx, dnormed, feed_forward_norm_cache, *norm_of(d, "feed_forward_norm"))
        record("dresidual", dx)
        # attended = attention(normed)
        dnormed = self._attention_backward(dattended, block, attention_cache)
        record("attention_norm.doutput", dnormed)
        # x, normed = norm(x + branch)
        dx = self.norm_backward(dx, dnormed, attention_norm_cache, *norm_of(d, "attention_norm"))
        record("dinput", dx)
        return dx

    # A block, post-norm (vaswani)

    def _post_norm_block_forward(
        self, x: Tensor, block: int, visible: Visible, dropout: DropoutSource
    ) -> tuple[Tensor, Cache]:
        """x = norm(x + attention(x)); x = norm(x + feed_forward(x)). x (B, T, D) -> x (B, T, D)."""
        p = self.block_parameters[block]
        record = scoped(self.recorder, f"blocks.{block}.")
        record("input", x)
        attended, attention_cache = self._attention_forward(x, block, visible, dropout)
        (_, x), attention_norm_cache = self.norm_forward(x, attended, *norm_of(p, "attention_norm"))
        record("attention_norm.output", x)
        branch, feed_forward_cache = self._feed_forward_forward(x, block, dropout)
        (_, x), feed_forward_norm_cache = self.norm_forward(x, branch, *norm_of(p, "feed_forward_norm"))
        record("feed_forward_norm.output", x)
        return x, (attention_cache, attention_norm_cache, feed_forward_cache, feed_forward_norm_cache)

    def _post_norm_block_backward(self, dx: Tensor, block: int, cache: Cache) -> Tensor:
        """dx (B, T, D) -> dx (B, T, D)."""
        attention_cache, attention_norm_cache, feed_forward_cache, feed_forward_norm_cache = cache
        d = self.block_gradients[block]
        record = scoped(self.recorder, f"blocks.{block}.")
        record("feed_forward_norm.doutput", dx)
        # _, x = norm(x + branch)
        dx = dbranch = self.norm_backward(None, dx, feed_forward_norm_cache, *norm_of(d, "feed_forward_norm"))
        # branch = feed_forward(x), and x reaches the sum as well
        dx = dx + self._feed_forward_backward(dbranch, block, feed_forward_cache)
        record("attention_norm.doutput", dx)
        # _, x = norm(x + attended)
        dx = dattended = self.norm_backward(None, dx, attention_norm_cache, *norm_of(d, "attention_norm"))
        # attended = attention(x), and x reaches the sum as well
        dx = dx + self._attention_backward(dattended, block, attention_cache)
        record("dinput", dx)
        return dx

    # The two sublayers, which both blocks share

    def _attention_forward(
        self, x: Tensor, block: int, visible: Visible, dropout: DropoutSource
    ) -> tuple[Tensor, Cache]:
        """y = dropout(attention(x W_qkv^T + b_qkv) W_output^T + b_output). x (B, T, D) -> y (B, T, D).

        Where an architecture has no biases, `get` finds None, which is what `linear` takes for none.
        """
        p, ops = self.block_parameters[block], self.ops
        place = f"blocks.{block}.attention."
        record = scoped(self.recorder, place)
        x = x.to(self.compute_dtype)
        qkv, qkv_cache = ops.linear_forward(x, p["attention.qkv.weight"], p.get("attention.qkv.bias"))  # (B, T, 3D)
        attention_cache: Cache
        dropped = dropout.at_heads(place + "probabilities")
        if self.config.traits.positions == "rotary":
            heads = self.config.n_heads, self.config.kv_heads
            context, attention_cache = ops.rotary_attention_forward(
                qkv, self.position_table, *heads, visible, dropped, record
            )
        else:
            context, attention_cache = ops.self_attention_forward(qkv, self.config.n_heads, visible, dropped, record)
        y, output_cache = ops.linear_forward(context, p["attention.output.weight"], p.get("attention.output.bias"))
        y, dropout_cache = ops.dropout_forward(y, dropout.at(place + "output"))
        record("qkv", qkv)
        record("context", context)
        record("output", y)
        return y, (qkv_cache, attention_cache, output_cache, dropout_cache)

    def _attention_backward(self, dy: Tensor, block: int, cache: Cache) -> Tensor:
        """dy (B, T, D) -> dx (B, T, D)."""
        qkv_cache, attention_cache, output_cache, dropout_cache = cache
        d, ops = self.block_gradients[block], self.ops
        record = scoped(self.recorder, f"blocks.{block}.attention.")
        record("doutput", dy)
        # y = dropout(context W_output^T + b_output)
        dy = ops.dropout_backward(dy.to(self.compute_dtype), dropout_cache)
        dcontext = ops.linear_backward(dy, output_cache, d["attention.output.weight"], d.get("attention.output.bias"))
        record("dcontext", dcontext)
        # context = attention(qkv)
        if self.config.traits.positions == "rotary":
            dqkv = ops.rotary_attention_backward(dcontext, attention_cache, record=record)
        else:
            dqkv = ops.self_attention_backward(dcontext, attention_cache, record=record)
        record("dqkv", dqkv)
        # qkv = x W_qkv^T + b_qkv
        return ops.linear_backward(dqkv, qkv_cache, d["attention.qkv.weight"], d.get("attention.qkv.bias"))

    def _feed_forward_forward(self, x: Tensor, block: int, dropout: DropoutSource) -> tuple[Tensor, Cache]:
        """y = dropout(feed_forward(x)). x (B, T, D) -> y (B, T, D)."""
        p, ops = self.block_parameters[block], self.ops
        place = f"blocks.{block}.feed_forward."
        record = scoped(self.recorder, place)
        x = x.to(self.compute_dtype)
        feed_forward_cache: Cache
        if self.config.traits.gated:
            y, feed_forward_cache = ops.gated_feed_forward_forward(x, *gated_feed_forward_of(p), record=record)
        else:
            y, feed_forward_cache = ops.feed_forward_forward(x, *feed_forward_of(p), self.activation, record=record)
        y, dropout_cache = ops.dropout_forward(y, dropout.at(place + "output"))
        record("output", y)
        return y, (feed_forward_cache, dropout_cache)

    def _feed_forward_backward(self, dy: Tensor, block: int, cache: Cache) -> Tensor:
        """dy (B, T, D) -> dx (B, T, D)."""
        feed_forward_cache, dropout_cache = cache
        d, ops = self.block_gradients[block], self.ops
        record = scoped(self.recorder, f"blocks.{block}.feed_forward.")
        record("doutput", dy)
        # y = dropout(feed_forward(x))
        dy = ops.dropout_backward(dy.to(self.compute_dtype), dropout_cache)
        if self.config.traits.gated:
            return ops.gated_feed_forward_backward(dy, feed_forward_cache, *gated_feed_forward_of(d), record=record)
        return ops.feed_forward_backward(dy, feed_forward_cache, *feed_forward_of(d), record=record)
