"""Batches of token ids: windows of T tokens over all documents, or rows of one document each.

The order of windows is a function of (seed, epoch), without state between calls. `order` groups them into optimizer
steps.
"""

import functools
from collections.abc import Iterator

import numpy as np
import torch

from ...common.batch import IGNORED, Batch, moved
from ...common.errors import InputError
from .token_shards import Tokens, TokenShards


class Windows:
    """An endless sequence of windows over n `tokens`: in each epoch every window of T tokens once, in a new order.

    The borders between windows shift from epoch to epoch, so that a token gets different contexts; the few tokens
    before the first and after the last window of an epoch are in windows of other epochs. A window may hold the end of
    one document and the beginning of the next; with `mask_documents`, neither attends to the other.

    `offsets` are the beginnings of documents, and the end of the last. With `max_length`, a longer document is cut to
    that many tokens, followed by its end token.
    """

    def __init__(
        self,
        tokens: Tokens,
        sequence_length: int,
        seed: int,
        offsets: np.ndarray | None = None,
        max_length: int | None = None,
        mask_documents: bool = False,
    ):
        self.tokens = _as_plain_array(tokens)
        self.offsets = offsets if mask_documents else None
        self.notes: tuple[str, ...] = ()
        self._cuts: tuple[np.ndarray, np.ndarray] | None = None
        length = len(tokens)
        if max_length is not None:
            assert offsets is not None
            lengths = np.diff(offsets)
            cut = int((lengths > max_length + 1).sum())
            if cut:
                self.notes = (
                    f"{cut} of {len(lengths)} documents have more than {max_length} tokens and are cut there",
                )
                kept = np.concatenate([[0], np.cumsum(np.minimum(lengths, max_length + 1))])
                self._cuts = kept, np.asarray(offsets)
                self.offsets = kept if mask_documents else None
                length = int(kept[-1])
        _check_length(length, sequence_length, "training")
        self.sequence_length = sequence_length  # T
        self.seed = seed
        # One window fewer than possible if there are several, so that the first can begin at any of T positions.
        self.windows_per_epoch = max(length // sequence_length - 1, 1)
        self._spare = length - 1 - self.windows_per_epoch * sequence_length  # the last target has no window

    def batch(self, first: int, count: int, first_row: int = 0, device: torch.device | str = "cpu") -> Batch:
        """Windows number `first` to `first + count - 1` of the endless sequence, as a batch (count, T)."""
        if first < 0 or count < 1:
            raise InputError(
                f"A batch of {count} windows from number {first}: give at least 1 window, and a number of at least 0."
            )
        places = self._starts(first, count)[:, None] + np.arange(self.sequence_length + 1)  # (B, T + 1)
        segments = None if self.offsets is None else _segments(self.offsets, places[:, :-1], device)
        chunk = self.tokens[places if self._cuts is None else self._uncut(places)]
        both = moved(torch.from_numpy(chunk.astype(np.int64)), device)  # inputs and targets in one transfer
        return Batch(both[:, :-1].contiguous(), both[:, 1:].contiguous(), segments, first_row=first_row)

    def _uncut(self, places: np.ndarray) -> np.ndarray:
        """The indices in `tokens` of positions in the text with cut documents."""
        assert self._cuts is not None
        kept, offsets = self._cuts
        documents = np.searchsorted(kept, places, side="right") - 1
        found = offsets[documents] + places - kept[documents]
        return np.where(places == kept[documents + 1] - 1, offsets[documents + 1] - 1, found)

    def _starts(self, first: int, count: int) -> np.ndarray:
        """The first position of each window."""
        numbers = np.arange(first, first + count)
        epochs, places = np.divmod(numbers, self.windows_per_epoch)
        starts = np.empty(count, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            shift, order = epoch_order(self.seed, epoch, self.windows_per_epoch)
            here = epochs == epoch
            starts[here] = shift % (self._spare + 1) + order[places[here]] * self.sequence_length
        return starts


def validation_batches(
    tokens: Tokens,
    sequence_length: int,
    batch_size: int,
    limit: int | None = None,
    device: torch.device | str = "cpu",
    offsets: np.ndarray | None = None,
) -> Iterator[Batch]:
    """The first `limit` batches (None: all) of windows of T tokens without overlap over the whole split, in order.

    Every token but the very first is a target once: the last window is padded with IGNORED targets. With `offsets`, the
    beginnings of documents, no document attends to another.
    """
    _check_length(len(tokens), sequence_length, "test or validation")
    tokens = _as_plain_array(tokens)
    windows = -(-(len(tokens) - 1) // sequence_length)
    last = windows if limit is None else min(windows, limit * batch_size)

    def batches() -> Iterator[Batch]:
        for first in range(0, last, batch_size):
            starts = np.arange(first, min(first + batch_size, last)) * sequence_length
            places = starts[:, None] + np.arange(sequence_length + 1)  # (B, T + 1)
            chunk = tokens[np.minimum(places, len(tokens) - 1)].astype(np.int64)
            inputs, targets = chunk[:, :-1].copy(), chunk[:, 1:].copy()
            past = places[:, 1:] >= len(tokens)  # positions with nothing to predict
            inputs[past] = 0
            targets[past] = IGNORED
            segments = None if offsets is None else _segments(offsets, places[:, :-1], device)
            yield Batch(moved(torch.from_numpy(inputs), device), moved(torch.from_numpy(targets), device), segments)

    return batches()


class Documents:
    """Documents as rows of a batch: `offsets` (documents + 1,) are their beginnings in `tokens`."""

    def __init__(self, tokens: Tokens, offsets: np.ndarray):
        self.tokens, self.offsets = _as_plain_array(tokens), np.asarray(offsets)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def batch(
        self,
        numbers: np.ndarray,
        lengths: np.ndarray,
        first: np.ndarray | int = 0,
        first_row: int = 0,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """A batch with `lengths` inputs of each document, starting with its token number `first`, and their targets.

        Rows are padded on the right with IGNORED targets. The network needs no padding token and no lengths: causal
        attention hides the padding from all real positions.
        """
        width = np.arange(int(lengths.max()) + 1)
        places = (self.offsets[numbers] + first)[:, None] + np.minimum(width, lengths[:, None])
        chunk = self.tokens[places].astype(np.int64)  # (B, longest + 1)
        past = width[:-1] >= lengths[:, None]
        inputs, targets = np.where(past, 0, chunk[:, :-1]), np.where(past, IGNORED, chunk[:, 1:])
        both = moved(torch.from_numpy(np.stack([inputs, targets])), device)
        return Batch(both[0], both[1], first_row=first_row)


def rows_of_documents(
    documents: Documents,
    sequence_length: int,
    batch_size: int,
    limit: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """The first `limit` batches (None: all) of every document once and in order, a long one in several rows.

    Every token but the first of each document is a target once.
    """
    targets = documents.lengths - 1
    rows = -(-targets // sequence_length)  # of each document
    if not rows.sum():
        raise InputError("The test or validation split has no document with two tokens: give more text.")
    ends = np.cumsum(rows)
    last = int(ends[-1]) if limit is None else min(int(ends[-1]), limit * batch_size)

    def batches() -> Iterator[Batch]:
        for begin in range(0, last, batch_size):
            row = np.arange(begin, min(begin + batch_size, last))
            numbers = np.searchsorted(ends, row, side="right")
            first = (row - (ends[numbers] - rows[numbers])) * sequence_length
            lengths = np.minimum(targets[numbers] - first, sequence_length)
            yield documents.batch(numbers, lengths, first, device=device)

    return batches()


@functools.lru_cache(maxsize=4)  # batches at the border between two epochs need both
def epoch_order(seed: int, epoch: int, count: int) -> tuple[int, np.ndarray]:
    """A random number and a permutation of `count` elements for (seed, epoch).

    It sorts the raw output of a counter-based generator (Philox; Salmon et al. 2011), which numpy promises not to
    change, unlike `Generator.permutation`.
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    draws = np.random.Philox(key=key).random_raw(1 + count)
    order = np.argsort(draws[1:], kind="stable")
    order.flags.writeable = False  # the cache shares it between callers
    return int(draws[0]), order


def _as_plain_array(tokens: Tokens) -> Tokens:
    """A plain array view of a memory map, which is cheaper to index."""
    return tokens if isinstance(tokens, TokenShards) else np.asarray(tokens)


def _segments(offsets: np.ndarray, places: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """The index of the document at each position, from 0 in each row."""
    documents = np.searchsorted(offsets, places, side="right")
    return moved(torch.from_numpy(documents - documents[:, :1]), device)


def _check_length(length: int, sequence_length: int, split: str) -> None:
    if sequence_length < 1:
        raise InputError(f"Windows of {sequence_length} tokens: they must have at least 1.")
    if length < sequence_length + 1:
        share = ", or hold out more of it (dataset.validation=SHARE)" if "validation" in split else ""
        raise InputError(
            f"The {split} split has {length} tokens, but one window needs {sequence_length + 1} "
            f"(model.max_seq_len={sequence_length} and the token after it). Use a shorter model.max_seq_len, "
            f"or more text{share}."
        )
