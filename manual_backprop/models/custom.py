"""The transformer whose backward pass is written by hand: raw tensors, no autograd anywhere.

Every forward function is followed by its backward, which reads it from the last line to the first. `mirror.py` has the
same functions under the same names for autograd; the difference between the two files is what autograd does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import kernels, ops
from ..config import CustomTransformerConfig
from ..errors import InputError
from ..ops.numerics import no_record
from ..parameters import Flat
from .network import Batch, DropoutSource, FlatNetwork, packed_names
from .recorder import scoped

Cache = Any  # private to the pair that made it


def norm_of(views: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """The parameters of a norm, or their gradients: weight, and bias where it has one."""
    return [views[f"{name}.{kind}"] for kind in ("weight", "bias") if f"{name}.{kind}" in views]


def feed_forward_of(views: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parameters of a block's feed-forward network, or their gradients."""
    hidden, output = "feed_forward.hidden", "feed_forward.output"
    return views[f"{hidden}.weight"], views[f"{hidden}.bias"], views[f"{output}.weight"], views[f"{output}.bias"]


def gated_feed_forward_of(views: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Likewise, where it has a gate."""
    return views["feed_forward.gated.weight"], views["feed_forward.output.weight"]


class CustomTransformer(FlatNetwork):
    """`Network` by hand. The gradient of `parameters[name]` is added into `gradients[name]`.

    In bf16_mixed the residual stream x stays in float32, as autocast leaves it, and what enters a matrix product is
    rounded: a stream in bfloat16 would be rounded at every sum, and past some 10 blocks its gradients' errors are more
    than twice autocast's. In the other precisions `.to(self.compute_dtype)` does nothing.
    """

    def __init__(self, config: CustomTransformerConfig):
        super().__init__(config)
        self.block_parameters = [self._block_views(self.flat_parameters, block) for block in range(config.n_blocks)]
        self.block_gradients = [self._block_views(self.flat_gradients, block) for block in range(config.n_blocks)]
        self.ops: Any = kernels if config.kernels == "fused" else ops  # the same pairs
        self.arena = kernels.Arena()
        self.replay = kernels.Replay(self.arena)
        compiles = config.kernels == "fused" and kernels.compiles(config.compile, self.device)
        self.compiled_groups = self._compiled_groups() if compiles else None
        # a norm behind a residual sum, the one of this architecture
        rms = config.traits.norm == "rms"
        self.norm_forward: Callable[..., Any] = partial(
            self.ops.residual_rms_norm_forward if rms else self.ops.residual_layer_norm_forward, epsilon=config.epsilon
        )
        self.norm_backward: Callable[..., Tensor] = (
            self.ops.residual_rms_norm_backward if rms else self.ops.residual_layer_norm_backward
        )
        head = "token_embedding.weight" if config.traits.tied_head else "head.weight"
        self.head, self.dhead = self.parameters[head], self.gradients[head]
        self._cache: Cache = None  # of the last forward that waits for its backward

    def _block_views(self, flat: Flat, block: int) -> dict[str, Tensor]:
        """A block's tensors without `blocks.3.` before their names, and those that lie side by side as one: `qkv`."""
        prefix = f"blocks.{block}."
        views = {name.removeprefix(prefix): view for name, view in flat.views.items() if name.startswith(prefix)}
        for whole, names in packed_names(self.config, block).items():
            views[whole.removeprefix(prefix)] = flat.packed(names)
        return views

    @torch.no_grad()
    def loss_and_gradients(self, batch: Batch, *, denominator: int | Tensor, step: int | None) -> Tensor:
        self.check_tokens(batch.tokens, batch.targets, batch.segments)
        dropout = DropoutSource(self.config.dropout, self.config.seed, step, batch.first_row)

        work = partial(self._training_step, dropout=dropout)
        inputs = batch.tokens, batch.targets, batch.segments
        with self._calculation(training=True):
            if self._is_repeatable(batch.tokens.numel()):
                return self.replay(work, (*inputs, self.on_device(denominator)), self._course())
            return work(*inputs, denominator)

    def _training_step(
        self,
        tokens: Tensor,
        targets: Tensor,
        segments: Tensor | None,
        denominator: int | Tensor,
        dropout: DropoutSource,
    ) -> Tensor:
        """tokens, targets, segments (B, T) -> loss, one number; adds to all gradients."""
        smoothing = self.config.label_smoothing
        x, hidden_cache = self._hidden_forward(tokens, segments, dropout)
        if self.ops is kernels:  # both halves at once: no logits have to be kept between them
            loss, dx = kernels.linear_cross_entropy(
                x, self.head, targets, denominator, smoothing, self.dhead, record=self.recorder
            )
        else:
            loss, loss_cache = ops.linear_cross_entropy_forward(
                x, self.head, targets, denominator, smoothing, record=self.recorder
            )
            dx = ops.linear_cross_entropy_backward(1.0, loss_cache, self.dhead, record=self.recorder)
        self._hidden_backward(dx, hidden_cache)
        return loss

    def _is_repeatable(self, tokens: int) -> bool:
        """Whether the calls of such a step can be made again: see `Replay`. Who records wants it to run."""
        size = tokens * self.config.d_model
        repeatable = kernels.is_repeatable(size, self.config.dropout, self.device.type)
        return repeatable and self.compiles and self.recorder is no_record

    def _course(self) -> tuple[Any, ...]:
        """What may decide the calls of a step beside its batch: settings, and the functions that it calls here.

        Who puts others in their place sees the step that belongs to them; not so who changes a function inside of the
        kernels after some steps (kernels.compile=never lets every step run).
        """
        settings = self.config, self.activation, self.arena.poisoned, torch.get_num_threads()
        functions = self.norm_forward, self.norm_backward, *[getattr(self.ops, name) for name in kernels.__all__]
        return *settings, *functions

    def _calculation(self, training: bool = False) -> AbstractContextManager:
        """What fused kernels want around them; the reference wants nothing."""
        if self.ops is ops:
            return nullcontext()
        where = self.compiled_groups, self.device
        return kernels.step(self.arena, *where) if training else kernels.fast(*where)

    def _compiled_groups(self) -> list[kernels.Group]:
        """What of the kernels this network has compiled: its activation, its norm, what belongs to every network."""
        traits, parameter = self.config.traits, self.config.get_dtype()
        groups = [(group, self.compute_dtype, parameter) for group in ("", self.activation)]
        if traits.norm == "layer":
            groups.append(("layer_norm", parameter, parameter))  # the residual stream is as wide as the parameters
        return groups

    @property
    def compiles(self) -> bool:  # type: ignore[override]
        return self.compiled_groups is not None and not kernels.compiling_failed()

    @torch.no_grad()
    def forward(self, tokens: Tensor, segments: Tensor | None = None, step: int | None = None) -> Tensor:
        self.check_tokens(tokens, segments=segments)
        dropout = DropoutSource(self.config.dropout, self.config.seed, step)
        with self._calculation():
            x, hidden_cache = self._hidden_forward(tokens, segments, dropout)
            logits, head_cache = self.ops.linear_forward(x, self.head)
        self._cache = hidden_cache, head_cache, logits.shape
        return logits

    @torch.no_grad()
    def backward(self, dlogits: Tensor) -> None:
        if self._cache is None:
            raise InputError(
                "backward needs the forward it belongs to: call forward(tokens) first, once for each backward."
            )
        hidden_cache, head_cache, expected = self._cache
        if dlogits.shape != expected:
            raise InputError(
                f"dlogits have shape {tuple(dlogits.shape)}; expected that of the logits, {tuple(expected)}."
            )
        self._cache = None
        with self._calculation():
            # logits = x head^T
            dx = self.ops.linear_backward(dlogits.to(self.compute_dtype), head_cache, self.dhead)
            self._hidden_backward(dx, hidden_cache)

    @torch.no_grad()
    def predict(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        self.check_tokens(tokens, segments=segments)
        with self._calculation():
            x, _ = self._hidden_forward(tokens, segments, DropoutSource(0.0, 0, None), keep=False)
            logits, _ = self.ops.linear_forward(x, self.head)
        return logits

    # From tokens to the last hidden state

    def _hidden_forward(
        self, tokens: Tensor, segments: Tensor | None, dropout: DropoutSource, keep: bool = True
    ) -> tuple[Tensor, Cache]:
        """tokens (B, T) -> what the vocabulary projection reads, x (B, T, D). `keep` the caches, for backward."""
        x, embedding_cache = self._embedding_forward(tokens, dropout)
        block_caches = []
        forward: Callable[[], tuple]
        if self.config.traits.pre_norm:
            branch = None  # what the next norm adds to x before it normalizes: nothing yet
            for block in range(self.config.n_blocks):
                if self.config.recompute == "block" and branch is not None:
                    x, branch = x + branch, None  # one tensor to keep in place of two
                forward = partial(self._pre_norm_block_forward, x, branch, block, segments, dropout)
                x, branch, block_cache = self._run_block(forward, keep)
                block_caches.append(block_cache)
            (_, x), norm_cache = self.norm_forward(x, branch, *norm_of(self.parameters, "final_norm"))
            self.recorder("final_norm.output", x)
        else:
            for block in range(self.config.n_blocks):
                forward = partial(self._post_norm_block_forward, x, block, segments, dropout)
                x, block_cache = self._run_block(forward, keep)
                block_caches.append(block_cache)
            norm_cache = None
        return x.to(self.compute_dtype), (embedding_cache, block_caches, norm_cache)

    def _hidden_backward(self, dx: Tensor, cache: Cache) -> None:
        embedding_cache, block_caches, norm_cache = cache
        if self.config.traits.pre_norm:
            self.recorder("final_norm.doutput", dx)
            # _, x = norm(x + branch); the sum is not used again, so nothing reaches it past the norm
            dx = dbranch = self.norm_backward(None, dx, norm_cache, *norm_of(self.gradients, "final_norm"))
            for block in reversed(range(self.config.n_blocks)):
                # popped: what a block kept is freed as soon as its gradients are complete
                with self._block_cache(block_caches.pop()) as block_cache:
                    dx = dbranch = self._pre_norm_block_backward(dx, dbranch, block, block_cache)
        else:
            for block in reversed(range(self.config.n_blocks)):
                with self._block_cache(block_caches.pop()) as block_cache:
                    dx = self._post_norm_block_backward(dx, block, block_cache)
        self._embedding_backward(dx, embedding_cache)

    def _run_block(self, forward: Callable[[], tuple], keep: bool) -> tuple:
        """A block's outputs, and what to keep for its backward: its cache, or (recompute=block) how to make it again.

        The second is gradient checkpointing (Chen et al. 2016): of each block only its inputs are kept, which `forward`
        holds, and its forward runs once more before its backward. The same functions of the same numbers, dropout's
        masks included: the same bits.
        """
        if not keep:
            return *forward()[:-1], None
        if self.config.recompute != "block":
            return forward()
        with self.arena.handing_out_again():
            # copies: they lie in memory that is handed out again
            return *(output.clone() for output in forward()[:-1]), forward

    @contextmanager
    def _block_cache(self, kept: Any) -> Iterator[Cache]:
        """What `_run_block` kept, as the block's backward wants it."""
        if self.config.recompute != "block":
            yield kept
            return
        with self.arena.handing_out_again():
            yield kept()[-1]

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
        self, x: Tensor, branch: Tensor | None, block: int, segments: Tensor | None, dropout: DropoutSource
    ) -> tuple[Tensor, Tensor, Cache]:
        """x += branch; x += attention(norm(x)); branch = feed_forward(norm(x)).

        The last sum is left to the next block, whose first norm reads it: sum and norm are one pair.
        x, branch (B, T, D) -> x, branch (B, T, D).
        """
        p = self.block_parameters[block]
        record = scoped(self.recorder, f"blocks.{block}.")
        (x, normed), attention_norm_cache = self.norm_forward(x, branch, *norm_of(p, "attention_norm"))
        record("input", x)
        record("attention_norm.output", normed)
        attended, attention_cache = self._attention_forward(normed, block, segments, dropout)
        (x, normed), feed_forward_norm_cache = self.norm_forward(x, attended, *norm_of(p, "feed_forward_norm"))
        record("residual", x)
        record("feed_forward_norm.output", normed)
        branch, feed_forward_cache = self._feed_forward_forward(normed, block, dropout)
        return x, branch, (attention_norm_cache, attention_cache, feed_forward_norm_cache, feed_forward_cache)

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
        self, x: Tensor, block: int, segments: Tensor | None, dropout: DropoutSource
    ) -> tuple[Tensor, Cache]:
        """x = norm(x + attention(x)); x = norm(x + feed_forward(x)). x (B, T, D) -> x (B, T, D)."""
        p = self.block_parameters[block]
        record = scoped(self.recorder, f"blocks.{block}.")
        record("input", x)
        attended, attention_cache = self._attention_forward(x, block, segments, dropout)
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
        self, x: Tensor, block: int, segments: Tensor | None, dropout: DropoutSource
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
        dropped = dropout.at(place + "probabilities")
        if self.config.traits.positions == "rotary":
            heads = self.config.n_heads, self.config.kv_heads
            context, attention_cache = ops.rotary_attention_forward(
                qkv, self.position_table, *heads, segments, dropped, record
            )
        else:
            context, attention_cache = ops.attention_forward(qkv, self.config.n_heads, segments, dropped, record)
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
            dqkv = ops.attention_backward(dcontext, attention_cache, record=record)
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
