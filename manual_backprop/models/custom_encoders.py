"""The encoder-decoder by hand (Vaswani et al. 2017, section 3), two stacks of the blocks of `custom.py`; and an encoder
alone, whose output is one row of numbers for each sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Visible
from ..ops.loss import OBJECTIVES, objective_gradient, objective_loss
from .custom import CustomTransformer
from .network import DropoutSource, Memory
from .step import Cache


class CustomEncoderDecoder(CustomTransformer):
    """Sources and shifted targets -> logits. The gradient of the memory is the sum over all blocks of the decoder; then
    it goes through the encoder."""

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
        memory, encoder_cache = self._hidden_forward(source, visible, dropout, stack="encoder.")
        read = Memory(memory.clone(), visible)
        x, decoder_cache = self._hidden_forward(tokens, Visible.within(None), dropout, stack="decoder.", memory=read)
        loss, loss_cache = self._loss_forward(x, targets, denominator)
        dx = self._loss_backward(self.dloss, loss_cache)
        dmemory = torch.zeros_like(read.states, dtype=self.config.get_dtype())  # as wide as the residual stream
        self._hidden_backward(dx, decoder_cache, "decoder.", dmemory)
        self._hidden_backward(dmemory, encoder_cache, "encoder.")
        self.on_gradients_complete(None)
        return loss

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
        self, source: Tensor, lengths: Tensor, tokens: Tensor, *, dropout: DropoutSource, keep: bool = True
    ) -> tuple[Tensor, Cache]:
        visible = Visible(causal=False, key_lengths=lengths)
        memory, encoder_cache = self._hidden_forward(source, visible, dropout, keep, "encoder.")
        read = Memory(memory.clone(), visible)
        x, decoder_cache = self._hidden_forward(tokens, Visible.within(None), dropout, keep, "decoder.", read)
        logits, head_cache = self.ops.linear_forward(x, self.head)
        return logits, (encoder_cache, read.states, decoder_cache, head_cache)

    def _outputs_backward(self, dlogits: Tensor, cache: Cache) -> None:
        encoder_cache, memory, decoder_cache, head_cache = cache
        # logits = x head^T
        dx = self.ops.linear_backward(dlogits, head_cache, self.dhead)
        dmemory = torch.zeros_like(memory, dtype=self.config.get_dtype())
        self._hidden_backward(dx, decoder_cache, "decoder.", dmemory)
        self._hidden_backward(dmemory, encoder_cache, "encoder.")
        self.on_gradients_complete(None)

    @torch.no_grad()
    def encode(self, source: Tensor, lengths: Tensor) -> Tensor:
        self.check_source(source, lengths, len(source))
        visible = Visible(causal=False, key_lengths=lengths)
        with self._calculation():
            return self._hidden_forward(source, visible, DropoutSource(self.config, None), False, "encoder.")[0]


class CustomEncoder(CustomTransformer):
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
        ops, smoothing = self.ops, self.config.label_smoothing
        outputs, cache = self._outputs_forward(inputs, lengths, dropout=dropout)
        if self.config.head_loss in OBJECTIVES:
            loss, loss_cache = objective_loss(outputs, targets, denominator, self.config.head_loss)
            doutputs = objective_gradient(self.dloss, loss_cache)
        elif self.config.head_loss == "squared_error":
            loss, loss_cache = ops.squared_error_forward(outputs, targets, denominator)
            doutputs = ops.squared_error_backward(self.dloss, loss_cache)
        else:
            loss, loss_cache = ops.cross_entropy_forward(outputs, targets, denominator, smoothing)
            doutputs = ops.cross_entropy_backward(self.dloss, loss_cache)
        self._outputs_backward(doutputs, cache)
        return loss

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

    def _outputs_forward(  # type: ignore[override]
        self, inputs: Tensor, lengths: Tensor, *, dropout: DropoutSource, keep: bool = True
    ) -> tuple[Tensor, Cache]:
        """inputs (B, T) or (B, T, C) -> outputs (B, n_outputs)."""
        x, embedding_cache = self._embedding_forward(inputs, dropout, "encoder.")
        visible = Visible(causal=False, key_lengths=lengths)
        x, stack_cache = self._stack_forward(x, visible, dropout, keep, "encoder.", None)
        if self.config.pooling == "mean":
            pooled, pooling_cache = self.ops.mean_pooling_forward(x, lengths)
        else:
            pooled, pooling_cache = self.ops.first_position_forward(x)
        outputs, head_cache = self.ops.linear_forward(pooled, self.head, self.parameters["head.bias"])
        self._recording("pooled", pooled)
        self._recording("outputs", outputs)
        return outputs, (embedding_cache, stack_cache, pooling_cache, head_cache)

    def _outputs_backward(self, doutputs: Tensor, cache: Cache) -> None:
        embedding_cache, stack_cache, pooling_cache, head_cache = cache
        self._recording("doutputs", doutputs)
        # outputs = pooled head^T + bias
        dpooled = self.ops.linear_backward(doutputs, head_cache, self.dhead, self.gradients["head.bias"])
        self._recording("dpooled", dpooled)
        # pooled = mean(x) over the real positions, or x at the first position
        if self.config.pooling == "mean":
            dx = self.ops.mean_pooling_backward(dpooled, pooling_cache)
        else:
            dx = self.ops.first_position_backward(dpooled, pooling_cache)
        dx = self._stack_backward(dx, stack_cache, "encoder.")
        self._embedding_backward(dx, embedding_cache, "encoder.")
        self.on_gradients_complete(None)
