"""The same network in plain PyTorch, line for line beside `custom.py`, with gradients by autograd: the proof.

What is missing here is what autograd does: no caches, no backward functions. What PyTorch users would write instead of
this is another file's business; here every name is the hand-written one's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import CustomTransformerConfig
from ..ops import Dropout, keep_mask
from ..ops.attention import split_heads, visible_positions
from ..ops.numerics import Record, no_record
from .autograd import AutogradNetwork, summed_loss
from .network import Batch, DropoutSource, FlatNetwork, packed_names
from .recorder import gradient_name, scoped


def dropout_mirror(x: Tensor, dropout: Dropout | None) -> Tensor:
    """The same mask as by hand: dropout's randomness is no part of the calculus."""
    if dropout is None:
        return x
    return x * keep_mask(tuple(x.shape), dropout, x.device) / (1 - dropout.probability)


def attention_mirror(
    qkv: Tensor,
    n_heads: int,
    segments: Tensor | None = None,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> Tensor:
    """PyTorch's own fused attention; spelled out where its probabilities are dropped by our mask, or looked at."""
    query, key, value = split_heads(qkv, n_heads)
    if dropout is None and not (record.wants("scores") or record.wants("probabilities")):
        mask = None if segments is None else visible_positions(qkv.shape[1], segments, qkv.device)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return context.transpose(1, 2).flatten(2)
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    record("scores", scores)
    masked = scores.masked_fill(~visible_positions(qkv.shape[1], segments, qkv.device), -math.inf)
    probabilities = F.softmax(masked, dim=-1).to(value.dtype)
    record("probabilities", probabilities)
    context = dropout_mirror(probabilities, dropout) @ value
    return context.transpose(1, 2).flatten(2)


def rotary_attention_mirror(
    qkv: Tensor,
    rotation: Tensor,
    n_heads: int,
    n_kv_heads: int,
    segments: Tensor | None = None,
    dropout: Dropout | None = None,
    record: Record = no_record,
) -> Tensor:
    """Pairs are turned as complex numbers are multiplied; then the attention above, with keys and values repeated."""
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
    return attention_mirror(torch.cat((query, *shared), dim=2).flatten(2), n_heads, segments, dropout, record)


class WithGradients:
    """Records activations as they are made, and their gradients as autograd makes them."""

    def __init__(self, record: Record):
        self.record = record

    def wants(self, name: str) -> bool:
        return self.record.wants(name) or self.record.wants(gradient_name(name))

    def __call__(self, name: str, tensor: Tensor) -> None:
        self.record(name, tensor)
        if tensor.requires_grad and self.record.wants(gradient_name(name)):
            tensor.register_hook(lambda gradient: self.record(gradient_name(name), gradient))


class TorchTransformer(AutogradNetwork, FlatNetwork):
    """`Network` by autograd. Parameters are leaves over the flat buffer, and their `.grad` is the flat gradient's view,
    so that autograd adds into the same `gradients` that the hand-written backward adds into."""

    def __init__(self, config: CustomTransformerConfig):
        super().__init__(config)
        self.leaves: dict[str, Tensor] = {}
        for name, view in self.parameters.items():
            leaf = view.detach().requires_grad_()
            leaf.grad = self.gradients[name]
            self.leaves[name] = leaf
        self.head = self.leaves["token_embedding.weight" if config.traits.tied_head else "head.weight"]

    @property
    def _recording(self) -> Record:
        return no_record if self.recorder is no_record else WithGradients(self.recorder)

    @torch.enable_grad()
    def loss_and_gradients(self, batch: Batch, *, denominator: int | Tensor, step: int | None) -> Tensor:
        self.check_tokens(batch.tokens, batch.targets, batch.segments)
        dropout = DropoutSource(self.config.dropout, self.config.seed, step, batch.first_row)
        smoothing = self.config.label_smoothing

        with self._autocast():
            logits = F.linear(self._hidden(batch.tokens, batch.segments, dropout), self.head)
            self._recording("logits", logits)
            loss = summed_loss(logits, batch.targets.long(), smoothing, self.on_device(denominator).clamp(min=1))
        loss.backward()
        return loss.detach()

    def _logits_of(self, tokens: Tensor, segments: Tensor | None, step: int | None) -> Tensor:
        dropout = DropoutSource(self.config.dropout, self.config.seed, step)
        return F.linear(self._hidden(tokens, segments, dropout), self.head)

    # From tokens to the last hidden state

    def _hidden(self, tokens: Tensor, segments: Tensor | None, dropout: DropoutSource) -> Tensor:
        x = self._embedding(tokens, dropout)
        if self.config.traits.pre_norm:
            branch = None
            for block in range(self.config.n_blocks):
                x, branch = self._pre_norm_block(x, branch, block, segments, dropout)
            x = x if branch is None else x + branch
            x = self._norm(x, "final_norm")
            self._recording("final_norm.output", x)
        else:
            for block in range(self.config.n_blocks):
                x = self._post_norm_block(x, block, segments, dropout)
        return x

    def _embedding(self, tokens: Tensor, dropout: DropoutSource) -> Tensor:
        x = F.embedding(tokens, self.leaves["token_embedding.weight"])
        if self.config.traits.scaled_embedding:
            x = x * math.sqrt(self.config.d_model)
        if self.config.traits.positions == "learned":
            x = x + self.leaves["position_embedding.weight"][: tokens.shape[1]]
        elif self.config.traits.positions == "sinusoidal":
            x = x + self.position_table[: tokens.shape[1]].to(x.dtype)
        x = dropout_mirror(x, dropout.at("embedding"))
        self._recording("embedding.output", x)
        return x

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, shape = self.leaves[f"{name}.weight"], (self.config.d_model,)
        if self.config.traits.norm == "rms":
            return F.rms_norm(x, shape, weight, self.config.epsilon)
        return F.layer_norm(x, shape, weight, self.leaves[f"{name}.bias"], self.config.epsilon)

    def _packed(self, whole: str, block: int) -> Any:
        """Parameters side by side, as by hand; None where this architecture has none of them."""
        names = packed_names(self.config, block).get(whole)
        return None if names is None else torch.cat([self.leaves[name] for name in names])

    # A block, pre-norm (gpt2, llama)

    def _pre_norm_block(
        self, x: Tensor, branch: Tensor | None, block: int, segments: Tensor | None, dropout: DropoutSource
    ) -> tuple[Tensor, Tensor]:
        place = f"blocks.{block}."
        record = scoped(self._recording, place)
        x = x if branch is None else x + branch
        record("input", x)
        normed = self._norm(x, f"{place}attention_norm")
        record("attention_norm.output", normed)
        x = x + self._attention(normed, block, segments, dropout)
        record("residual", x)
        normed = self._norm(x, f"{place}feed_forward_norm")
        record("feed_forward_norm.output", normed)
        return x, self._feed_forward(normed, block, dropout)

    # A block, post-norm (vaswani)

    def _post_norm_block(self, x: Tensor, block: int, segments: Tensor | None, dropout: DropoutSource) -> Tensor:
        place = f"blocks.{block}."
        record = scoped(self._recording, place)
        record("input", x)
        x = self._norm(x + self._attention(x, block, segments, dropout), f"{place}attention_norm")
        record("attention_norm.output", x)
        x = self._norm(x + self._feed_forward(x, block, dropout), f"{place}feed_forward_norm")
        record("feed_forward_norm.output", x)
        return x

    # The two sublayers, which both blocks share

    def _attention(self, x: Tensor, block: int, segments: Tensor | None, dropout: DropoutSource) -> Tensor:
        place = f"blocks.{block}.attention."
        record = scoped(self._recording, place)
        qkv = F.linear(x, self._packed(f"{place}qkv.weight", block), self._packed(f"{place}qkv.bias", block))
        record("qkv", qkv)
        dropped = dropout.at(place + "probabilities")
        if self.config.traits.positions == "rotary":
            heads = self.config.n_heads, self.config.kv_heads
            context = rotary_attention_mirror(qkv, self.position_table, *heads, segments, dropped, record)
        else:
            context = attention_mirror(qkv, self.config.n_heads, segments, dropped, record)
        record("context", context)
        y = F.linear(context, self.leaves[f"{place}output.weight"], self.leaves.get(f"{place}output.bias"))
        y = dropout_mirror(y, dropout.at(place + "output"))
        record("output", y)
        return y

    def _feed_forward(self, x: Tensor, block: int, dropout: DropoutSource) -> Tensor:
        place = f"blocks.{block}.feed_forward."
        record = scoped(self._recording, place)
        if self.config.traits.gated:
            gated = F.linear(x, self._packed(f"{place}gated.weight", block))
            record("gated", gated)
            gate, hidden = gated.chunk(2, dim=-1)
            activated = F.silu(gate) * hidden
        else:
            hidden = F.linear(x, self.leaves[f"{place}hidden.weight"], self.leaves[f"{place}hidden.bias"])
            record("hidden", hidden)
            if self.activation == "relu":
                activated = F.relu(hidden)
            else:
                activated = F.gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        record("activated", activated)
        y = F.linear(activated, self.leaves[f"{place}output.weight"], self.leaves.get(f"{place}output.bias"))
        y = dropout_mirror(y, dropout.at(place + "output"))
        record("output", y)
        return y
