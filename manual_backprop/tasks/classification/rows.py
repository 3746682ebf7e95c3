"""Labelled texts as batches: rows of tokens, cut at the network's length and padded to the longest in the batch."""

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

MEASURED_ROWS = 128  # in one batch
BUCKET = 4  # optimizer steps in a bucket, whose rows are sorted by length


class TextRows:
    """The rows of one split. A row is cut after `longest` tokens."""

    def __init__(self, split: LabelledSplit, longest: int):
        self.split, self.longest = split, longest

    def __len__(self) -> int:
        return len(self.split)

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each row plus 1, since `Padded` subtracts a first token that is not predicted."""
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
        """The batches of the first `count` rows in order (None: all)."""
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
    """The batch of rows of tokens, with a label index for each (-100: none)."""
    lengths = np.array([min(len(ids), longest) for ids in rows], dtype=np.int64)
    inputs = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
    for place, ids in enumerate(rows):
        inputs[place, : lengths[place]] = ids[: lengths[place]]
    inputs_, lengths_, targets = (
        moved(torch.from_numpy(array), device) for array in (inputs, lengths, np.array(labels, dtype=np.int64))
    )
    return EncoderBatch(inputs_, lengths_, targets, first_row)


class LabelledOrder(Padded):
    """Every text once in each epoch; each row has one target. With `kinds` of augmentation a text differs in each epoch
    (`augmentation`)."""

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
    """The text of token ids, without begin and end tokens."""
    inner = ids[len(tokenizer.begin_token_ids) :]
    if tokenizer.end_token_id is not None and len(inner) and inner[-1] == tokenizer.end_token_id:
        inner = inner[:-1]
    return tokenizer.decode(inner.tolist())
