"""In which order a network sees a corpus: windows of T tokens, for training without an end, for validation once.

An order is a function of (seed, epoch) and nothing is kept between calls, so that a run that resumes at window number g
sees what it would have seen. Documents are not told apart here: a window may hold the end of one and the start of the
next.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch

from ..errors import InputError
from ..models.network import Batch
from ..ops import IGNORED


class Windows:
    """The endless training order over n `tokens`: in each epoch, every window of T tokens once, in a new order.

    The borders between windows move from epoch to epoch, so that a token is not always met with the same context; the
    few tokens before the first and after the last window of an epoch are met in others.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, seed: int):
        _check_length(tokens, sequence_length, "training")
        self.tokens = np.asarray(tokens)  # of a memory map, a plain view: indexing it is cheaper
        self.sequence_length = sequence_length  # T
        self.seed = seed
        # One window fewer than could be had, where there are several, so that the first can begin at any of T places.
        self.windows_per_epoch = max(len(tokens) // sequence_length - 1, 1)
        self._spare = len(tokens) - 1 - self.windows_per_epoch * sequence_length  # the last target has no window

    def batch(self, first: int, count: int, first_row: int = 0, device: torch.device | str = "cpu") -> Batch:
        """The windows number `first` to `first + count - 1` of the endless sequence, as a batch (count, T)."""
        if first < 0 or count < 1:
            raise InputError(
                f"A batch of {count} windows from number {first}: both must not be negative, nor the count 0."
            )
        chunk = self.tokens[self._starts(first, count)[:, None] + np.arange(self.sequence_length + 1)]  # (B, T + 1)
        return _to_batch(chunk.astype(np.int64), first_row, device)

    def _starts(self, first: int, count: int) -> np.ndarray:
        """Where in `tokens` each of the windows begins."""
        numbers = np.arange(first, first + count)
        epochs, places = np.divmod(numbers, self.windows_per_epoch)
        starts = np.empty(count, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            shift, order = _epoch_order(self.seed, epoch, self.windows_per_epoch)
            here = epochs == epoch
            starts[here] = shift % (self._spare + 1) + order[places[here]] * self.sequence_length
        return starts


def validation_batches(
    tokens: np.ndarray,
    sequence_length: int,
    batch_size: int,
    limit: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Windows of T without overlap over the whole split, in order; with `limit`, only so many batches.

    Every token but the very first is a target once: the last window is filled up with targets that are not counted.
    """
    _check_length(tokens, sequence_length, "validation")
    return _validation_batches(np.asarray(tokens), sequence_length, batch_size, limit, device)


def _validation_batches(
    tokens: np.ndarray, sequence_length: int, batch_size: int, limit: int | None, device: torch.device | str
) -> Iterator[Batch]:
    windows = -(-(len(tokens) - 1) // sequence_length)
    last = windows if limit is None else min(windows, limit * batch_size)
    for first in range(0, last, batch_size):
        starts = np.arange(first, min(first + batch_size, last)) * sequence_length
        places = starts[:, None] + np.arange(sequence_length + 1)  # (B, T + 1)
        chunk = tokens[np.minimum(places, len(tokens) - 1)].astype(np.int64)
        inputs, targets = chunk[:, :-1].copy(), chunk[:, 1:].copy()
        past = places[:, 1:] >= len(tokens)  # positions with nothing to predict
        inputs[past] = 0
        targets[past] = IGNORED
        yield Batch(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device))


@functools.lru_cache(maxsize=4)  # batches at the border of two epochs need both
def _epoch_order(seed: int, epoch: int, count: int) -> tuple[int, np.ndarray]:
    """A random number and a permutation of `count` elements for (seed, epoch).

    Sorted raw output of a counter-based generator (Philox; Salmon et al. 2011): unlike `Generator.permutation`, numpy
    promises that it stays the same.
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    draws = np.random.Philox(key=key).random_raw(1 + count)
    order = np.argsort(draws[1:], kind="stable")
    order.flags.writeable = False  # shared by all who ask
    return int(draws[0]), order


def _to_batch(chunk: np.ndarray, first_row: int, device: torch.device | str) -> Batch:
    """(B, T + 1) tokens as inputs and the tokens that follow them; one transfer for both."""
    moved = torch.from_numpy(chunk).to(device)
    return Batch(moved[:, :-1].contiguous(), moved[:, 1:].contiguous(), first_row=first_row)


def _check_length(tokens: np.ndarray, sequence_length: int, split: str) -> None:
    if sequence_length < 1:
        raise InputError(f"Windows of {sequence_length} tokens: they must have at least 1.")
    if len(tokens) < sequence_length + 1:
        raise InputError(
            f"The {split} split has {len(tokens)} tokens, and one window needs {sequence_length + 1} "
            f"(model.max_seq_len={sequence_length} and the token after it). Use a shorter model.max_seq_len, "
            "or more text."
        )
