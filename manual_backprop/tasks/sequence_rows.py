"""The examples of task=reversal, copy and sort: rows of symbols drawn from the seed, and their targets.

A counter-based generator draws the rows, so that the same seed gives the same rows everywhere. A hash of a row's
symbols decides its split, independent of the seed: no run, with any seed, trains on a row of the test split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..common.batch import IGNORED, AnyBatch, Batch, PairBatch, moved
from ..common.errors import InputError
from ..config.schema import TaskConfig
from ..config.task_rules import sequence_vocabulary
from .pairs import SpecialIds

SPLITS = ("training", "validation", "test")
HELD_OUT = 20  # of this many rows, on average one is in the test split and one in the validation split
CANDIDATES = 1 << 14  # rows drawn at once
MOST_DRAWN = 64  # after this many draws of CANDIDATES rows without one of the split, we assume that there is none


def _copied(source: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return source


def _reversed(source: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    places = np.maximum(lengths[:, None] - 1 - np.arange(source.shape[1]), 0)
    return np.take_along_axis(source, places, axis=1)


def _sorted(source: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    is_padding = np.arange(source.shape[1]) >= lengths[:, None]
    return np.sort(np.where(is_padding, np.iinfo(np.int64).max, source), axis=1)


# source (N, longest), lengths (N,) -> target
TRANSFORMS = {"copy": _copied, "reversal": _reversed, "sort": _sorted}


@dataclass(frozen=True)
class Vocabulary(SpecialIds):
    """Token ids: the symbols from 0 on, then the special tokens. Only a decoder has a separator, between source and
    target in one sequence."""

    network: str

    @property
    def separator(self) -> int:
        return self.padding + 3

    @property
    def size(self) -> int:
        return sequence_vocabulary(self.padding, self.network)

    def words(self, tokens: Sequence[int]) -> str:
        names = {self.padding: "<pad>", self.beginning: "<bos>", self.end: "<eos>", self.separator: "<sep>"}
        return " ".join(names.get(token, str(token)) for token in tokens)


class Rows:
    """The rows of one split. source, target (N, longest) int64, padded after `source_lengths` (N,)."""

    def __init__(self, source: np.ndarray, source_lengths: np.ndarray, name: str, vocabulary: Vocabulary):
        self.source, self.source_lengths, self.name, self.vocabulary = source, source_lengths, name, vocabulary
        self.target = TRANSFORMS[name](source, source_lengths)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> np.ndarray:
        """(N,): tokens of each row's target with beginning and end. All but the beginning are predicted."""
        return self.source_lengths + 2

    def sources(self, numbers: np.ndarray) -> list[list[int]]:
        return [self.source[row, : self.source_lengths[row]].tolist() for row in numbers]

    def targets(self, numbers: np.ndarray) -> list[list[int]]:
        return [self.target[row, : self.source_lengths[row]].tolist() for row in numbers]

    def origins(self) -> np.ndarray | None:
        """(N, longest): for each symbol of a target its position in the source; None if that depends on the values."""
        places = np.broadcast_to(np.arange(self.source.shape[1]), self.source.shape)
        return None if self.name == "sort" else TRANSFORMS[self.name](places, self.source_lengths)

    def batch(
        self, numbers: np.ndarray, lengths: np.ndarray, first_row: int = 0, device: torch.device | str = "cpu"
    ) -> AnyBatch:
        """The batch of these rows for teacher forcing: each token of the target, and its end, is predicted from the
        true ones before it. `lengths` (B,): numbers of predicted tokens, the end included."""
        special, width = self.vocabulary, np.arange(int(lengths.max()))
        source, target, counts = self.source[numbers], self.target[numbers], self.source_lengths[numbers][:, None]
        source = source[:, : len(width) - 1]
        padded = np.pad(target[:, : len(width) - 1], ((0, 0), (0, 1)))
        targets = np.where(width < counts, padded, np.where(width == counts, special.end, IGNORED))  # (B, T)
        tokens = np.full_like(targets, special.beginning)
        tokens[:, 1:] = np.where(width[1:] <= counts, padded[:, :-1], special.padding)
        is_padding = width[:-1] >= counts
        if special.network == "decoder":
            return self._joined(source, is_padding, tokens, targets, first_row, device)
        both = moved(torch.from_numpy(np.stack([tokens, targets])), device)  # one transfer for both
        padded_source = moved(torch.from_numpy(np.where(is_padding, special.padding, source)), device)
        source_lengths = moved(torch.from_numpy(counts[:, 0].copy()), device)
        return PairBatch(padded_source, source_lengths, both[0], both[1], first_row=first_row)

    def _joined(
        self,
        source: np.ndarray,
        is_padding: np.ndarray,
        tokens: np.ndarray,
        targets: np.ndarray,
        first_row: int,
        device: torch.device | str,
    ) -> Batch:
        """Source, separator and target in one sequence, without gaps; only the target and its end are predicted."""
        special = self.vocabulary
        tokens[:, 0] = special.separator
        joined = np.concatenate([np.where(is_padding, -1, source), tokens], axis=1)
        expected = np.concatenate([np.full_like(source, IGNORED), targets], axis=1)
        order = np.argsort(joined == -1, axis=1, kind="stable")  # gaps move to the end
        joined, expected = np.take_along_axis(joined, order, 1), np.take_along_axis(expected, order, 1)
        both = moved(torch.from_numpy(np.stack([np.where(joined == -1, special.padding, joined), expected])), device)
        return Batch(both[0], both[1], first_row=first_row)


