"""Labelled texts as batches: rows of tokens, each cut at the network's length and padded to the longest beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ...common.batch import EncoderBatch, moved
from ...data.tokens.augmentation import augmented
from ...data.tokens.labelled_corpus import LabelledSplit, encoded
from ...data.tokens.order import Padded
from ...data.tokens.tokenizer import Tokenizer

MEASURED_ROWS = 128  # at a time
BUCKET = 4  # optimizer steps whose rows are sorted by length together


class TextRows:
    """The rows of one split. `longest` [tokens]: what a row is cut at, which keeps its beginning."""

    def __init__(self, split: LabelledSplit, longest: int):
        self.split, self.longest = split, longest

    def __len__(self) -> int:
        return len(self.split)

    @property
    def lengths(self) -> np.ndarray:
        """One more than the tokens that are read of each, as `Padded` counts."""
        return np.diff(self.split.offsets) + 1

    def batch(
        self, numbers: np.ndarray, lengths: Any = None, first_row: int = 0, device: torch.device | str = "cpu"
    ) -> EncoderBatch:
        return batch_of(
            [self.split.ids(int(number)) for number in numbers],
            self.split.labels[numbers],
            self.longest,
            first_row,
            device,
        )

    def batches(self, device: torch.device | str, count: int | None = None) -> Iterator[EncoderBatch]:
        """The first `count` rows in order (None: all)."""
        last = len(self) if count is None else min(count, len(self))
        for first in range(0, last, MEASURED_ROWS):
            yield self.batch(np.arange(first, min(first + MEASURED_ROWS, last)), device=device)


def batch_of(
    rows: Sequence[np.ndarray],
    labels: np.ndarray,
    longest: int,
    first_row: int = 0,
    device: torch.device | str = "cpu",
) -> EncoderBatch:
    """Of rows of tokens, and a label's number for each (-100: none)."""
    lengths = np.array([min(len(ids), longest) for ids in rows], dtype=np.int64)
    inputs = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
    for place, ids in enumerate(rows):
        inputs[place, : lengths[place]] = ids[: lengths[place]]
    inputs_, lengths_, targets = (
        moved(torch.from_numpy(array), device) for array in (inputs, lengths, np.array(labels, dtype=np.int64))
    )
    return EncoderBatch(inputs_, lengths_, targets, first_row)


class LabelledOrder(Padded):
    """An epoch meets every text once; a row is one target, whatever its length. With `kinds` of changes, a text is
    another one in each epoch (`augmentation`)."""

    documents: TextRows

    def __init__(
        self,
        rows: TextRows,
        tokenizer: Tokenizer,
        kinds: Sequence[str],
        seed: int,
        batch_size: int,
        accumulation_steps: int,
    ):
        super().__init__(rows, rows.longest, seed, batch_size, accumulation_steps, bucket=BUCKET)
        self.tokenizer, self.kinds = tokenizer, kinds

    def batches(self, step: int, device: torch.device | str = "cpu") -> tuple[int, Iterator[Any]]:
        epoch, place = divmod(step, self.steps_per_epoch)
        rows = self._plan(epoch)[0][place]
        rows = rows[rows >= 0]
        return len(rows), self._changed(epoch, rows, device) if self.kinds else self._batches(rows, device)

    def _changed(self, epoch: int, rows: np.ndarray, device: torch.device | str) -> Iterator[EncoderBatch]:
        split, longest = self.documents.split, self.documents.longest
        for first, mine in self._parts(rows):
            texts = [
                augmented(text_of(self.tokenizer, split.ids(int(row))), self.kinds, self.seed, epoch, int(row))
                for row in mine
            ]
            yield batch_of(encoded(self.tokenizer, texts), split.labels[mine], longest, first, device)


def text_of(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Without the tokens that open and end it."""
    inner = ids[len(tokenizer.begin_token_ids) :]
    if tokenizer.end_token_id is not None and len(inner) and inner[-1] == tokenizer.end_token_id:
        inner = inner[:-1]
    return tokenizer.decode(inner.tolist())
