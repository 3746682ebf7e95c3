"""The interface of a language model: token ids in; logits, losses and token ids out. Not an `nn.Module`.

`CustomTransformerWrapper` gives `CustomTransformer` the interface that users of `transformers` know. The networks in
`models/` compute the steps; `training/` has the loop for long trainings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...common.batch import Batch
from ...common.errors import InputError
from ...config.schema import CustomTransformerConfig
from ...ops import IGNORED
from ..custom import CustomTransformer
from ..decoding.generation import LENGTH_PENALTY, Drawing, beam_search, check_beams, check_new_tokens, one_by_one
from ..decoding.incremental import IncrementalDecoder
from ..implementations import build_network
from ..network import check_ids
from .wrapper import NetworkWrapper, check_tensor, config_of


class LanguageModel(NetworkWrapper):
    """Any decoder, used as a language model."""

    kind = "decoder"

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor | None]:
        """Logits, and with labels the loss, in evaluation (no dropout).

        input_ids (B, T) of token ids. labels (B, T) as in transformers: usually input_ids themselves, which are shifted
        inside (the logits at t predict the label at t + 1), -100 where they do not count. The loss is the mean over
        those that count, 0 if none does. attention_mask (B, T) is 1 for real tokens and 0 for padding. No real token
        sees padding; the labels of padding count unless they are -100, as in transformers.

        Returns {"logits": (B, T, V), "loss": one number or None}. Raises InputError for arguments that cannot be used.
        """
        tokens, targets, segments = self._read(input_ids, labels, attention_mask)
        logits = self.network.predict(tokens, segments)
        loss = None
        if targets is not None:
            loss, _ = ops.cross_entropy_forward(logits, targets)
        return {"logits": logits, "loss": loss}

    __call__ = forward

    def train_step(
        self,
        input_ids: Tensor,
        labels: Tensor,
        learning_rate: float,
        max_grad_norm: float | None = 1.0,
        attention_mask: Tensor | None = None,
    ) -> dict[str, float | str]:
        """One step of plain gradient descent: forward, loss, loss gradient, backward, clip, update.

        Returns {"loss", "grad_norm" (before clipping), "status"}: Python numbers, so this waits for the device. The
        status is "success", or "skipped" if the loss or the norm was not finite: then nothing is updated. Raises
        InputError, and changes nothing, for arguments that cannot be used.
        """
        self._check_rates(learning_rate, max_grad_norm)
        tokens, targets, segments = self._read(input_ids, labels, attention_mask)
        if targets is None:
            raise InputError("labels are None: a training step needs them, usually input_ids themselves.")
        network, self.step = self.network, self.step + 1
        network.zero_gradients()
        logits = network.forward(tokens, segments, step=self.step)
        smoothing, padding = self.config.label_smoothing, self.config.padding_token_id
        loss, loss_cache = ops.cross_entropy_forward(logits, targets, None, smoothing, padding)
        dlogits = ops.cross_entropy_backward(1.0, loss_cache)
        network.backward(dlogits)
        return self._update(loss, learning_rate, max_grad_norm)

    def batch(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Batch:
        """What the network learns from, on its device; the arguments are those of `forward`. Raises InputError."""
        tokens, targets, segments = self._read(input_ids, labels, attention_mask)
        if targets is None:
            raise InputError("labels are None: expected a tensor, usually input_ids themselves.")
        return Batch(tokens, targets, segments)

    def generate(
        self,
        input_ids: Tensor,
        max_length: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        seed: int | None = None,
        beams: int = 1,
        length_penalty: float = LENGTH_PENALTY,
    ) -> Tensor:
        """The prompt and its continuation, (B, T + at most max_length).

        input_ids (B, T) with T >= 1. max_length counts new tokens. temperature 0 takes the likeliest token each time,
        the first of equal ones; otherwise the token is sampled from the top_k likeliest (None or 0: all) and, of these,
        from the smallest set whose probabilities reach top_p (None: all). A row that has chosen eos_token_id repeats
        it; when all rows have, this returns. The same seed samples the same tokens. Beyond max_seq_len the model no
        longer sees the oldest tokens: the window moves by half its length (models/decoding/incremental.py).

        beams > 1 is a beam search (models/decoding/generation.py) and samples nothing: it follows that many
        continuations of each row at once, and returns the one with the highest
        score = log p(new tokens) / ((5 + number of new tokens) / 6)^length_penalty.
        """
        check_beams(beams, length_penalty)
        if beams == 1:
            tokens = [input_ids]
            tokens += self.stream(input_ids, max_length, temperature, top_k, top_p, eos_token_id, seed)
            return torch.cat(tokens, dim=1)
        self._check_prompt(input_ids, max_length)
        Drawing(temperature, top_k, top_p, seed)  # refuses values out of range, although nothing is sampled
        decoder, unread = IncrementalDecoder(self.network, len(input_ids)), self._unread(input_ids)
        best = beam_search(decoder, unread, max_length, beams, length_penalty, eos_token_id)
        longest = max(map(len, best))
        continued = input_ids.new_full((len(best), longest), eos_token_id or 0)
        for row, found in enumerate(best):
            continued[row, : len(found)] = found
        return torch.cat((input_ids, continued), dim=1)

    def stream(
        self,
        input_ids: Tensor,
        max_length: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """`generate`, token by token: yields (B, 1) as soon as it is chosen. Raises InputError at the call."""
        self._check_prompt(input_ids, max_length)
        drawing = Drawing(temperature, top_k, top_p, seed)
        decoder = IncrementalDecoder(self.network, len(input_ids))
        drawn = one_by_one(decoder, self._unread(input_ids), max_length, drawing, eos_token_id)
        return (token.to(input_ids.device) for token in drawn)

    def _check_prompt(self, input_ids: Tensor, max_length: int) -> None:
        check_new_tokens("max_length", max_length)
        check_tensor("input_ids", input_ids)
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise InputError(
                f"input_ids have shape {tuple(input_ids.shape)}; expected (batch, sequence) with at least one token: "
                "continue from the end token if there is no prompt."
            )
        self.network.check_tokens(input_ids[:, -self.config.max_seq_len :])
        check_ids("token id", input_ids, self.config.vocab_size)

    def _unread(self, input_ids: Tensor) -> Tensor:
        """The part of a prompt that the model can see, on the network's device."""
        return input_ids[:, -self.config.max_seq_len :].to(self.network.device)

    def _read(
        self, input_ids: Tensor, labels: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Checks, shifts and moves to the device -> tokens, targets, segments, (B, T) each."""
        for name, tensor in (("input_ids", input_ids), ("labels", labels), ("attention_mask", attention_mask)):
            check_tensor(name, tensor)
        for name, tensor in (("labels", labels), ("attention_mask", attention_mask)):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise InputError(
                    f"{name} has shape {tuple(tensor.shape)}; expected that of input_ids, {tuple(input_ids.shape)}."
                )
        self.network.check_tokens(input_ids)
        check_ids("token id", input_ids, self.config.vocab_size)  # check_tokens skips this on a GPU
        targets = segments = None
        if labels is not None:
            if labels.dtype not in (torch.int64, torch.int32):
                raise InputError(f"labels are {labels.dtype}; expected whole numbers, torch.int64 or torch.int32.")
            check_ids("label", labels, self.config.vocab_size, ignored=True)
            targets = torch.full_like(labels, IGNORED)
            targets[:, :-1] = labels[:, 1:]
            targets = targets.to(self.network.device)
        if attention_mask is not None and not bool(attention_mask.all()):
            segments = (attention_mask != 0).long().to(self.network.device)
        return input_ids.to(self.network.device), targets, segments


class CustomTransformerWrapper(LanguageModel):
    """The hand-written transformer as a language model.

        model = CustomTransformerWrapper(vocab_size=256, d_model=64, n_blocks=2, n_heads=4, d_ffn=256, max_seq_len=64)
        model.train_step(input_ids, labels=input_ids, learning_rate=0.1)
        model.generate(input_ids[:, :8], max_length=20, temperature=0.8)

    Takes keywords (the sizes and any other field of CustomTransformerConfig: architecture, precision, dropout, device,
    seed ...), a CustomTransformerConfig, or a mapping of its fields. Raises ConfigError with everything that is wrong.

    >>> model = CustomTransformerWrapper(vocab_size=16, d_model=16, n_blocks=1, n_heads=2, d_ffn=32, max_seq_len=8)
    >>> input_ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    >>> for step in range(60):
    ...     result = model.train_step(input_ids, labels=input_ids, learning_rate=0.3)
    >>> result["status"], result["loss"] < 0.5
    ('success', True)
    >>> model.generate(input_ids[:, :4], max_length=4, temperature=0)
    tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    >>> model.save_checkpoint("counting").name
    'step-000060'
    >>> CustomTransformerWrapper.from_checkpoint("counting").get_model_info()["parameters"]
    2640
    """

    def __init__(self, config: CustomTransformerConfig | Mapping[str, Any] | None = None, **fields: Any):
        """Default sizes (vocab_size, d_model, n_blocks, n_heads, d_ffn, max_seq_len): 50257, 256, 4, 4, 512, 256."""
        super().__init__(CustomTransformer(config_of(config, fields)))

    @classmethod
    def from_checkpoint(cls, path: str | Path, **changes: Any) -> CustomTransformerWrapper:
        """The model of a checkpoint, or of the newest one in a directory. `changes` replace fields of its config that
        the parameters do not depend on, `device="cpu"` for example; another precision converts it, and a line of the
        log says so. Raises CheckpointError, and ConfigError for `changes` that no network can have."""
        return cls._of_checkpoint(path, changes)


def build_model(implementation: str, config: CustomTransformerConfig) -> LanguageModel:
    """The decoder of `implementation=NAME` as a language model. Raises ConfigError if it cannot be built."""
    if implementation == "custom":
        return CustomTransformerWrapper(config)
    return LanguageModel(build_network(implementation, config))