def draw_rows(config: TaskConfig, split: str, seed: int, network: str) -> Rows:
    """The rows of a split. Raises InputError if no row's hash puts it into this split."""
    assert config.min_length is not None
    assert config.max_length is not None
    assert config.symbols is not None
    least, most, symbols = config.min_length, config.max_length, config.symbols
    wanted = getattr(config, f"{split}_rows")
    generator = np.random.Philox(key=np.array([seed % 2**64, SPLITS.index(split)], dtype=np.uint64))
    found: list[np.ndarray] = []
    drawn = missed = 0
    while drawn < wanted:
        draws = generator.random_raw(CANDIDATES * (most + 1)).reshape(CANDIDATES, most + 1)
        lengths = least + (draws[:, :1] % np.uint64(most - least + 1)).astype(np.int64)
        source = np.where(np.arange(most) < lengths, (draws[:, 1:] % np.uint64(symbols)).astype(np.int64), 0)
        rows = np.concatenate([lengths, source], axis=1)[split_of(source, lengths[:, 0]) == SPLITS.index(split)]
        found.append(rows)
        drawn, missed = drawn + len(rows), 0 if len(rows) else missed + 1
        if missed == MOST_DRAWN:
            raise InputError(
                f"task={config.name}: none of the rows of {least} to {most} of {symbols} symbols is in the {split} "
                "split; use longer rows, or more task.symbols"
            )
    rows = np.concatenate(found)[:wanted]
    return Rows(np.ascontiguousarray(rows[:, 1:]), rows[:, 0].copy(), config.name, Vocabulary(symbols, network))


def split_of(source: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The index in SPLITS of each row's split, a function of the row's symbols alone. source (N, longest)."""
    state = lengths.astype(np.uint64)
    for place in range(source.shape[1]):
        mixed = _mixed(state ^ (source[:, place].astype(np.uint64) + np.uint64(1)))
        state = np.where(place < lengths, mixed, state)
    part = _mixed(state) % np.uint64(HELD_OUT)
    return np.where(part == 0, SPLITS.index("test"), np.where(part == 1, SPLITS.index("validation"), 0))


def _mixed(state: np.ndarray) -> np.ndarray:
    """The hash SplitMix64 (Steele et al. 2014) of 64-bit numbers."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
