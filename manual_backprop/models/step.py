"""The machinery around the calculus of a hand-written network: kernels, memory, recorded steps, recomputed blocks.

`custom.py` defines what is computed, forward and backward. This file decides in which memory and by which kernels, and
whether a step runs or is replayed. Of the calculus, only the loss is here: the head and its loss may be one kernel,
which computes the gradient in its forward.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..common.batch import AnyBatch, Batch, as_batch
from ..common.errors import InputError
from ..config.schema import CustomTransformerConfig
from ..ops.loss import OBJECTIVES, objective_gradient, objective_loss
from ..ops.numerics import float32_products, no_record, one_number, wide
from ..optim.parameters import Flat, RoundedMatrices
from .network import DropoutSource, FlatNetwork, block_names, no_callback, packed_names, stacks_of, tables_of

Cache = Any  # private to the pair that returned it


class HandWrittenNetwork(FlatNetwork):
    """A hand-written `Network`; a subclass defines the calculus. The gradient of `parameters[name]` is added into
    `gradients[name]`.

    In bf16_mixed and fp16_mixed the residual stream stays in float32, as in autocast, and the inputs of matrix
    products are rounded. A 16-bit stream would be rounded at every sum: in networks of more than some 10 blocks the
    errors of the gradients would be more than twice autocast's. In the other precisions `.to(self.compute_dtype)` does
    nothing.
    """

    def __init__(self, config: CustomTransformerConfig | Mapping[str, Any]):
        super().__init__(config)
        config = self.config
        blocks = block_names(config)
        self.block_parameters = {block: self._block_views(self.flat_parameters, block) for block in blocks}
        self.ops: Any = kernels.Table(config, self.device)
        self.matrices: Mapping[str, Tensor] = self.parameters  # as products read them
        if self.compute_dtype != config.get_dtype() and not self.ops.rounds_weights(config.compile):
            self.rounded = RoundedMatrices(self.layout, self.flat_parameters, self.compute_dtype, self.ops.on_gpu)
            self.matrices = self.rounded.flat.views
            for block, views in self.block_parameters.items():
                rounded = self._block_views(self.rounded.flat, block)
                views.update({name: view for name, view in rounded.items() if self._is_read_rounded(name, view)})
        self.block_gradients = {block: self._block_views(self.flat_gradients, block) for block in blocks}
        self.arena = kernels.Arena()
        self.replay = kernels.Replay(self.arena, kernels.fastest_products)
        self.like_loss = wide(self.flat_gradients.buffer[:0])  # no numbers, in the dtype of the loss
        self.uses_library = self.ops.compiles(config.compile)
        # the residual norm of this architecture
        norm = f"residual_{config.traits.norm}_norm"
        self.norm_forward: Callable[..., Any] = partial(
            getattr(self.ops, f"{norm}_forward"),
            epsilon=config.epsilon,
            # a post-norm's output is the residual stream, which keeps the dtype of the parameters
            dtype=self.compute_dtype if config.traits.pre_norm else None,
        )
        self.norm_backward: Callable[..., Tensor] = getattr(self.ops, f"{norm}_backward")
        self.stacks, self.tables = stacks_of(config), tables_of(config)
        head = "token_embedding.weight" if config.tied_head else "head.weight"
        self.head, self.dhead = self.matrices[head], self.gradients[head]
        self.dloss: float | Tensor = 1.0  # the gradient that starts a backward pass
        self.dropout_keys: Mapping[str, Tensor] | None = None  # set by a step that reads them on the device
        self._cache: Cache = None  # of the last forward, until its backward

    def _is_read_rounded(self, name: str, view: Tensor) -> bool:
        """Whether products read a rounded copy of a block's tensor: matrices, and on a GPU the biases of products too,
        except those that an activation adds."""
        added = name.endswith(".bias") and "norm" not in name and not name.startswith("feed_forward.hidden")
        return view.dim() == 2 or (added and self.ops.on_gpu)

    def _block_views(self, flat: Flat, block: str) -> dict[str, Tensor]:
        """A block's tensors, named without the prefix `blocks.3.`; tensors that lie side by side are one: `qkv`."""
        prefix = f"{block}."
        views = {name.removeprefix(prefix): view for name, view in flat.views.items() if name.startswith(prefix)}
        for whole, names in packed_names(self.config, block).items():
            views[whole.removeprefix(prefix)] = flat.packed(names)
        return views

    # The loss of the logits, by what serves it

    def _loss_forward(self, x: Tensor, targets: Tensor, denominator: int | Tensor) -> tuple[Tensor, Cache]:
        """x (B, T, D) -> the loss of its logits, one number."""
        ops, smoothing, padding = self.ops, self.config.label_smoothing, self.config.padding_token_id
        if self.config.head_loss in OBJECTIVES:
            logits, head_cache = ops.linear_forward(x, self.head)
            loss, loss_cache = objective_loss(logits, targets, denominator, self.config.head_loss)
            return loss, (None, ops.linear_backward(objective_gradient(self.dloss, loss_cache), head_cache, self.dhead))
        if ops.serves("linear_cross_entropy"):  # both halves at once: no logits are kept between them
            inputs = x, self.head, targets, denominator, smoothing, self.dhead
            loss, dx = ops.linear_cross_entropy(*inputs, padding=padding, dloss=self.dloss, record=self._recording)
            return loss, (None, dx)
        loss, loss_cache = ops.linear_cross_entropy_forward(
            x, self.head, targets, denominator, smoothing, padding, record=self._recording
        )
        return loss, (loss_cache, None)

    def _loss_backward(self, dloss: float | Tensor, cache: Cache) -> Tensor:
        """dloss, one number -> dx (B, T, D)."""
        loss_cache, dx = cache
        if loss_cache is not None:
            dx = self.ops.linear_cross_entropy_backward(dloss, loss_cache, self.dhead, record=self._recording)
        return dx

    # The calculus, defined by a subclass

    # `inputs_of` a batch, then the targets and the rest -> loss, one number; adds to all gradients
    _step: Callable[..., Tensor]
    # `inputs_of` a batch, dropout, and whether to keep the caches -> logits (B, T, V), or what the head gives
    _outputs_forward: Callable[..., tuple[Tensor, Cache]]

    @abstractmethod
    def _outputs_backward(self, doutputs: Tensor, cache: Cache) -> None:
        """The backward of `_outputs_forward`; adds to all gradients."""

    # The network, seen from outside

    @torch.no_grad()
    def loss_and_gradients(self, batch: AnyBatch, *, denominator: int | Tensor, step: int | None) -> Tensor:
        inputs = self.inputs_of(batch)
        dropout = DropoutSource(self.config, step, batch.first_row, self.dropout_keys)

        def work(*tensors: Any) -> Tensor:
            *inputs, denominator = tensors
            with self._in_kernels(self.arena):
                return self._step(*inputs, denominator=denominator, dropout=dropout)

        self._refresh()
        with self._scaled_gradients() as self.dloss:
            if isinstance(batch, Batch) and self._is_replayable(batch.tokens.numel()):
                count = one_number(denominator, self.like_loss)
                return self.replay(work, (*inputs, batch.targets, count), self.signature())
            return work(*inputs, batch.targets, denominator)

    @torch.no_grad()
    def forward(self, tokens: Tensor | AnyBatch, segments: Tensor | None = None, step: int | None = None) -> Tensor:
        inputs = self.inputs_of(as_batch(tokens, segments), targets=False)
        with self._calculation():
            outputs, cache = self._outputs_forward(*inputs, dropout=DropoutSource(self.config, step))
        self._cache = cache, outputs.shape
        return outputs

    @torch.no_grad()
    def backward(self, dlogits: Tensor) -> None:
        if self._cache is None:
            raise InputError(
                "backward needs the forward it belongs to: call forward(tokens) first, once for each backward."
            )
        cache, expected = self._cache
        if dlogits.shape != expected:
            raise InputError(
                f"dlogits have shape {tuple(dlogits.shape)}; expected that of the logits, {tuple(expected)}."
            )
        self._cache = None
        with self._calculation(), self._scaled_gradients() as dloss:
            scaled = dlogits * dloss if isinstance(dloss, Tensor) else dlogits
            self._outputs_backward(scaled.to(self.compute_dtype), cache)

    @torch.no_grad()
    def predict(self, tokens: Tensor | AnyBatch, segments: Tensor | None = None) -> Tensor:
        inputs = self.inputs_of(as_batch(tokens, segments), targets=False)
        with self._calculation():
            outputs, _ = self._outputs_forward(*inputs, dropout=DropoutSource(self.config, None), keep=False)
        return outputs

    # Kernels and replayed steps

    @contextmanager
    def _calculation(self) -> Iterator[None]:
        """The context of a calculation with the current parameters."""
        self._refresh()
        with self._in_kernels():
            yield

    def _refresh(self) -> None:
        """Rounds the matrices that products read, if the parameters have changed."""
        if self.rounded is not None:
            self.rounded.refresh()

    @contextmanager
    def _in_kernels(self, arena: kernels.Arena | None = None) -> Iterator[None]:
        """The context that the kernels need. `arena`: the memory of a training step."""
        with float32_products(self.config.precision), self.ops.calculation(arena, self.uses_library):
            yield

    @property
    def can_be_captured(self) -> bool:
        """Whether a whole step may be captured as one CUDA graph. Not if a recorder or a callback for complete
        gradients is set: a replay does not call them."""
        return self.ops.on_gpu and self.config.compile != "never" and self._is_unobserved()

    def _is_unobserved(self) -> bool:
        return self.recorder is no_record and self.on_gradients_complete is no_callback

    def _is_replayable(self, tokens: int) -> bool:
        """Whether a step of so many tokens can be replayed (see `Replay`). Not if a recorder or a callback for complete
        gradients is set: a replay does not call them."""
        size = tokens * self.config.d_model
        replayable = self.ops.is_replayable(size, self.config.dropout)
        return replayable and self.compiles and self._is_unobserved()

    def signature(self) -> tuple[Any, ...]:
        """Everything besides the batch that may decide the calls of a step: settings, and the functions called here.

        A function that is replaced here takes effect at once, because the signature changes. A function that is
        replaced inside the kernels is not noticed after some steps; with kernels.compile=never every step runs.
        """
        settings = self.config, self.activation, self.arena.poisoned, torch.get_num_threads()
        return *settings, self.norm_forward, self.norm_backward, *self.ops.functions()

    @property
    def compiles(self) -> bool:  # type: ignore[override]
        return self.uses_library and not kernels.compiling_failed()

    def narrow(self, dy: Tensor) -> Tensor:
        """`dy` in the dtype that products read: the copy that its kernel has rounded already, or else a new one."""
        return getattr(dy, "rounded", dy).to(self.compute_dtype)

    # What the blocks keep for backward

    def _blocks(self, keep: bool) -> BlockCaches:
        return BlockCaches(self.arena, keep, self.config.recompute == "block")


