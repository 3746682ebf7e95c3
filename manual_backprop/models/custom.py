"""The transformer whose backward pass is written by hand: raw tensors, no autograd anywhere.

Every forward function is followed by its backward, which goes through it from the last line to the first. `mirror.py`
has the same functions in the same order for autograd; the difference between the two files is what autograd does.
`step.py` decides which kernels serve the pairs, in which memory, and which steps are replayed.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..ops import Visible
from .network import DropoutSource, Memory, feed_forward_of, gated_feed_forward_of, linear_of, norm_of
from .recorder import scoped
from .step import Cache, HandWrittenNetwork


class CustomTransformer(HandWrittenNetwork):
    """A decoder by hand. The gradient of `parameters[name]` is added into `gradients[name]`. Raises ConfigError for a
    config that no decoder can be built from, and InputError for a batch that it cannot read.

    >>> from manual_backprop.common.batch import Batch
    >>> network = CustomTransformer({"vocab_size": 16, "d_model": 16, "n_blocks": 1, "n_heads": 2, "d_ffn": 32})
    >>> batch = Batch(tokens=torch.tensor([[1, 2, 3]]), targets=torch.tensor([[2, 3, -100]]))
    >>> loss = network.loss_and_gradients(batch, denominator=2, step=1)
    >>> network.gradients["blocks.0.attention.query.weight"].shape
    torch.Size([16, 16])
    >>> network.update_parameters(learning_rate=0.1)
    >>> bool(network.loss_and_gradients(batch, denominator=2, step=2) < loss)
    True

    The classic three, for a loss of your own:

    >>> network.zero_gradients()
    >>> logits = network.forward(torch.tensor([[1, 2, 3]]))  # (B, T, V)
    >>> network.backward(torch.ones_like(logits))
    >>> network.update_parameters(learning_rate=0.1)
    """

    def _training_step(
        self, tokens: Tensor, targets: Tensor, visible: Visible, denominator: int | Tensor, dropout: DropoutSource
    ) -> Tensor:
        x, hidden_cache = self._hidden_forward(tokens, visible, dropout)
        loss, loss_cache = self._loss_forward(x, targets, denominator)
        dx = self._loss_backward(self.dloss, loss_cache)
        self._hidden_backward(dx, hidden_cache)
        self.on_gradients_complete(None)
        return loss

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

    def _outputs_forward(
        self, tokens: Tensor, segments: Tensor | None, *, dropout: DropoutSource, keep: bool = True
    ) -> tuple[Tensor, Cache]:
        x, hidden_cache = self._hidden_forward(tokens, Visible.within(segments), dropout, keep)
        logits, head_cache = self.ops.linear_forward(x, self.head)
        return logits, (hidden_cache, head_cache)

    def _outputs_backward(self, dlogits: Tensor, cache: Cache) -> None:
        hidden_cache, head_cache = cache
        # logits = x head^T
        dx = self.ops.linear_backward(dlogits, head_cache, self.dhead)
        self._hidden_backward(dx, hidden_cache)
        self.on_gradients_complete(None)

    # From tokens to the last hidden state

    def _hidden_forward(
        self,
        tokens: Tensor,
        visible: Visible,
        dropout: DropoutSource,
        keep: bool = True,
        stack: str = "",
        memory: Memory | None = None,
    ) -> tuple[Tensor, Cache]:
        """tokens (B, T) -> the last hidden state x (B, T, D). `keep`: keep the caches for backward.

        `stack` is the prefix of the blocks' names; `memory` is what their cross-attention reads.
        """
        x, embedding_cache = self._embedding_forward(tokens, dropout, stack)
        x, stack_cache = self._stack_forward(x, visible, dropout, keep, stack, memory)
        return x, (embedding_cache, stack_cache)

    def _hidden_backward(self, dx: Tensor, cache: Cache, stack: str = "", dmemory: Tensor | None = None) -> None:
        """dx (B, T, D); adds to dmemory (B, S, D), if the blocks read a memory."""
        embedding_cache, stack_cache = cache
        dx = self._stack_backward(dx, stack_cache, stack, dmemory)
        self._embedding_backward(dx, embedding_cache, stack)

    def _stack_forward(
        self, x: Tensor, visible: Visible, dropout: DropoutSource, keep: bool, stack: str, memory: Memory | None
    ) -> tuple[Tensor, Cache]:
        """x (B, T, D) -> x (B, T, D): all blocks, and the norm after them."""
        blocks, norm_cache = self._blocks(keep), None
        if self.config.traits.pre_norm:
            branch = None  # the next norm adds it to x first; before the first block there is none
            for block in self.stacks[stack]:
                x, branch = blocks.forward(self._pre_norm_block_forward, x, branch, block, visible, dropout, memory)
            (_, x), norm_cache = self.norm_forward(x, branch, *norm_of(self.parameters, f"{stack}final_norm"))
            self._recording(f"{stack}final_norm.output", x)
        else:
            for block in self.stacks[stack]:
                x = blocks.forward(self._post_norm_block_forward, x, block, visible, dropout, memory)
        return x.to(self.compute_dtype), (blocks, norm_cache)

    def _stack_backward(self, dx: Tensor, cache: Cache, stack: str, dmemory: Tensor | None = None) -> Tensor:
        """dx (B, T, D) -> dx (B, T, D); every block adds to dmemory (B, S, D).

        Reports every block, from the last to the first, when its gradients are complete.
        """
        blocks, norm_cache = cache
        if self.config.traits.pre_norm:
            self._recording(f"{stack}final_norm.doutput", dx)
            # _, x = norm(x + branch); the sum is not used again, so its gradient comes only through the norm
            dx = dbranch = self.norm_backward(None, dx, norm_cache, *norm_of(self.gradients, f"{stack}final_norm"))
            for block in reversed(self.stacks[stack]):
                with blocks.last() as block_cache:
                    dx = dbranch = self._pre_norm_block_backward(dx, dbranch, block, block_cache, dmemory)
                self.on_gradients_complete(block)
        else:
            for block in reversed(self.stacks[stack]):
                with blocks.last() as block_cache:
                    dx = self._post_norm_block_backward(dx, block, block_cache, dmemory)
                self.on_gradients_complete(block)
        return dx

    def _embedding_forward(self, tokens: Tensor, dropout: DropoutSource, stack: str = "") -> tuple[Tensor, Cache]:
        """tokens (B, T) -> x = dropout(scale * W[tokens] + positions) (B, T, D); rotary positions come in attention.

        An encoder may read rows of numbers (B, T, C) in place of tokens: x = dropout(numbers W^T + b + positions).
        """
        table, places = self.tables[stack]
        if self.config.n_inputs is not None:
            # a copy: kernels overwrite what they read with a gradient
            numbers = tokens.to(self.compute_dtype, copy=True)
            x, token_cache = self.ops.linear_forward(numbers, self.matrices[table], self.parameters["input.bias"])
            x = x.to(self.config.get_dtype())
        else:
            scale = math.sqrt(self.config.d_model) if self.config.traits.scaled_embedding else 1.0
            x, token_cache = self.ops.token_embedding_forward(tokens, self.parameters[table], scale)
        position_cache: Cache = None
        if self.config.position_kind == "learned":
            x, position_cache = self.ops.learned_positions_forward(x, self.parameters[places])
        elif self.config.position_kind == "sinusoidal":
            x, position_cache = self.ops.sinusoidal_positions_forward(x, self.position_table)
        x, dropout_cache = self.ops.dropout_forward(x, dropout.at(f"{stack}embedding"))
        self._recording(f"{stack}embedding.output", x)
        return x, (token_cache, position_cache, dropout_cache)

    def _embedding_backward(self, dx: Tensor, cache: Cache, stack: str = "") -> None:
        token_cache, position_cache, dropout_cache = cache
        table, places = self.tables[stack]
        self._recording(f"{stack}embedding.doutput", dx)
        # x = dropout(scale * W[tokens] + positions)
        dx = self.ops.dropout_backward(dx, dropout_cache)
        if self.config.position_kind == "learned":
            dx = self.ops.learned_positions_backward(dx, position_cache, self.gradients[places])
        elif self.config.position_kind == "sinusoidal":
            dx = self.ops.sinusoidal_positions_backward(dx, position_cache)
        if self.config.n_inputs is not None:
            dx = dx.to(self.compute_dtype)
            self.ops.linear_backward(dx, token_cache, self.gradients[table], self.gradients["input.bias"])
        else:
            self.ops.token_embedding_backward(dx, token_cache, self.gradients[table])

    # A block, pre-norm (gpt2, llama)

    def _pre_norm_block_forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        block: str,
        visible: Visible,
        dropout: DropoutSource,
        memory: Memory | None = None,
    ) -> tuple[tuple[Tensor, Tensor], Cache]:
        """x += branch; x += attention(norm(x)); x += cross_attention(norm(x), memory); branch = feed_forward(norm(x)).

        Without a memory there is no cross-attention. The next block computes the last sum, since its first norm reads
        it: sum and norm are one pair.
        x, branch (B, T, D) -> x, branch (B, T, D).
        """
        p = self.block_parameters[block]
        record = scoped(self._recording, f"{block}.")
        (x, normed), attention_norm_cache = self.norm_forward(x, branch, *norm_of(p, "attention_norm"))
        record("input", x)
        record("attention_norm.output", normed)
        attended, attention_cache = self._attention_forward(normed, block, visible, dropout)
        cross_cache: Cache = None
        if memory is not None:
            (x, normed), cross_norm_cache = self.norm_forward(x, attended, *norm_of(p, "cross_attention_norm"))
            record("cross_attention_norm.output", normed)
            attended, cross_attention_cache = self._cross_attention_forward(normed, memory, block, dropout)
            cross_cache = cross_norm_cache, cross_attention_cache
        (x, normed), feed_forward_norm_cache = self.norm_forward(x, attended, *norm_of(p, "feed_forward_norm"))
        record("residual", x)
        record("feed_forward_norm.output", normed)
        branch, feed_forward_cache = self._feed_forward_forward(normed, block, dropout)
        attention_caches = attention_norm_cache, attention_cache
        return (x, branch), (*attention_caches, cross_cache, feed_forward_norm_cache, feed_forward_cache)

    def _pre_norm_block_backward(
        self, dx: Tensor, dbranch: Tensor, block: str, cache: Cache, dmemory: Tensor | None
    ) -> Tensor:
        """dx, dbranch (B, T, D) -> the gradient of the block's x, and also of its branch (B, T, D); adds to dmemory."""
        attention_norm_cache, attention_cache, cross_cache, feed_forward_norm_cache, feed_forward_cache = cache
        d = self.block_gradients[block]
        record = scoped(self._recording, f"{block}.")
        # branch = feed_forward(normed)
        dnormed = self._feed_forward_backward(dbranch, block, feed_forward_cache)
        record("feed_forward_norm.doutput", dnormed)
        # x, normed = norm(x + attended)
        dx = dattended = self.norm_backward(dx, dnormed, feed_forward_norm_cache, *norm_of(d, "feed_forward_norm"))
        record("dresidual", dx)
        if cross_cache is not None:
            cross_norm_cache, cross_attention_cache = cross_cache
            # attended = cross_attention(normed, memory)
            dnormed = self._cross_attention_backward(dattended, block, cross_attention_cache, dmemory)
            record("cross_attention_norm.doutput", dnormed)
            # x, normed = norm(x + attended)
            dx = dattended = self.norm_backward(dx, dnormed, cross_norm_cache, *norm_of(d, "cross_attention_norm"))
        # attended = attention(normed)
        dnormed = self._attention_backward(dattended, block, attention_cache)
        record("attention_norm.doutput", dnormed)
        # x, normed = norm(x + branch)
        dx = self.norm_backward(dx, dnormed, attention_norm_cache, *norm_of(d, "attention_norm"))
        record("dinput", dx)
        return dx

    # A block, post-norm (vaswani)

    def _post_norm_block_forward(
        self, x: Tensor, block: str, visible: Visible, dropout: DropoutSource, memory: Memory | None = None
    ) -> tuple[Tensor, Cache]:
        """x = norm(x + attention(x)); x = norm(x + cross_attention(x, memory)); x = norm(x + feed_forward(x)).

        x (B, T, D) -> x (B, T, D). Without a memory there is no cross-attention.
        """
        p = self.block_parameters[block]
        record = scoped(self._recording, f"{block}.")
        record("input", x)
        attended, attention_cache = self._attention_forward(x, block, visible, dropout)
        (_, x), attention_norm_cache = self.norm_forward(x, attended, *norm_of(p, "attention_norm"))
        record("attention_norm.output", x)
        cross_cache: Cache = None
        if memory is not None:
            crossed, cross_attention_cache = self._cross_attention_forward(x, memory, block, dropout)
            (_, x), cross_norm_cache = self.norm_forward(x, crossed, *norm_of(p, "cross_attention_norm"))
            record("cross_attention_norm.output", x)
            cross_cache = cross_attention_cache, cross_norm_cache
        branch, feed_forward_cache = self._feed_forward_forward(x, block, dropout)
        (_, x), feed_forward_norm_cache = self.norm_forward(x, branch, *norm_of(p, "feed_forward_norm"))
        record("feed_forward_norm.output", x)
        attention_caches = attention_cache, attention_norm_cache
        return x, (*attention_caches, cross_cache, feed_forward_cache, feed_forward_norm_cache)

    def _post_norm_block_backward(self, dx: Tensor, block: str, cache: Cache, dmemory: Tensor | None) -> Tensor:
        """dx (B, T, D) -> dx (B, T, D); adds to dmemory."""
        attention_cache, attention_norm_cache, cross_cache, feed_forward_cache, feed_forward_norm_cache = cache
        d = self.block_gradients[block]
        record = scoped(self._recording, f"{block}.")
        record("feed_forward_norm.doutput", dx)
        # _, x = norm(x + branch)
        dx = dbranch = self.norm_backward(None, dx, feed_forward_norm_cache, *norm_of(d, "feed_forward_norm"))
        # branch = feed_forward(x), and x reaches the sum as well
        dx = dx + self._feed_forward_backward(dbranch, block, feed_forward_cache)
        if cross_cache is not None:
            cross_attention_cache, cross_norm_cache = cross_cache
            record("cross_attention_norm.doutput", dx)
            # _, x = norm(x + crossed)
            dx = dcrossed = self.norm_backward(None, dx, cross_norm_cache, *norm_of(d, "cross_attention_norm"))
            # crossed = cross_attention(x, memory), and x reaches the sum as well
            dx = dx + self._cross_attention_backward(dcrossed, block, cross_attention_cache, dmemory)
        record("attention_norm.doutput", dx)
        # _, x = norm(x + attended)
        dx = dattended = self.norm_backward(None, dx, attention_norm_cache, *norm_of(d, "attention_norm"))
        # attended = attention(x), and x reaches the sum as well
        dx = dx + self._attention_backward(dattended, block, attention_cache)
        record("dinput", dx)
        return dx

    # The sublayers, which both blocks share

    def _attention_forward(
        self, x: Tensor, block: str, visible: Visible, dropout: DropoutSource
    ) -> tuple[Tensor, Cache]:
        """y = dropout(attention(x W_qkv^T + b_qkv) W_output^T + b_output). x (B, T, D) -> y (B, T, D)."""
        p, ops = self.block_parameters[block], self.ops
        place = f"{block}.attention."
        record = scoped(self._recording, place)
        x = x.to(self.compute_dtype)
        qkv, qkv_cache = ops.linear_forward(x, *linear_of(p, "attention.qkv"))  # (B, T, 3D)
        record("qkv", qkv)
        dropped = dropout.at_heads(place + "probabilities")
        if self.config.traits.positions == "rotary":
            heads = self.config.n_heads, self.config.kv_heads
            context, attention_cache = ops.rotary_attention_forward(
                qkv, self.position_table, *heads, visible, dropped, record
            )
        else:
            context, attention_cache = ops.self_attention_forward(qkv, self.config.n_heads, visible, dropped, record)
        record("context", context)
        y, output_cache = ops.linear_forward(context, *linear_of(p, "attention.output"))
        y, dropout_cache = ops.dropout_forward(y, dropout.at(place + "output"))
        record("output", y)
        return y, (qkv_cache, attention_cache, output_cache, dropout_cache)

    def _attention_backward(self, dy: Tensor, block: str, cache: Cache) -> Tensor:
        """dy (B, T, D) -> dx (B, T, D)."""
        qkv_cache, attention_cache, output_cache, dropout_cache = cache
        d, ops = self.block_gradients[block], self.ops
        record = scoped(self._recording, f"{block}.attention.")
        record("doutput", dy)
        # y = dropout(context W_output^T + b_output)
        dy = ops.dropout_backward(self.narrow(dy), dropout_cache)
        dcontext = ops.linear_backward(dy, output_cache, *linear_of(d, "attention.output"))
        record("dcontext", dcontext)
        # context = attention(qkv)
        if self.config.traits.positions == "rotary":
            dqkv = ops.rotary_attention_backward(dcontext, attention_cache, record=record)
        else:
            dqkv = ops.self_attention_backward(dcontext, attention_cache, record=record)
        record("dqkv", dqkv)
        # qkv = x W_qkv^T + b_qkv
        return ops.linear_backward(dqkv, qkv_cache, *linear_of(d, "attention.qkv"))

    def _cross_attention_forward(
        self, x: Tensor, memory: Memory, block: str, dropout: DropoutSource
    ) -> tuple[Tensor, Cache]:
        """y = dropout(attention(x W_query^T, memory W_key_value^T) W_output^T). x (B, T, D), memory (B, S, D) ->
        y (B, T, D). No rotary positions here: positions of the target and of the source cannot be compared."""
        p, ops = self.block_parameters[block], self.ops
        place = f"{block}.cross_attention."
        record = scoped(self._recording, place)
        x, read = x.to(self.compute_dtype), memory.states.to(self.compute_dtype)
        query, query_cache = ops.linear_forward(x, *linear_of(p, "cross_attention.query"))
        key_value, key_value_cache = ops.linear_forward(read, *linear_of(p, "cross_attention.key_value"))  # (B, S, 2GK)
        record("query", query)
        record("key_value", key_value)
        dropped = dropout.at_heads(place + "probabilities")
        heads = self.config.n_heads, self.config.kv_heads
        context, attention_cache = ops.cross_attention_forward(
            query, key_value, *heads, memory.visible, dropped, record
        )
        record("context", context)
        y, output_cache = ops.linear_forward(context, *linear_of(p, "cross_attention.output"))
        y, dropout_cache = ops.dropout_forward(y, dropout.at(place + "output"))
        record("output", y)
        return y, (query_cache, key_value_cache, attention_cache, output_cache, dropout_cache)

    def _cross_attention_backward(self, dy: Tensor, block: str, cache: Cache, dmemory: Tensor | None) -> Tensor:
        """dy (B, T, D) -> dx (B, T, D); adds to dmemory (B, S, D), which all blocks share, like the memory."""
        query_cache, key_value_cache, attention_cache, output_cache, dropout_cache = cache
        d, ops = self.block_gradients[block], self.ops
        record = scoped(self._recording, f"{block}.cross_attention.")
        record("doutput", dy)
        # y = dropout(context W_output^T + b_output)
        dy = ops.dropout_backward(self.narrow(dy), dropout_cache)
        dcontext = ops.linear_backward(dy, output_cache, *linear_of(d, "cross_attention.output"))
        record("dcontext", dcontext)
        # context = attention(query, key, value)
        dquery, dkey_value = ops.cross_attention_backward(dcontext, attention_cache, record=record)
        record("dquery", dquery)
        record("dkey_value", dkey_value)
        # key, value = memory W_key_value^T + b_key_value
        ops.linear_backward(dkey_value, key_value_cache, *linear_of(d, "cross_attention.key_value"), dx=dmemory)
        # query = x W_query^T + b_query
        return ops.linear_backward(dquery, query_cache, *linear_of(d, "cross_attention.query"))

    def _feed_forward_forward(self, x: Tensor, block: str, dropout: DropoutSource) -> tuple[Tensor, Cache]:
        """y = dropout(feed_forward(x)). x (B, T, D) -> y (B, T, D)."""
        p, ops = self.block_parameters[block], self.ops
        place = f"{block}.feed_forward."
        record = scoped(self._recording, place)
        x = x.to(self.compute_dtype)
        if self.config.traits.gated:
            y, feed_forward_cache = ops.gated_feed_forward_forward(x, *gated_feed_forward_of(p), record=record)
        else:
            y, feed_forward_cache = ops.feed_forward_forward(x, *feed_forward_of(p), self.activation, record=record)
        y, dropout_cache = ops.dropout_forward(y, dropout.at(place + "output"))
        record("output", y)
        return y, (feed_forward_cache, dropout_cache)

    def _feed_forward_backward(self, dy: Tensor, block: str, cache: Cache) -> Tensor:
        """dy (B, T, D) -> dx (B, T, D)."""
        feed_forward_cache, dropout_cache = cache
        d, ops = self.block_gradients[block], self.ops
        record = scoped(self._recording, f"{block}.feed_forward.")
        record("doutput", dy)
        # y = dropout(feed_forward(x))
        dy = ops.dropout_backward(self.narrow(dy), dropout_cache)
        if self.config.traits.gated:
            return ops.gated_feed_forward_backward(dy, feed_forward_cache, *gated_feed_forward_of(d), record=record)
        return ops.feed_forward_backward(dy, feed_forward_cache, *feed_forward_of(d), record=record)
