"""The same network as PyTorch users write it: `torch.nn` (baseline_modules.py), and here `torch.compile` around it.

It is the peer in every measurement, so it is as fast as PyTorch makes it. `parameters`, `gradients` and the optimizer's
state have the names and values of the other implementations; inside, its weights are fused for PyTorch. Dropout is
torch's: the same probability as by hand, other masks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.batch import AnyBatch
from ..common.errors import first_line
from ..config.schema import CustomTransformerConfig
from ..ops import Visible, random_key
from ..optim.optimizers import Optimizer
from ..optim.torch_optimizers import TorchOptimizer
from .autograd import AutogradNetwork
from .baseline_modules import Decoder, Encoder, EncoderDecoder
from .network import block_names, packed_names, parameter_shapes

log = logging.getLogger(__name__)

MODULES: dict[str, Any] = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder}


class BaselineTransformer(AutogradNetwork):
    """A `Network` by autograd, with `torch.nn` and without this project's calculus.

    Each step allocates new gradients, as after `zero_grad(set_to_none=True)`; `gradients` returns views of them. Raises
    the errors of CustomTransformer.

    >>> sizes = {"vocab_size": 16, "d_model": 16, "n_blocks": 1, "n_heads": 2, "d_ffn": 32, "precision": "fp64"}
    >>> by_hand, baseline = CustomTransformer(sizes), BaselineTransformer(sizes)
    >>> baseline.load_parameters(by_hand.export_parameters())
    >>> tokens = torch.tensor([[1, 2, 3]])
    >>> torch.allclose(baseline.predict(tokens), by_hand.predict(tokens))
    True
    """

    def __init__(self, config: CustomTransformerConfig | Mapping[str, Any]):
        super().__init__(config)
        config = self.config
        table = getattr(self, "position_table", None)
        if config.position_kind == "rotary":
            assert table is not None
            table = table.repeat(1, 1, 2)  # cosines and sines of both elements of a pair, (2, max_seq_len, K)
        with torch.device("meta"):  # nothing is allocated or initialized twice
            self.module = MODULES[config.network](config, self.activation, table)
        for part in self.module.modules():  # not `to_empty`, which cannot be estimated (memory_estimate: fake tensors)
            for name, parameter in part.named_parameters(recurse=False):
                empty = torch.empty_like(parameter, dtype=config.get_dtype(), device=self.device)
                setattr(part, name, nn.Parameter(empty))
        if config.tied_head:
            self.module.head.weight = self.module.token_embedding.weight
        self.places = self._places()
        self.parameters = {name: whole.detach()[rows] for name, (whole, rows) in self.places.items()}
        self._initialize()
        self.compiles = config.compile == "always" or (config.compile == "auto" and self.device.type == "cuda")
        self.compiled: bool | None = None  # whether the step is compiled; None: not yet tried
        self.compile_mode: str | None = None  # of torch.compile
        self._loss: Any = self.module.loss

    # Names: query, key and value of the other implementations are one tensor here

    def _places(self) -> dict[str, tuple[nn.Parameter, slice]]:
        """Every parameter's name -> the module's tensor that contains it, and its rows there."""
        alone = "decoder." if self.config.network == "decoder" else ""  # the blocks of a decoder alone have no prefix
        wholes = {
            name.removeprefix(alone): whole for name, whole in self.module.named_parameters(remove_duplicate=False)
        }
        packed = [entry for block in block_names(self.config) for entry in packed_names(self.config, block).items()]
        fused = {part: whole for whole, parts in packed for part in parts}  # several matrices as one
        places: dict[str, tuple[nn.Parameter, slice]] = {}
        rows = dict.fromkeys(wholes, 0)  # rows that already have a name
        for name, shape in parameter_shapes(self.config).items():
            whole = fused.get(name, name)
            places[name] = wholes[whole], slice(rows[whole], rows[whole] + shape[0])
            rows[whole] += shape[0]
        return places

    @property
    def gradients(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Views of autograd's gradients; zeros where there is none yet."""
        return {
            name: torch.zeros_like(self.parameters[name]) if whole.grad is None else whole.grad[rows]
            for name, (whole, rows) in self.places.items()
        }

    def gradient_tensors(self) -> list[Tensor]:
        for parameter in self.module.parameters():
            if parameter.grad is None:  # no backward pass since `zero_gradients`
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]

    # Forward and backward

    def _arguments(self, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The arguments of the module's `forward`: a decoder's mask replaces its segments."""
        if self.config.network != "decoder":
            return inputs
        tokens, segments = inputs
        assert tokens is not None
        T = tokens.shape[1]
        return tokens, None if segments is None else Visible.within(segments).mask(T, T, self.device)

    def _set_training(self, step: int | None, first_row: int = 0) -> None:
        """Dropout in training only. Its generator is seeded in each step, so that a resumed run has the same masks."""
        training = step is not None and self.config.dropout > 0
        if self.module.training != training:
            self.module.train(training)
        if training:
            torch.manual_seed(random_key(self.config.seed, step or 0, f"baseline/{first_row}"))

    @torch.enable_grad()
    def loss_and_gradients(self, batch: AnyBatch, *, denominator: int | Tensor, step: int | None) -> Tensor:
        inputs = self.inputs_of(batch)
        self._set_training(step, batch.first_row)
        count = self.on_device(denominator).clamp(min=1)  # no target counts: the loss is 0
        arguments = *self._arguments(inputs), batch.targets, count
        loss = self._first_step(arguments) if self.compiled is None else self._step(self._loss, arguments)
        self._notify_gradients_complete()
        return loss

    def _step(self, loss_of: Any, arguments: tuple) -> Tensor:
        """Forward and backward -> the loss."""
        with self._autocast():
            loss = loss_of(*arguments)
        self._backward(loss)
        return loss.detach()

    def _first_step(self, arguments: tuple) -> Tensor:
        """Tries the compiled step, if asked for, and continues without it if it fails (no C++ compiler)."""
        self.compiled = self.compiles
        if self.compiled:
            before = [None if p.grad is None else p.grad.clone() for p in self.module.parameters()]
            compiled = torch.compile(self.module.loss, mode=self.compile_mode)
            try:
                loss = self._step(compiled, arguments)
                self._loss = compiled
                return loss
            except Exception as error:
                # the compiler may raise anything; an error of the network itself is raised again below
                self.compiled = self.compiles = False
                for parameter, gradient in zip(self.module.parameters(), before, strict=True):
                    parameter.grad = gradient
                log.warning("torch.compile does not work here, so the baseline runs uncompiled: %s", first_line(error))
        return self._step(self._loss, arguments)

    def _outputs_of(self, inputs: tuple[Tensor | None, ...], step: int | None) -> Tensor:
        """Never compiled: evaluation and generation have many shapes, and each of them would be compiled."""
        self._set_training(step)
        return self.module(*self._arguments(inputs))

    @torch.no_grad()
    def encode(self, source: Tensor, lengths: Tensor) -> Tensor:
        if self.config.network != "encoder_decoder":
            return super().encode(source, lengths)
        self.check_source(source, lengths, len(source))
        self._set_training(None)
        with self._autocast():
            return self.module.encode(source, lengths)

    # The update

    def zero_gradients(self) -> None:
        self.module.zero_grad(set_to_none=True)

    @torch.no_grad()
    def update_parameters(self, learning_rate: float) -> None:
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=learning_rate)

    def adamw(self, weight_decay: float, betas: tuple[float, float], epsilon: float) -> Optimizer:
        settings = {"betas": betas, "eps": epsilon}
        return self._optimizer(torch.optim.AdamW, weight_decay, settings, ("exp_avg", "exp_avg_sq"))

    def sgd(self, weight_decay: float, momentum: float) -> Optimizer:
        return self._optimizer(torch.optim.SGD, weight_decay, {"momentum": momentum}, ("momentum_buffer",))

    def _optimizer(
        self, kind: Any, weight_decay: float, settings: dict[str, Any], moments: tuple[str, ...]
    ) -> Optimizer:
        optimizer = TorchOptimizer(kind, self.places, weight_decay, settings, moments)
        optimizer.loss_scale = self.loss_scale
        return optimizer