class BlockCaches:
    """The caches that blocks keep for backward, or (recompute=block) functions that recompute them.

    Recomputing is gradient checkpointing (Chen et al. 2016): a block keeps only its inputs, and its forward runs again
    before its backward. It gives the same bits: the same functions of the same numbers, dropout masks included.
    """

    def __init__(self, arena: kernels.Arena, keep: bool, recompute: bool):
        self.arena, self.keep, self.recompute = arena, keep, recompute
        self._kept: list[Any] = []

    def forward(self, block_forward: Callable[..., tuple[Any, Cache]], x: Tensor, *inputs: Any) -> Any:
        """The outputs of block_forward(x, *inputs); keeps its cache for `last`."""
        if not self.keep:
            return block_forward(x, *inputs)[0]
        if not self.recompute:
            outputs, cache = block_forward(x, *inputs)
            self._kept.append(cache)
            return outputs
        if isinstance(inputs[0], Tensor):  # a branch: the block adds it to x first
            x, inputs = x + inputs[0], (None, *inputs[1:])  # keep one tensor instead of two
        self._kept.append(partial(block_forward, x, *inputs))
        with self.arena.reuse():
            # copies: they lie in memory that is reused
            outputs, _ = block_forward(x, *inputs)
            return outputs.clone() if isinstance(outputs, Tensor) else tuple(output.clone() for output in outputs)

    @contextmanager
    def last(self) -> Iterator[Cache]:
        """The cache of the last remaining block, for its backward; it is freed at the end of this context."""
        kept = self._kept.pop()
        if not self.recompute:
            yield kept
            return
        with self.arena.reuse():
            yield kept()[1]
