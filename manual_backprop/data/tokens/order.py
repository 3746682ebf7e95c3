"""The order of training: the batches of optimizer step n are a function of (seed, n) alone.

There is no state between calls, so a run that resumes after n steps continues with the data that it has not seen.
`Packed` cuts windows out of all documents together, `Padded` gives each document a row of its own. If several processes
share a training (`common.processes`), each gets its part of a step's rows; a step has the same rows for any number of
processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch

from ...common.batch import Batch
from ...common.errors import InputError
from ...common.processes import processes
from ...config.schema import BatchingConfig, DatasetConfig
from .batches import Documents, Windows, epoch_order, rows_of_documents, validation_batches
from .corpus import Corpus
from .token_shards import Tokens

BUCKET = 64  # optimizer steps in a bucket, whose rows are sorted by length


def share_of(rows: int) -> range:
    """The indices of this process's rows of a step; the last process may have fewer than others, or none."""
    group = processes()
    share = -(-rows // group.size)
    return range(min(group.rank * share, rows), min((group.rank + 1) * share, rows))


class Order(ABC):
    """The batches of each optimizer step. A step has `rows` sequences, in all processes together.

    Below, counted targets are those that the loss does not ignore.
    """

    rows: int

    tokens_per_step: int  # counted targets in a step of all processes; the mean if steps differ
    notes: tuple[str, ...] = ()

    @abstractmethod
    def steps(self, epochs: float) -> float:
        """The number of optimizer steps in this many epochs."""

    @abstractmethod
    def tokens_before(self, step: int) -> int:
        """The number of counted targets in the first `step` steps."""

    @abstractmethod
    def batches(self, step: int, device: torch.device | str = "cpu") -> tuple[int, Iterator[Batch]]:
        """The number of counted targets in step number `step`, from 0, and this process's batches of it."""


class Packed(Order):
    """Windows of T tokens over all documents; see Windows."""

    def __init__(self, windows: Windows, batch_size: int, accumulation_steps: int):
        self.windows, self.batch_size, self.rows = windows, batch_size, batch_size * accumulation_steps
        self.tokens_per_step, self.notes = self.rows * windows.sequence_length, windows.notes

    def steps(self, epochs: float) -> float:
        return epochs * self.windows.windows_per_epoch / self.rows

    def tokens_before(self, step: int) -> int:
        return step * self.tokens_per_step

    def batches(self, step: int, device: torch.device | str = "cpu") -> tuple[int, Iterator[Batch]]:
        return self.tokens_per_step, self._batches(step, device)

    def _batches(self, step: int, device: torch.device | str) -> Iterator[Batch]:
        part = share_of(self.rows)
        for row in part[:: self.batch_size]:
            count = min(self.batch_size, part.stop - row)
            yield self.windows.batch(step * self.rows + row, count, first_row=row, device=device)


class RowsOfLengths(Protocol):
    """Documents, or other rows that are padded to the longest one of a batch."""

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens in each row, of which the first is not predicted."""

    def batch(self, numbers: np.ndarray, lengths: np.ndarray, *, first_row: int, device: torch.device | str) -> Any:
        """The batch of the rows with these `numbers`; `lengths` are their numbers of predicted tokens."""


class Padded(Order):
    """One document in each row, cut after `max_length` tokens; a batch is as wide as its longest row.

    Each epoch has every document once. Documents are shuffled, sorted by length within buckets of some steps, so that
    those of a step have similar lengths, and then the steps are shuffled. One step of an epoch has the rest, with fewer
    rows. The token after a cut is still a target: the model does not learn that a cut document ends.
    """

    def __init__(
        self,
        documents: RowsOfLengths,
        max_length: int,
        seed: int,
        batch_size: int,
        accumulation_steps: int,
        bucket: int = BUCKET,
    ):
        self.documents, self.seed, self.batch_size, self.bucket = documents, seed, batch_size, bucket
        self.rows = batch_size * accumulation_steps
        lengths = documents.lengths - 1  # a document's first token is not a target
        self.numbers = np.flatnonzero(lengths > 0)
        self.lengths = np.minimum(lengths, max_length)  # targets of each row
        if not len(self.numbers):
            raise InputError("No document has two tokens, one to predict the next from: give more text.")
        self.steps_per_epoch = -(-len(self.numbers) // self.rows)
        self.tokens_per_epoch = int(self.lengths[self.numbers].sum())
        self.tokens_per_step = round(self.tokens_per_epoch / self.steps_per_epoch)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        cut, alone = int((lengths > max_length).sum()), len(lengths) - len(self.numbers)
        self.notes = tuple(
            note
            for count, note in (
                (cut, f"{cut} of {len(lengths)} documents have more than {max_length} tokens and are cut there"),
                (alone, f"{alone} of {len(lengths)} documents have a single token, so they have no target"),
            )
            if count
        )

    def steps(self, epochs: float) -> float:
        return epochs * self.steps_per_epoch

    def tokens_before(self, step: int) -> int:
        epoch, place = divmod(step, self.steps_per_epoch)
        _, before = self._plan(epoch)
        return epoch * self.tokens_per_epoch + int(before[place])

    def batches(self, step: int, device: torch.device | str = "cpu") -> tuple[int, Iterator[Batch]]:
        epoch, place = divmod(step, self.steps_per_epoch)
        order, _ = self._plan(epoch)
        rows = order[place]
        rows = rows[rows >= 0]
        return int(self.lengths[rows].sum()), self._batches(rows, device)

    def _batches(self, rows: np.ndarray, device: torch.device | str) -> Iterator[Batch]:
        for first, mine in self._parts(rows):
            yield self.documents.batch(mine, self.lengths[mine], first_row=first, device=device)

    def _parts(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """This process's rows of a step, in batches, each with the index of its first row in the step."""
        part = share_of(len(rows))
        for first in part[:: self.batch_size]:
            yield first, rows[first : min(first + self.batch_size, part.stop)]

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of each step of an epoch, (steps, rows), -1 for none; and the targets before each step."""
        if self._epoch is None or self._epoch[0] != epoch:
            draw, order = epoch_order(self.seed, epoch, len(self.numbers))
            shuffled = self.numbers[order]
            bucket = np.arange(len(shuffled)) // (self.bucket * self.rows)
            by_length = shuffled[np.lexsort((self.lengths[shuffled], bucket))]
            places = np.full(self.steps_per_epoch * self.rows, -1, dtype=np.int64)
            places[: len(by_length)] = by_length
            _, again = epoch_order(draw, epoch, self.steps_per_epoch)
            steps = places.reshape(self.steps_per_epoch, self.rows)[again]
            counts = np.where(steps >= 0, self.lengths[steps], 0).sum(axis=1)
            self._epoch = epoch, steps, np.concatenate([[0], np.cumsum(counts)])
        return self._epoch[1:]


class Repeated(Order):
    """The first `count` steps of another order, repeated: a model that works can memorize them."""

    def __init__(self, order: Order, count: int):
        self.order, self.count = order, count
        self.tokens_per_step, self.notes = order.tokens_per_step, order.notes

    def steps(self, epochs: float) -> float:
        return self.order.steps(epochs)

    def tokens_before(self, step: int) -> int:
        rounds, rest = divmod(step, self.count)
        return rounds * self.order.tokens_before(self.count) + self.order.tokens_before(rest)

    def batches(self, step: int, device: torch.device | str = "cpu") -> tuple[int, Iterator[Batch]]:
        return self.order.batches(step % self.count, device)


def open_order(
    corpus: Corpus,
    batching: BatchingConfig,
    dataset: DatasetConfig,
    *,
    sequence_length: int,
    batch_size: int,
    accumulation_steps: int,
    seed: int,
    repeat: int | None = None,
) -> Order:
    """The order for a config: an optimizer step is `accumulation_steps` batches of `batch_size` rows.

    `repeat`: use only the first `repeat` steps, repeatedly. Raises InputError for a text that is too short.
    """
    if batching.name == "padded":
        longest = min(dataset.max_length or sequence_length, sequence_length)
        documents = Documents(corpus.train, corpus.train_offsets)
        order: Order = Padded(documents, longest, seed, batch_size, accumulation_steps)
    else:
        mask = bool(batching.mask_documents)
        windows = Windows(corpus.train, sequence_length, seed, corpus.train_offsets, dataset.max_length, mask)
        order = Packed(windows, batch_size, accumulation_steps)
    return order if repeat is None else Repeated(order, repeat)


def evaluation_targets(offsets: np.ndarray, batching: BatchingConfig) -> int:
    """The number of counted targets in all `evaluation_batches`. `offsets` (documents + 1,): where documents begin."""
    if batching.name == "padded":
        return int((np.diff(offsets) - 1).clip(min=0).sum())
    return int(offsets[-1]) - 1


def evaluation_batches(
    tokens: Tokens,
    offsets: np.ndarray,
    batching: BatchingConfig,
    sequence_length: int,
    batch_size: int,
    limit: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """The batches of a split, packed or padded as in training, once and in order: the first `limit`, or all (None).

    Nothing is cut: a long document continues in further rows. Raises InputError for a split that is too short.
    """
    if batching.name == "padded":
        return rows_of_documents(Documents(tokens, offsets), sequence_length, batch_size, limit, device)
    documents = offsets if batching.mask_documents else None
    return validation_batches(tokens, sequence_length, batch_size, limit, device, documents)
