"""What the two autograd networks share: the loss, mixed precision by autocast, and `forward` with `backward`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..common.batch import AnyBatch, as_batch
from ..common.errors import InputError
from ..config.network import CustomTransformerConfig
from ..ops import IGNORED
from ..ops.numerics import float32_products, wide
from .network import Network, block_names


def summed_loss(
    logits: Tensor, targets: Tensor, label_smoothing: float, denominator: int | Tensor, padding: int | None = None
) -> Tensor:
    """The cross-entropy of the targets that count, over `denominator`, one number.

    logits (B, T, V), targets (B, T) int64; computed in float32 or wider. `padding` as in `ops.cross_entropy_forward`.
    """
    z = wide(logits)
    if label_smoothing and padding is not None:
        log_probabilities, counts = z.log_softmax(-1), targets != IGNORED
        on_target = log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        others = log_probabilities.sum(-1) - log_probabilities[..., padding]
        mean = others / (logits.shape[-1] - 1)
        return torch.where(counts, -(1 - label_smoothing) * on_target - label_smoothing * mean, 0).sum() / denominator
    total = F.cross_entropy(
        z.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / denominator


def squared_errors(outputs: Tensor, targets: Tensor, denominator: int | Tensor) -> Tensor:
    """The sum of (outputs - targets)^2 over targets that are not NaN, divided by `denominator`. Both (B, n_outputs)."""
    counts = ~targets.isnan()
    return torch.where(counts, wide(outputs) - torch.where(counts, targets, 0), 0).square().sum() / denominator


# Autograd's versions of the hand-written pairs. `extensions` registers those of users here.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}
OBJECTIVES: dict[str, Callable[[Tensor, Tensor, int | Tensor], Tensor]] = {}


def head_loss(config: CustomTransformerConfig, outputs: Tensor, targets: Tensor, denominator: int | Tensor) -> Tensor:
    """The loss of a network's head. Outputs (B, T, V) with targets (B, T); an encoder's outputs (B, n_outputs) with
    targets (B,) or (B, n_outputs)."""
    if config.head_loss in OBJECTIVES:
        return OBJECTIVES[config.head_loss](wide(outputs), targets, denominator)
    if config.head_loss == "squared_error":
        return squared_errors(outputs, targets, denominator)
    if config.network == "encoder":
        outputs, targets = outputs[:, None], targets[:, None]
    return summed_loss(outputs, targets.long(), config.label_smoothing, denominator, config.padding_token_id)


def block_forward(block: Callable[..., Any], recompute: bool, *inputs: Any) -> Any:
    """block(*inputs). With `recompute`, autograd keeps only its inputs, and backward runs the block again (Chen et al.
    2016) with the same dropout: torch's generator is reset to its earlier state."""
    if not (recompute and torch.is_grad_enabled()):
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False)


class AutogradNetwork(Network):
    """A network whose `forward` builds a graph and whose `backward` is its `.backward()`. Subclasses define the
    logits."""

    _logits: Tensor | None = None  # of the last forward, until its backward

    @abstractmethod
    def _outputs_of(self, inputs: tuple[Tensor | None, ...], step: int | None) -> Tensor:
        """`inputs_of` a batch -> logits (B, T, V), or the other outputs of this network's head. `step` chooses the
        dropout masks; None: no dropout."""

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        mixed = self.compute_dtype != self.config.get_dtype()
        autocast = torch.autocast(self.device.type, dtype=self.compute_dtype) if mixed else nullcontext()
        with float32_products(self.config.precision), autocast:
            yield

    def _backward(self, loss: Tensor) -> None:
        """Adds to all gradients."""
        with float32_products(self.config.precision), self._scaled_gradients() as dloss:
            (loss * dloss if isinstance(dloss, Tensor) else loss).backward()

    def _notify_gradients_complete(self) -> None:
        """Reports all gradients at the end: autograd reports none of them earlier."""
        for block in reversed(block_names(self.config)):
            self.on_gradients_complete(block)
        self.on_gradients_complete(None)

    @torch.enable_grad()
    def forward(self, tokens: Tensor | AnyBatch, segments: Tensor | None = None, step: int | None = None) -> Tensor:
        inputs = self.inputs_of(as_batch(tokens, segments), targets=False)
        with self._autocast():
            self._logits = self._outputs_of(inputs, step)
        return self._logits.detach()

    def backward(self, dlogits: Tensor) -> None:
        if self._logits is None:
            raise InputError(
                "backward needs the forward it belongs to: call forward(tokens) first, once for each backward."
            )
        with float32_products(self.config.precision), self._scaled_gradients() as dloss:
            scaled = dlogits * dloss if isinstance(dloss, Tensor) else dlogits
            self._logits.backward(scaled.to(self._logits.dtype))
        self._logits = None
        self._notify_gradients_complete()

    @torch.no_grad()
    def predict(self, tokens: Tensor | AnyBatch, segments: Tensor | None = None) -> Tensor:
        inputs = self.inputs_of(as_batch(tokens, segments), targets=False)
        with self._autocast():
            return self._outputs_of(inputs, None)
