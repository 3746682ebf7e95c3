"""The machinery around the mirror's calculus: leaves over flat buffers, and functions that PyTorch lacks.

This file is to `mirror.py` what `step.py` and `ops/` are to `custom.py`: the leaves and the step, and attention and
dropout with the masks of `ops/`. The random masks are shared, since they are not part of the calculus.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.batch import AnyBatch
from ..config.schema import CustomTransformerConfig
from ..ops import CAUSAL, Dropout, Visible, keep_mask
from ..ops.attention import split_heads
from ..ops.numerics import Record, no_record
from .autograd import ACTIVATIONS, AutogradNetwork, block_forward, head_loss
from .network import DropoutSource, FlatNetwork, block_names, packed_names, stacks_of, tables_of
from .recorder import gradient_name


def dropout_mirror(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Dropout with the mask of the hand-written network: the random mask is not part of the calculus."""
    if dropout is None:
        return x
    return x * keep_mask(tuple(x.shape), dropout, x.device) / (1 - dropout.probability)


def self_attention_mirror(
    qkv: Tensor,
    n_heads: int,
    visible: Visible = CAUSAL,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> Tensor:
    """PyTorch's fused attention; written out where our dropout mask or a recorder needs the probabilities."""
    if visible.key_lengths is not None:
        return _attention_written_out(*split_heads(qkv, n_heads), visible, dropout, record)
    query, key, value = (x.transpose(1, 2) for x in split_heads(qkv, n_heads))
    looked_at = record.wants("scores") or record.wants("probabilities")
    if dropout is None and not looked_at and visible.is_only_causal:
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return context.transpose(1, 2).flatten(2)
    mask = visible.mask(query.shape[2], key.shape[2], qkv.device)
    if dropout is None and not looked_at:
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return context.transpose(1, 2).flatten(2)
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    record("scores", scores)
    masked = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    probabilities = F.softmax(masked, dim=-1).to(value.dtype)
    record("probabilities", probabilities)
    context = dropout_mirror(probabilities, dropout) @ value
    return context.transpose(1, 2).flatten(2)


def cross_attention_mirror(
    query: Tensor,
    key_value: Tensor,
    n_heads: int,
    n_kv_heads: int,
    visible: Visible,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> Tensor:
    """query (B, T, H K), key_value (B, S, 2 G K) -> context (B, T, H K)."""
    query = query.unflatten(2, (n_heads, -1))  # (B, T, H, K)
    key, value = key_value.unflatten(2, (2, n_kv_heads, -1)).unbind(2)  # (B, S, G, K)
    return _attention_written_out(query, key, value, visible, dropout, record)


def _attention_written_out(
    query: Tensor, key: Tensor, value: Tensor, visible: Visible, dropout: Dropout | None, record: Record
) -> Tensor:
    """query (B, T, H, K), key and value (B, S, G, K) -> context (B, T, H K), 0 for a query without keys."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    record("scores", scores)
    mask = visible.mask(query.shape[2], key.shape[2], query.device)
    if mask is not None:
        there = mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~(mask | ~there), -math.inf)  # a query without keys sees all, and gets 0 below
    probabilities = F.softmax(scores, dim=-1).to(value.dtype)
    if mask is not None:
        probabilities = probabilities.masked_fill(~there, 0)
    record("probabilities", probabilities)
    context = dropout_mirror(probabilities, dropout) @ value
    return context.transpose(1, 2).flatten(2)


def rotary_attention_mirror(
    qkv: Tensor,
    rotation: Tensor,
    n_heads: int,
    n_kv_heads: int,
    visible: Visible = CAUSAL,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> Tensor:
    """Rotates pairs as products of complex numbers; then the attention above, with keys and values repeated."""
    heads = qkv.unflatten(2, (n_heads + 2 * n_kv_heads, -1))  # (B, T, H + 2G, K)
    query, key, value = heads.split((n_heads, n_kv_heads, n_kv_heads), dim=2)
    cosine, sine = rotation[:, : qkv.shape[1], None].to(qkv.dtype).repeat(1, 1, 1, 2)  # (T, 1, K) each

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat((-second, first), dim=-1) * sine

    turned = torch.cat((turn(query), turn(key), value), dim=2)
    record("turned", turned := turned.flatten(2))
    query, key, value = turned.unflatten(2, (n_heads + 2 * n_kv_heads, -1)).split(
        (n_heads, n_kv_heads, n_kv_heads), dim=2
    )
    shared = [part.repeat_interleave(n_heads // n_kv_heads, dim=2) for part in (key, value)]
    return self_attention_mirror(torch.cat((query, *shared), dim=2).flatten(2), n_heads, visible, dropout, record)


def feed_forward_mirror(
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    activation: str,
    record: Record = no_record,
) -> Tensor:
    """x (B, T, D) -> y (B, T, D)."""
    hidden = F.linear(x, hidden_weight, hidden_bias)  # (B, T, F)
    record("hidden", hidden)
    activated = ACTIVATIONS[activation](hidden)
    record("activated", activated)
    return F.linear(activated, output_weight, output_bias)


def gated_feed_forward_mirror(
    x: Tensor, gated_weight: Tensor, output_weight: Tensor, record: Record = no_record
) -> Tensor:
    """x (B, T, D) -> y (B, T, D). The gate and the hidden layer are one product."""
    gated = F.linear(x, gated_weight)  # (B, T, 2F)
    record("gated", gated)
    gate, hidden = gated.chunk(2, dim=-1)
    activated = F.silu(gate) * hidden
    record("activated", activated)
    return F.linear(activated, output_weight)


class WithGradients:
    """Records activations when they are computed, and their gradients when autograd computes them."""

    def __init__(self, record: Record):
        self.record = record

    def wants(self, name: str) -> bool:
        return self.record.wants(name) or self.record.wants(gradient_name(name))

    def __call__(self, name: str, tensor: Tensor) -> None:
        self.record(name, tensor)
        if tensor.requires_grad and self.record.wants(gradient_name(name)):
            tensor.register_hook(lambda gradient: self.record(gradient_name(name), gradient))


class BlockLeaves(Mapping[str, Tensor]):
    """A block's leaves, named without the prefix `blocks.3.`; tensors that lie side by side are one: `qkv`."""

    def __init__(self, leaves: Mapping[str, Tensor], config: CustomTransformerConfig, block: str):
        self.leaves, self.prefix, self.packed = leaves, f"{block}.", packed_names(config, block)

    def __getitem__(self, name: str) -> Tensor:
        if (names := self.packed.get(self.prefix + name)) is not None:
            return torch.cat([self.leaves[part] for part in names])
        return self.leaves[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        wholes = (name for name in (*self.leaves, *self.packed) if name.startswith(self.prefix))
        return (name.removeprefix(self.prefix) for name in wholes)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class MirroredNetwork(AutogradNetwork, FlatNetwork):
    """A network whose parameters are leaves over the flat buffer. Their `.grad` are views of the flat gradient, so that
    autograd adds into the same `gradients` as the hand-written backward."""

    def __init__(self, config: CustomTransformerConfig | Mapping[str, Any]):
        super().__init__(config)
        config = self.config
        self.leaves: dict[str, Tensor] = {}
        for name, view in self.parameters.items():
            leaf = view.detach().requires_grad_()
            leaf.grad = self.gradients[name]
            self.leaves[name] = leaf
        self.block_parameters = {block: BlockLeaves(self.leaves, config, block) for block in block_names(config)}
        self.stacks, self.tables = stacks_of(self.config), tables_of(self.config)
        self.head = self.leaves["token_embedding.weight" if config.tied_head else "head.weight"]

    # The calculus, defined by a subclass

    # inputs_of a batch, the targets last, denominator=, dropout= -> loss, one number with a graph
    _step: Callable[..., Tensor]
    # inputs_of a batch, dropout= -> logits (B, T, V), or the other outputs of this network's head
    _outputs_forward: Callable[..., Tensor]

    def block_forward(self, block: Callable[..., Any], x: Tensor, *inputs: Any) -> Any:
        """block(x, *inputs), which backward recomputes if the config says so."""
        recompute = self.config.recompute == "block"
        if recompute and isinstance(inputs[0], Tensor):  # a branch: the block adds it to x first
            x, inputs = x + inputs[0], (None, *inputs[1:])  # keep one tensor instead of two
        return block_forward(block, recompute, x, *inputs)

    def norm_forward(
        self, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x + branch, and its norm (layer norm or RMS norm, as the architecture has it)."""
        total = x if branch is None else x + branch
        if bias is None:
            return total, F.rms_norm(total, weight.shape, weight, self.config.epsilon)
        return total, F.layer_norm(total, weight.shape, weight, bias, self.config.epsilon)

    def _loss_forward(self, x: Tensor, targets: Tensor, denominator: int | Tensor) -> Tensor:
        """x (B, T, D) -> the loss of its logits, one number."""
        logits = F.linear(x, self.head)
        self._recording("logits", logits)
        return head_loss(self.config, logits, targets, denominator)

    @property
    def _recording(self) -> Record:
        return no_record if self.recorder is no_record else WithGradients(self.recorder)

    @torch.enable_grad()
    def loss_and_gradients(self, batch: AnyBatch, *, denominator: int | Tensor, step: int | None) -> Tensor:
        inputs = self.inputs_of(batch)
        dropout = DropoutSource(self.config, step, batch.first_row)
        count = self.on_device(denominator).clamp(min=1)
        with self._autocast():
            loss = self._step(*inputs, batch.targets, denominator=count, dropout=dropout)
        self._backward(loss)
        self._notify_gradients_complete()
        return loss.detach()

    def _outputs_of(self, inputs: tuple[Tensor | None, ...], step: int | None) -> Tensor:
        return self._outputs_forward(*inputs, dropout=DropoutSource(self.config, step))
