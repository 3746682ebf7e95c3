"""Sequences of different lengths as one padded tensor, from lists or from tensors."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...common.errors import InputError

Rows = Tensor | Sequence[Any]


def padded(what: str, rows: Rows, lengths: Tensor | None, padding: int) -> tuple[Tensor, Tensor]:
    """Rows of ids as one tensor (B, T) on the CPU with their lengths (B,), T at least 1. Raises InputError."""
    if isinstance(rows, Tensor):
        if rows.dim() != 2 or len(rows) == 0 or rows.dtype not in (torch.int64, torch.int32):
            raise InputError(
                f"{what} has shape {tuple(rows.shape)} and is {rows.dtype}; expected whole numbers, (batch, sequence)."
            )
        lengths = checked_lengths(what, lengths, len(rows), rows.shape[1])
        return _at_least_one_place(rows.cpu().long(), padding), lengths
    if lengths is not None:
        raise InputError(f"{what}_lengths: given together with a list of lists, which has its own: leave them out.")
    try:
        given = [torch.tensor([index(one) for one in row], dtype=torch.int64) for row in rows]
    except (TypeError, RuntimeError) as error:  # not a whole number, or one of more than 63 bits
        raise InputError(f"{what} is {rows!r:.80}; expected a list of lists of token ids, or a tensor.") from error
    if not given:
        raise InputError(f"{what} is empty; expected a list of at least one list of token ids.")
    table = pad_sequence(given, batch_first=True, padding_value=padding)
    return _at_least_one_place(table, padding), torch.tensor(list(map(len, given)))


def _at_least_one_place(rows: Tensor, padding: int) -> Tensor:
    return rows if rows.shape[1] else rows.new_full((len(rows), 1), padding)


def padded_numbers(what: str, rows: Rows, lengths: Tensor | None, C: int) -> tuple[Tensor, Tensor]:
    """Tables of numbers (T, C) as one tensor (B, T, C) with their lengths (B,). Raises InputError."""
    if not isinstance(rows, Tensor):
        if lengths is not None:
            raise InputError(
                f"{what}: lengths given together with a list, whose tables have their own: leave them out."
            )
        try:
            tables = [torch.as_tensor(table) for table in rows]
            lengths = torch.tensor(list(map(len, tables)))
            rows = pad_sequence(tables, batch_first=True)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{what} is {rows!r:.80}; expected a list of tables (length, {C}), or a tensor."
            ) from error
    if rows.dim() != 3 or rows.shape[2] != C or not rows.numel():
        raise InputError(f"{what} has shape {tuple(rows.shape)}; expected (batch, length, {C}).")
    return rows.cpu(), checked_lengths(what, lengths, len(rows), rows.shape[1])


def checked_lengths(what: str, lengths: Tensor | None, B: int, T: int) -> Tensor:
    """lengths (B,), checked to be 0 to T; None: all are T. Raises InputError."""
    if lengths is None:
        return torch.full((B,), T)
    lengths = torch.as_tensor(lengths).cpu()
    wrong = lengths.shape != (B,) or lengths.is_floating_point()
    if wrong or bool(((lengths < 0) | (lengths > T)).any()):
        raise InputError(f"the lengths of {what} are {lengths.tolist()}; expected {B} whole numbers, 0 to {T}.")
    return lengths.long()
