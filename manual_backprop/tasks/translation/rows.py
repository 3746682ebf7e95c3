"""Pairs of token ids as batches for an encoder-decoder, without those that are too long for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch

from ...common.batch import IGNORED, PairBatch, moved
from ...common.errors import BadRowError, InputError
from ...config.schema import CustomTransformerConfig
from ...data.tokens.pair_corpus import PairSplit
from ..pairs import SpecialIds

SPECIAL = 3  # ids after those of the target's tokenizer


class TargetIds(SpecialIds):
    """The last three ids of the target's vocabulary, as in the wrapper."""

    @classmethod
    def of(cls, vocab_size: int) -> Self:
        return cls(vocab_size - SPECIAL)

    def generated(self, tokens: Sequence[int]) -> list[int]:
        """The tokens before the first end token, without ids that have no text."""
        return [token for token in super().generated(tokens) if token < self.padding]


class PairRows:
    """The pairs of one split that are not too long for the network."""

    def __init__(self, split: PairSplit, config: CustomTransformerConfig, skip: bool, name: str):
        """`skip`: leave out pairs that are too long; otherwise they raise BadRowError. An empty split: InputError."""
        self.split, self.special = split, TargetIds.of(config.vocab_size)
        self.padding = self.special.padding if config.source_vocab_size is None else 0  # attention masks it
        most = {"source": config.source_length, "target": config.max_seq_len - 1}  # without its beginning token
        lengths = {side: np.diff(getattr(split, f"{side}_offsets")) for side in most}
        long = np.logical_or.reduce([lengths[side] > most[side] for side in most])
        if long.any() and not skip:
            raise self._too_long(int(long.argmax()), lengths, most, int(long.sum()))
        self.numbers = np.flatnonzero(~long)
        self.left_out = int(long.sum())
        if not len(self.numbers):
            raise InputError(
                f"All {len(split):,} pairs for {name} have a side that is longer than the network can read; give more "
                f"than model.max_seq_len={config.max_seq_len}."
                if len(split)
                else f"There is no pair for {name}."
            )
        self.source_lengths, self.target_lengths = (lengths[side][self.numbers] for side in most)

    def _too_long(self, row: int, lengths: dict[str, np.ndarray], most: dict[str, int], count: int) -> BadRowError:
        side = next(side for side in most if lengths[side][row] > most[side])
        needed = max(int(lengths["source"].max()), int(lengths["target"].max()) + 1)
        others = f" ({count:,} of {len(self.split):,} pairs are too long)" if count > 1 else ""
        return BadRowError(
            f"{self.split.where(row)}: the {side} has {lengths[side][row]} tokens, but the network reads at most "
            f"{most[side]}{others}",
            f"Use model.max_seq_len={needed}, make it shorter, or leave such pairs out with dataset.on_bad_row=skip, "
            "which counts them.",
        )

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row's target including beginning and end, which is one more than are predicted."""
        return self.target_lengths + 2

    @property
    def kinds(self) -> np.ndarray:
        return self.split.kinds[self.numbers]

    def sources(self, numbers: np.ndarray) -> list[list[int]]:
        return self._side("source", numbers)

    def targets(self, numbers: np.ndarray) -> list[list[int]]:
        return self._side("target", numbers)

    def _side(self, side: str, numbers: np.ndarray) -> list[list[int]]:
        tokens, offsets = getattr(self.split, side), getattr(self.split, f"{side}_offsets")
        return [tokens[offsets[row] : offsets[row + 1]].tolist() for row in self.numbers[numbers].tolist()]

    def batch(
        self, numbers: np.ndarray, lengths: np.ndarray, first_row: int = 0, device: torch.device | str = "cpu"
    ) -> PairBatch:
        """The batch of these rows for teacher forcing: each token of the target, and its end, is predicted from the
        true ones before it. `lengths` (B,): numbers of predicted tokens, the end included."""
        special, sources, targets = self.special, self.sources(numbers), self.targets(numbers)
        source = np.full((len(numbers), max(1, max(map(len, sources)))), self.padding, dtype=np.int64)
        tokens = np.full((len(numbers), int(lengths.max())), special.padding, dtype=np.int64)
        wanted = np.full_like(tokens, IGNORED)
        tokens[:, 0] = special.beginning
        for row, (ids, target) in enumerate(zip(sources, targets, strict=True)):
            source[row, : len(ids)] = ids
            tokens[row, 1 : len(target) + 1] = target
            wanted[row, : len(target)] = target
            wanted[row, len(target)] = special.end
        both = moved(torch.from_numpy(np.stack([tokens, wanted])), device)  # one transfer for both
        seen = moved(torch.tensor(list(map(len, sources))), device)
        return PairBatch(moved(torch.from_numpy(source), device), seen, both[0], both[1], first_row=first_row)
