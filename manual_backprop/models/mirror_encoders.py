"""The encoder-decoder and the encoder by autograd. This file follows `custom_encoders.py` name for name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Visible
from .autograd import head_loss
from .mirror import TorchTransformer
from .network import DropoutSource, Memory


class TorchEncoderDecoder(TorchTransformer):
    """Sources and shifted targets -> logits."""

    kind = "encoder_decoder"

    def _training_step(  # type: ignore[override]
        self,
        source: Tensor,
        tokens: Tensor,
        targets: Tensor,
        visible: Visible,
        denominator: int | Tensor,
        dropout: DropoutSource,
    ) -> Tensor:
        memory = self._hidden_forward(source, visible, dropout, stack="encoder.")
        x = self._hidden_forward(
            tokens, Visible.within(None), dropout, stack="decoder.", memory=Memory(memory, visible)
        )
        return self._loss_forward(x, targets, denominator)

    def _step(  # type: ignore[override]
        self,
        source: Tensor,
        lengths: Tensor,
        tokens: Tensor,
        targets: Tensor,
        *,
        denominator: int | Tensor,
        dropout: DropoutSource,
    ) -> Tensor:
        visible = Visible(causal=False, key_lengths=lengths)
        return self._training_step(source, tokens, targets, visible, denominator, dropout)

    def _outputs_forward(  # type: ignore[override]
        self, source: Tensor, lengths: Tensor, tokens: Tensor, *, dropout: DropoutSource
    ) -> Tensor:
        visible = Visible(causal=False, key_lengths=lengths)
        memory = self._hidden_forward(source, visible, dropout, "encoder.")
        read = Memory(memory, visible)
        x = self._hidden_forward(tokens, Visible.within(None), dropout, "decoder.", read)
        return F.linear(x, self.head)

    @torch.no_grad()
    def encode(self, source: Tensor, lengths: Tensor) -> Tensor:
        self.check_source(source, lengths, len(source))
        with self._autocast():
            visible = Visible(causal=False, key_lengths=lengths)
            return self._hidden_forward(source, visible, DropoutSource(self.config, None), "encoder.")


class TorchEncoder(TorchTransformer):
    """Sequences of tokens, or of rows of numbers -> the logits of classes, or predicted numbers."""

    kind = "encoder"

    def _training_step(  # type: ignore[override]
        self,
        inputs: Tensor,
        lengths: Tensor,
        targets: Tensor,
        denominator: int | Tensor,
        dropout: DropoutSource,
    ) -> Tensor:
        outputs = self._outputs_forward(inputs, lengths, dropout=dropout)
        return head_loss(self.config, outputs, targets, denominator)

    def _step(  # type: ignore[override]
        self,
        inputs: Tensor,
        lengths: Tensor,
        targets: Tensor,
        *,
        denominator: int | Tensor,
        dropout: DropoutSource,
    ) -> Tensor:
        return self._training_step(inputs, lengths, targets, denominator, dropout)

    def _outputs_forward(self, inputs: Tensor, lengths: Tensor, *, dropout: DropoutSource) -> Tensor:  # type: ignore[override]
        """inputs (B, T) or (B, T, C) -> outputs (B, n_outputs)."""
        x = self._embedding_forward(inputs, dropout, "encoder.")
        visible = Visible(causal=False, key_lengths=lengths)
        x = self._stack_forward(x, visible, dropout, "encoder.", None)
        if self.config.pooling == "mean":
            real = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
            pooled = torch.where(real, x, 0).sum(1) / lengths.clamp(min=1)[:, None]
        else:
            pooled = x[:, 0]
        self._recording("pooled", pooled)
        outputs = F.linear(pooled, self.head, self.leaves["head.bias"])
        self._recording("outputs", outputs)
        return outputs
