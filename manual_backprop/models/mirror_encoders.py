"""The encoder-decoder by autograd, which follows `custom_encoders.py` name for name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Visible
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
