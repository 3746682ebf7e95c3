"""The same network as PyTorch users write it: `torch.nn`, one product for query, key and value, SDPA, `torch.compile`.

The peer of every measurement, so as fast as PyTorch makes it. Its weights have the names and values of the others
where they come and go (`parameters`, `gradients`, the optimizer's state); inside they are fused as PyTorch likes them.
Its dropout is torch's own: as much as by hand, at other places.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.batch import Batch
from ..common.errors import first_line
from ..config.schema import CustomTransformerConfig
from ..ops import Visible, random_key
from ..optim.optimizers import Optimizer
from ..optim.torch_optimizers import TorchOptimizer
from .autograd import AutogradNetwork, block_forward, summed_loss
from .network import packed_names, parameter_shapes

log = logging.getLogger(__name__)


def norm(config: CustomTransformerConfig) -> nn.Module:
    if config.traits.norm == "rms":
        return nn.RMSNorm(config.d_model, eps=config.epsilon)
    return nn.LayerNorm(config.d_model, eps=config.epsilon)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x (B, heads, T, K), cosine and sine (T, K)."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


class Attention(nn.Module):
    def __init__(self, config: CustomTransformerConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.kv_heads, config.d_head
        self.dropout = config.dropout
        heads = self.n_heads + 2 * self.n_kv_heads
        self.qkv = nn.Linear(config.d_model, heads * self.d_head, bias=config.traits.biases)
        self.output = nn.Linear(config.d_model, config.d_model, bias=config.traits.biases)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, visible: Tensor | None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.d_head)).transpose(1, 2)  # (B, H + 2G, T, K)
        query, key, value = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=1)
        if rotation is not None:
            cosine, sine = (table.to(query.dtype) for table in rotation)
            query, key = rotated(query, cosine, sine), rotated(key, cosine, sine)
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            is_causal=visible is None,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )
        return self.output(context.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: CustomTransformerConfig, activation: str):
        super().__init__()
        self.activation = {
            "gelu_tanh": nn.GELU(approximate="tanh"),
            "gelu": nn.GELU(),
            "relu": nn.ReLU(),
        }[activation]
        self.hidden = nn.Linear(config.d_model, config.d_ffn)
        self.output = nn.Linear(config.d_ffn, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.activation(self.hidden(x)))


class GatedFeedForward(nn.Module):
    """SwiGLU, gate and hidden layer in one product."""

    def __init__(self, config: CustomTransformerConfig):
        super().__init__()
        self.gated = nn.Linear(config.d_model, 2 * config.d_ffn, bias=False)
        self.output = nn.Linear(config.d_ffn, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, hidden = self.gated(x).chunk(2, dim=-1)
        return self.output(F.silu(gate) * hidden)


class Block(nn.Module):
    def __init__(self, config: CustomTransformerConfig, activation: str):
        super().__init__()
        self.pre_norm = config.traits.pre_norm
        self.attention_norm, self.feed_forward_norm = norm(config), norm(config)
        self.attention = Attention(config)
        self.feed_forward = GatedFeedForward(config) if config.traits.gated else FeedForward(config, activation)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, visible: Tensor | None) -> Tensor:
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), rotation, visible))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, rotation, visible)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Decoder(nn.Module):
    """Tokens to logits, and to the loss."""

    def __init__(self, config: CustomTransformerConfig, activation: str, table: Tensor | None):
        super().__init__()
        traits = config.traits
        self.scale = math.sqrt(config.d_model) if traits.scaled_embedding else 1.0
        self.label_smoothing, self.recompute = config.label_smoothing, config.recompute == "block"
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        if traits.positions == "learned":
            self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model)
        self.positions = traits.positions
        self.table = table  # of sinusoids (T, D), or of cosines and sines (2, T, K); not a buffer: it keeps its format
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, activation) for _ in range(config.n_blocks))
        self.final_norm = norm(config) if traits.pre_norm else nn.Identity()
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, V)."""
        length, rotation = tokens.shape[1], None
        x = self.token_embedding(tokens)
        if self.scale != 1.0:
            x = x * self.scale
        if self.positions == "learned":
            x = x + self.position_embedding.weight[:length]
        elif self.positions == "sinusoidal":
            assert self.table is not None
            x = x + self.table[:length].to(x.dtype)
        else:
            assert self.table is not None
            rotation = self.table[0, :length], self.table[1, :length]
        x = self.dropout(x)
        for block in self.blocks:
            x = block_forward(block, self.recompute, x, rotation, visible)
        return self.head(self.final_norm(x))

    def loss(self, tokens: Tensor, targets: Tensor, visible: Tensor | None, denominator: Tensor) -> Tensor:
        return summed_loss(self(tokens, visible), targets, self.label_smoothing, denominator)


