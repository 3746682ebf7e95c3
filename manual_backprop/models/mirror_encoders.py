"""The encoder-decoder and the encoder by autograd, which follow `custom_encoders.py` name for name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Visible
from .autograd import squared_errors, summed_loss
from .mirror import TorchTransformer
from .network import DropoutSource, Memory


class TorchEncoderDecoder(TorchTransformer):
    """Sources and the beginnings of targets -> logits."""

    kind = "encoder_decoder"

    def _decoded(self, inputs: tuple[Tensor | None, ...], dropout: DropoutSource) -> Tensor:
        """source, its lengths, tokens (B, T) -> x (B, T, D)."""
        source, lengths, tokens = inputs
        assert source is not None
        assert tokens is not None
        visible = Visible(causal=False, key_lengths=lengths)
        memory = self._hidden_forward(source, visible, dropout, "encoder.")
        return self._hidden_forward(tokens, Visible.within(None), dropout, "decoder.", Memory(memory, visible))

    def _loss_of(
        self, inputs: tuple[Tensor | None, ...], targets: Tensor, denominator: Tensor, dropout: DropoutSource
    ) -> Tensor:
        return self._loss(self._decoded(inputs, dropout), targets, denominator)

    def _outputs_of(self, inputs: tuple[Tensor | None, ...], step: int | None) -> Tensor:
        return F.linear(self._decoded(inputs, DropoutSource(self.config, step)), self.head)

    @torch.no_grad()
    def encode(self, source: Tensor, lengths: Tensor) -> Tensor:
        self.check_source(source, lengths, len(source))
        with self._autocast():
            visible = Visible(causal=False, key_lengths=lengths)
            return self._hidden_forward(source, visible, DropoutSource(self.config, None), "encoder.")


class TorchEncoder(TorchTransformer):
    """Sequences of tokens, or of rows of numbers -> the logits of classes, or numbers that are predicted."""

    kind = "encoder"

    def _loss_of(
        self, inputs: tuple[Tensor | None, ...], targets: Tensor, denominator: Tensor, dropout: DropoutSource
    ) -> Tensor:
        outputs = self._outputs_forward(inputs, dropout)
        if self.config.head_loss == "squared_error":
            return squared_errors(outputs, targets, denominator)
        return summed_loss(outputs[:, None], targets[:, None].long(), self.config.label_smoothing, denominator)

    def _outputs_of(self, inputs: tuple[Tensor | None, ...], step: int | None) -> Tensor:
        return self._outputs_forward(inputs, DropoutSource(self.config, step))

    def _outputs_forward(self, inputs: tuple[Tensor | None, ...], dropout: DropoutSource) -> Tensor:
        """inputs (B, T) or (B, T, C), lengths (B,) -> outputs (B, n_outputs)."""
        tokens, lengths = inputs
        assert tokens is not None
        assert lengths is not None
        x = self._hidden_forward(tokens, Visible(causal=False, key_lengths=lengths), dropout, "encoder.")
        if self.config.pooling == "mean":
            real = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
            pooled = torch.where(real, x, 0).sum(1) / lengths.clamp(min=1)[:, None]
        else:
            pooled = x[:, 0]
        self._recording("pooled", pooled)
        outputs = F.linear(pooled, self.head, self.leaves["head.bias"])
        self._recording("outputs", outputs)
        return outputs
