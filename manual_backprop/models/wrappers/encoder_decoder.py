"""The interface of an encoder-decoder: sequences of token ids in, losses and sequences out. Not an `nn.Module`.

Sources and targets are given without beginning and end tokens. The wrapper adds those to a target: the decoder reads
`beginning a b c` and learns to predict `a b c end` (teacher forcing).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ... import ops
from ...common.batch import PairBatch
from ...common.errors import CheckpointError, ConfigError, InputError
from ...config.schema import CustomTransformerConfig
from ...ops import IGNORED
from ..decoding.generation import LENGTH_PENALTY, Drawing, beam_search, check_beams, check_new_tokens, one_by_one
from ..decoding.incremental import IncrementalDecoder
from ..implementations import build_network
from ..network import check_ids
from .rows import Rows, padded
from .wrapper import NetworkWrapper, config_of


class EncoderDecoderWrapper(NetworkWrapper):
    """An encoder-decoder that learns to turn a source into a target.

    Takes a CustomTransformerConfig with network=encoder_decoder, a mapping of its fields, or its fields as keywords;
    and the `implementation`: custom, torch or baseline. Raises ConfigError, which lists all violations.

    The target's vocabulary has three special tokens: padding, beginning and end. Unless they are given, they are its
    last three ids, in this order: V - 3, V - 2, V - 1.

    >>> model = EncoderDecoderWrapper(vocab_size=9, d_model=32, n_blocks=1, n_heads=4, d_ffn=64, max_seq_len=8)
    >>> for step in range(60):
    ...     result = model.train_step([[1, 2, 3], [4, 5]], [[3, 2, 1], [5, 4]], learning_rate=0.3)
    >>> model.generate([[1, 2, 3], [4, 5]], beams=4)  # 8 is the end, 6 is padding
    tensor([[3, 2, 1, 8], [5, 4, 8, 6]])
    """

    kind = "encoder_decoder"

    def __init__(
        self,
        config: CustomTransformerConfig | Mapping[str, Any] | None = None,
        *,
        implementation: str = "custom",
        padding_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **fields: Any,
    ):
        config = config_of(config, fields, self.kind)
        V = config.vocab_size
        known = config.padding_token_id if padding_token_id is None else padding_token_id
        self.padding_token_id = V - 3 if known is None else known
        if isinstance(self.padding_token_id, int) and 0 <= self.padding_token_id < V:  # otherwise it is refused below
            config = replace(config, padding_token_id=self.padding_token_id)
        super().__init__(build_network(implementation, config))
        self.bos_token_id = V - 2 if bos_token_id is None else bos_token_id
        self.eos_token_id = V - 1 if eos_token_id is None else eos_token_id
        if wrong := self._wrong_special(self._special()):
            raise ConfigError(wrong)

    def _special(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("padding_token_id", "bos_token_id", "eos_token_id")}

    def _wrong_special(self, special: Mapping[str, Any]) -> list[str]:
        V = self.config.vocab_size
        wrong = [
            f"{name}={value!r}: must be a token id, 0 to {V - 1}"
            for name, value in special.items()
            if not isinstance(value, int) or not 0 <= value < V
        ]
        if not wrong and len(set(special.values())) < len(special):
            wrong = [", ".join(f"{name}={value}" for name, value in special.items()) + ": must be different ids"]
        return wrong

    # Loss and training

    def forward(
        self,
        source: Rows,
        target: Rows,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Logits and loss for a given target (teacher forcing), in evaluation: no dropout, no label smoothing.

        source: a list of lists of ids, or a tensor (B, S) with source_lengths (B,), which padding follows (None: no
        padding). A source may be empty. target likewise, without beginning and end tokens.

        Returns {"logits": (B, T + 1, V), "loss": one number}: logits[:, t] predicts token t of the target; after the
        last token it predicts the end. The loss is the mean over all of these except padding. Raises InputError.
        """
        batch = self.batch(source, target, source_lengths, target_lengths)
        logits = self.network.predict(batch)
        loss, _ = ops.cross_entropy_forward(logits, batch.targets)
        return {"logits": logits, "loss": loss}

    __call__ = forward

    def train_step(
        self,
        source: Rows,
        target: Rows,
        learning_rate: float,
        max_grad_norm: float | None = 1.0,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> dict[str, float | str]:
        """One step of plain gradient descent on the mean loss over the targets' tokens and their end tokens.

        source, target as in `forward`. Returns {"loss", "grad_norm" (before clipping), "status"}: Python numbers, so
        this waits for the device. The status is "success", or "skipped" if the loss or the norm was not finite: then
        nothing is updated. Raises InputError, and changes nothing, for arguments that cannot be used.
        """
        self._check_rates(learning_rate, max_grad_norm)
        batch = self.batch(source, target, source_lengths, target_lengths)
        self.step += 1
        self.network.zero_gradients()
        counted = int((batch.targets != IGNORED).sum())
        loss = self.network.loss_and_gradients(batch, denominator=counted, step=self.step)
        return self._update(loss, learning_rate, max_grad_norm)

    def batch(
        self,
        source: Rows,
        target: Rows,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> PairBatch:
        """The checked batch on the network's device: targets with beginning and end tokens added."""
        sources, source_lengths = self._read_source(source, source_lengths)
        targets, target_lengths = padded("target", target, target_lengths, self.padding_token_id)
        if len(sources) != len(targets):
            raise InputError(f"There are {len(sources)} sources and {len(targets)} targets: expected the same number.")
        T = targets.shape[1]
        real = torch.arange(T) < target_lengths[:, None]
        check_ids("target", targets[real], self.config.vocab_size)
        for name, special in self._special().items():
            if bool((targets[real] == special).any()):
                raise InputError(
                    f"The target holds {special}, which is {name}: give targets without beginning, end and padding "
                    "tokens; the model adds them."
                )
        tokens = torch.full((len(targets), T + 1), self.padding_token_id)
        wanted = torch.full((len(targets), T + 1), IGNORED)
        tokens[:, 0] = self.bos_token_id
        tokens[:, 1:] = torch.where(real, targets, self.padding_token_id)
        wanted[:, :-1] = torch.where(real, targets, IGNORED)
        wanted.scatter_(1, target_lengths[:, None], self.eos_token_id)
        parts = sources, source_lengths, tokens, wanted, target_lengths + 1
        return PairBatch(*[part.to(self.network.device) for part in parts])  # type: ignore[arg-type]

    def _read_source(self, source: Rows, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        sources, lengths = padded("source", source, lengths, self.padding_token_id)
        V = self.config.source_vocab_size or self.config.vocab_size
        real = torch.arange(sources.shape[1]) < lengths[:, None]
        check_ids("source id", sources[real], V)
        return torch.where(real, sources, 0 if self.padding_token_id >= V else self.padding_token_id), lengths

    # Decoding

    def generate(
        self,
        source: Rows,
        source_lengths: Tensor | None = None,
        max_new_tokens: int | None = None,
        beams: int = 1,
        length_penalty: float = LENGTH_PENALTY,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """The target that the model generates for each source: (B, at most max_new_tokens) token ids. The end token is
        included; padding follows it.

        source as in `forward`. max_new_tokens None: max_seq_len, the most that a decoder can read. temperature 0 takes
        the likeliest token each time (greedy); otherwise the token is sampled from the top_k likeliest (None or 0: all)
        and, of these, from the smallest set whose probabilities reach top_p (None: all). The same seed samples the same
        tokens.

        beams > 1 is a beam search (models/decoding/generation.py), which samples nothing: it follows that many targets
        of each source at once, and returns the one with the highest
        score = log p(tokens) / ((5 + number of tokens) / 6)^length_penalty.
        Unless tokens are sampled, a row's result does not depend on the other rows. Raises InputError.
        """
        check_beams(beams, length_penalty)
        drawing = Drawing(temperature, top_k, top_p, seed)
        if beams > 1 and temperature > 0:
            raise InputError(
                f"beams={beams} with temperature={temperature}: beam search does not sample; leave one out."
            )
        longest = self.config.max_seq_len
        length = longest if max_new_tokens is None else max_new_tokens
        check_new_tokens("max_new_tokens", length)
        if length > longest:
            raise InputError(f"max_new_tokens={length}: the decoder reads max_seq_len={longest} tokens at most.")
        end = self.eos_token_id if eos_token_id is None else eos_token_id
        begin = self.bos_token_id if bos_token_id is None else bos_token_id
        check_ids("token id", torch.tensor([begin, end]), self.config.vocab_size)
        sources, lengths = (part.to(self.network.device) for part in self._read_source(source, source_lengths))
        decoder = IncrementalDecoder(self.network, len(sources), self.network.encode(sources, lengths), lengths)
        unread = torch.full((len(sources), 1), begin, device=self.network.device)
        if beams == 1:
            drawn = one_by_one(decoder, unread, length, drawing, end, self.padding_token_id)
            return torch.cat([unread[:, :0], *drawn], dim=1)
        best = beam_search(decoder, unread, length, beams, length_penalty, end)
        return pad_sequence(best, batch_first=True, padding_value=self.padding_token_id).to(self.network.device)

    # Description and checkpoints
    def get_model_info(self) -> dict[str, Any]:
        """The entries of `CustomTransformerWrapper.get_model_info`, and the ids of the three special tokens."""
        return super().get_model_info() | self._special()

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"special_tokens": self._special()}

    def restore(self, checkpoint: Any) -> None:
        special = checkpoint.state.get("special_tokens", self._special())
        if not isinstance(special, Mapping) or special.keys() != self._special().keys():
            raise CheckpointError(f"{checkpoint.path}: its special tokens are not {', '.join(self._special())}.")
        if wrong := self._wrong_special(special):
            raise CheckpointError(f"{checkpoint.path} is inconsistent: {'; '.join(wrong)}.")
        super().restore(checkpoint)
        vars(self).update(special)

    @classmethod
    def from_checkpoint(cls, path: str | Path, **changes: Any) -> Self:
        """The model of a checkpoint, or of the newest one in a directory. `changes` replace fields of its config that
        the parameters do not depend on, `device="cpu"` for example; another precision converts it, and a line of the
        log says so. Raises CheckpointError, and ConfigError for `changes` that no network can have."""
        return cls._of_checkpoint(path, changes)