class BaselineTransformer(AutogradNetwork):
    """`Network` by autograd, with `torch.nn` and without a line of this project's calculus.

    Gradients are made anew in each step, as `zero_grad(set_to_none=True)` has it; `gradients` looks at them.
    """

    parameters: Mapping[str, Tensor]

    def __init__(self, config: CustomTransformerConfig | Mapping[str, Any]):
        super().__init__(config)
        config = self.config
        table = getattr(self, "position_table", None)
        if config.traits.positions == "rotary":
            assert table is not None
            table = table.repeat(1, 1, 2)  # cosines and sines of both elements of a pair, (2, max_seq_len, K)
        with torch.device("meta"):  # nothing is allocated or drawn twice
            self.module = Decoder(config, self.activation, table)
        for part in self.module.modules():  # not `to_empty`, which cannot be estimated (memory_estimate: fake tensors)
            for name, parameter in part.named_parameters(recurse=False):
                empty = torch.empty_like(parameter, dtype=config.get_dtype(), device=self.device)
                setattr(part, name, nn.Parameter(empty))
        if config.traits.tied_head:
            self.module.head.weight = self.module.token_embedding.weight
        self.places = self._places()
        self.parameters = {name: whole.detach()[rows] for name, (whole, rows) in self.places.items()}
        self._initialize()
        self.compiles = config.compile == "always" or (config.compile == "auto" and self.device.type == "cuda")
        self.compiled: bool | None = None  # whether the step is compiled; None: not yet tried
        self._loss: Any = self.module.loss

    # Names: where the others have query, key and value, here is one tensor

    def _places(self) -> dict[str, tuple[nn.Parameter, slice]]:
        """Every parameter's name -> the module's tensor that holds it, and which of its rows."""
        wholes, shapes = dict(self.module.named_parameters()), parameter_shapes(self.config)
        places = {name: (wholes[name], slice(0, shape[0])) for name, shape in shapes.items() if name in wholes}
        for block in range(self.config.n_blocks):
            for whole, names in packed_names(self.config, block).items():
                start = 0
                for name in names:
                    places[name] = wholes[whole], slice(start, start + shapes[name][0])
                    start += shapes[name][0]
        return {name: places[name] for name in shapes}

    @property
    def gradients(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Views of what autograd left, zeros where it left nothing."""
        return {
            name: torch.zeros_like(self.parameters[name]) if whole.grad is None else whole.grad[rows]
            for name, (whole, rows) in self.places.items()
        }

    def gradient_tensors(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]

    # Forward and backward

    def _visible(self, segments: Tensor | None) -> Tensor | None:
        if segments is None:
            return None
        T = segments.shape[1]
        return Visible.within(segments).mask(T, T, self.device)

    def _set_training(self, step: int | None, first_row: int = 0) -> None:
        """Dropout in training only; its generator is set anew in each step, so that a resumed run draws the same."""
        training = step is not None and self.config.dropout > 0
        if self.module.training != training:
            self.module.train(training)
        if training:
            torch.manual_seed(random_key(self.config.seed, step or 0, f"baseline/{first_row}"))

    @torch.enable_grad()
    def loss_and_gradients(self, batch: Batch, *, denominator: int | Tensor, step: int | None) -> Tensor:
        self.check_tokens(batch.tokens, batch.targets, batch.segments)
        self._set_training(step, batch.first_row)
        count = self.on_device(denominator).clamp(min=1)  # no target counts: the loss is 0
        arguments = batch.tokens, batch.targets.long(), self._visible(batch.segments), count
        if self.compiled is None:
            loss = self._first_step(arguments)
            self._notify_gradients_complete()
            return loss
        with self._autocast():
            loss = self._loss(*arguments)
        loss.backward()
        self._notify_gradients_complete()
        return loss.detach()

    def _first_step(self, arguments: tuple) -> Tensor:
        """Tries the compiled step, where it is wanted; goes on without where it cannot be had (no C++ compiler)."""
        self.compiled = self.compiles
        if self.compiled:
            before = [None if p.grad is None else p.grad.clone() for p in self.module.parameters()]
            compiled = torch.compile(self.module.loss)
            try:
                with self._autocast():
                    loss = compiled(*arguments)
                loss.backward()
                self._loss = compiled
                return loss.detach()
            except Exception as error:
                # whatever the compiler raises; what is wrong with the network itself raises again below
                self.compiled = self.compiles = False
                for parameter, gradient in zip(self.module.parameters(), before, strict=True):
                    parameter.grad = gradient
                log.warning("torch.compile does not work here, so the baseline runs uncompiled: %s", first_line(error))
        with self._autocast():
            loss = self._loss(*arguments)
        loss.backward()
        return loss.detach()

    def _logits_of(self, tokens: Tensor, segments: Tensor | None, step: int | None) -> Tensor:
        """Never compiled: evaluation and generation come in many shapes, and each would be compiled again."""
        self._set_training(step)
        return self.module(tokens, self._visible(segments))

    # The update

    def zero_gradients(self) -> None:
        self.module.zero_grad(set_to_none=True)

    @torch.no_grad()
    def update_parameters(self, learning_rate: float) -> None:
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=learning_rate)

    def adamw(self, weight_decay: float, betas: tuple[float, float], epsilon: float) -> Optimizer:
        return TorchOptimizer(
            torch.optim.AdamW, self.places, weight_decay, {"betas": betas, "eps": epsilon}, ("exp_avg", "exp_avg_sq")
        )

    def sgd(self, weight_decay: float, momentum: float) -> Optimizer:
        return TorchOptimizer(torch.optim.SGD, self.places, weight_decay, {"momentum": momentum}, ("momentum_buffer",))
