"""Splits rows into pieces: a wide tensor exists only for a piece of the batch, and stays in the cache until it is
read."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..ops.numerics import Record
from .sizes import sizes_of


def pieces(n_rows: int, size: int, of: Tensor | None = None) -> Iterator[slice]:
    """0 to n_rows in the fewest slices of at most `size`. Their lengths differ by at most one.

    `of` is the tensor that is split; all pieces use the same memory. If it is a fake tensor, with which a step's memory
    is estimated, the last piece alone stands for all of them: none is longer.
    """
    count = -(-n_rows // size)
    for number in range(max(count - 1, 0) if type(of) is FakeTensor else 0, count):
        yield slice(n_rows * number // count, n_rows * (number + 1) // count)


def pieces_of(x: Tensor) -> Iterator[slice]:
    """The rows of x, about `Sizes.piece` numbers at a time."""
    return pieces(len(x), max(1, sizes_of(x).piece // x.shape[1]), x)


class RecordedPieces:
    """Concatenates pieces of rows for a recorder that wants the whole tensor."""

    def __init__(self, record: Record, shape: torch.Size):
        self.record, self.shape = record, shape
        self.wholes: dict[str, Tensor] = {}  # (N, width) each
        self.filled: dict[str, int] = {}  # rows

    def put(self, name: str, piece: Tensor) -> None:
        """Adds the next rows, (R, width), or all rows at once."""
        if self.record.wants(name):
            if name not in self.wholes:
                self.wholes[name], self.filled[name] = piece.new_empty(self.shape.numel(), piece.shape[1]), 0
            first = self.filled[name]
            self.filled[name] += len(piece)
            self.wholes[name][first : self.filled[name]] = piece

    def finish(self) -> None:
        """Records each as (*shape, width)."""
        for name, whole in self.wholes.items():
            self.record(name, whole.unflatten(0, self.shape))
