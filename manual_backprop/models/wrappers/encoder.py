"""The interface of an encoder: sequences in, one row of numbers for each of them out. Not an `nn.Module`.

The row holds the logits of classes (cross-entropy), or predicted numbers (squared error). The sequences consist of
token ids, or of rows of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ...common.batch import EncoderBatch
from ...common.errors import InputError
from ...config.schema import CustomTransformerConfig
from ..implementations import build_network
from ..network import check_ids
from .rows import Rows, padded, padded_numbers
from .wrapper import NetworkWrapper, config_of


class EncoderWrapper(NetworkWrapper):
    """An encoder that returns n_outputs numbers for each sequence.

        model = EncoderWrapper(vocab_size=11, n_outputs=2, d_model=32, n_blocks=1, n_heads=4, d_ffn=64, max_seq_len=16)
        model.train_step([[1, 2, 3], [4, 5]], [0, 1], learning_rate=0.1)
        model.predict([[1, 2, 3]]).argmax(-1)

    Takes a CustomTransformerConfig with network=encoder, a mapping of its fields, or its fields as keywords; and the
    `implementation`: custom, torch or baseline. Raises ConfigError with everything that is wrong.

    >>> model = EncoderWrapper(vocab_size=11, n_outputs=2, d_model=16, n_blocks=1, n_heads=2, d_ffn=32, max_seq_len=8)
    >>> for step in range(50):
    ...     result = model.train_step([[1, 2, 3], [4, 5]], targets=[0, 1], learning_rate=0.3)
    >>> model.predict([[1, 2, 3], [4, 5]]).argmax(-1)
    tensor([0, 1])
    """

    kind = "encoder"

    def __init__(
        self,
        config: CustomTransformerConfig | Mapping[str, Any] | None = None,
        *,
        implementation: str = "custom",
        **fields: Any,
    ):
        super().__init__(build_network(implementation, config_of(config, fields, self.kind)))

    def predict(self, inputs: Rows, lengths: Tensor | None = None) -> Tensor:
        """The outputs (B, n_outputs): the logits of the classes, or numbers.

        inputs: a list of lists of ids, or (B, T) of ids; with n_inputs = C (B, T, C) of numbers, or a list of tables
        (T, C). `lengths` (B,) of a tensor: what comes after a length is padding. Raises InputError."""
        return self.network.predict(self.batch(inputs, None, lengths))

    __call__ = predict

    def train_step(
        self,
        inputs: Rows,
        targets: Tensor | Sequence[Any],
        learning_rate: float,
        max_grad_norm: float | None = 1.0,
        lengths: Tensor | None = None,
    ) -> dict[str, float | str]:
        """One step of plain gradient descent. targets: a class for each sequence, (B,), -100 where it does not count;
        or with head_loss=squared_error (B, n_outputs) of numbers, NaN where one does not count. The loss is the mean
        over the targets that count.

        Returns {"loss", "grad_norm" (before clipping), "status"}: Python numbers, so this waits for the device. The
        status is "success", or "skipped" if the loss or the norm was not finite: then nothing is updated. Raises
        InputError, and changes nothing, for arguments that cannot be used.
        """
        self._check_rates(learning_rate, max_grad_norm)
        batch = self.batch(inputs, targets, lengths)
        self.step += 1
        self.network.zero_gradients()
        counts = ~batch.targets.isnan() if batch.targets.is_floating_point() else batch.targets >= 0
        loss = self.network.loss_and_gradients(batch, denominator=int(counts.sum()), step=self.step)
        return self._update(loss, learning_rate, max_grad_norm)

    def batch(self, inputs: Rows, targets: Tensor | Sequence[Any] | None, lengths: Tensor | None) -> EncoderBatch:
        """The checked batch on the network's device; without targets none of them counts."""
        config = self.config
        if config.n_inputs is None:
            rows, lengths = padded("inputs", inputs, lengths, 0)
            real = torch.arange(rows.shape[1]) < lengths[:, None]
            check_ids("token id", rows[real], config.vocab_size)
            rows = torch.where(real, rows, 0)
        else:
            rows, lengths = padded_numbers("inputs", inputs, lengths, config.n_inputs)
            rows = rows.to(config.get_dtype())
        wanted = self._targets(targets, len(rows))
        device = self.network.device
        return EncoderBatch(rows.to(device), lengths.to(device), wanted.to(device))

    def _targets(self, targets: Tensor | Sequence[Any] | None, B: int) -> Tensor:
        config, n = self.config, self.config.n_outputs
        assert n is not None
        numbers = config.predicts_numbers
        shape = (B, n) if numbers else (B,)
        if targets is None:
            return torch.full(shape, torch.nan, dtype=config.get_dtype()) if numbers else torch.full(shape, -100)
        given = torch.as_tensor(targets)
        if given.shape != shape or (given.is_floating_point() and not numbers):
            expected = "numbers" if numbers else "whole numbers, a class for each sequence"
            raise InputError(
                f"targets have shape {tuple(given.shape)} and are {given.dtype}; expected {expected}, {shape}."
            )
        if numbers:
            return given.to(config.get_dtype())
        check_ids("class", given, n, ignored=True)
        return given.long()

    @classmethod
    def from_checkpoint(cls, path: str | Path, **changes: Any) -> Self:
        """The model of a checkpoint, or of the newest one in a directory. `changes` replace fields of its config that
        the parameters do not depend on, `device="cpu"` for example; another precision converts it, and a line of the
        log says so. Raises CheckpointError, and ConfigError for `changes` that no network can have."""
        return cls._of_checkpoint(path, changes)
