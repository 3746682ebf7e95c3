"""What a network learns from in one pass, and the target that does not count: for those who make batches and those
who read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # a target that does not count: padding, or text that is only read


@dataclass(frozen=True)
class Batch:
    """What a step learns from.

    tokens, targets (B, T) int64: targets are already shifted, and IGNORED does not count. segments (B, T): positions
    see only their own segment (documents, padding); None is one segment. first_row is the place of this batch's first
    row in the whole optimizer step, where a step takes several batches: dropout depends on it.
    """

    tokens: Tensor
    targets: Tensor
    segments: Tensor | None = None
    first_row: int = 0


@dataclass(frozen=True)
class PairBatch:
    """What an encoder-decoder learns from: rows of a source, and of what becomes of it.

    source (B, S) int64, of which the first source_lengths (B,) count; a length may be 0. tokens, targets (B, T) int64:
    tokens begin with the beginning id, targets are the same shifted, and IGNORED does not count. target_lengths (B,),
    or None where padding stands on the right, which causal attention lets nothing that counts see. first_row as in
    Batch.
    """

    source: Tensor
    source_lengths: Tensor
    tokens: Tensor
    targets: Tensor
    target_lengths: Tensor | None = None
    first_row: int = 0


@dataclass(frozen=True)
class EncoderBatch:
    """What an encoder learns from: sequences, and one answer for each.

    inputs (B, T) int64 of tokens, or (B, T, C) of numbers, of which the first lengths (B,) positions count. targets
    (B,) int64 of classes, IGNORED where they do not count; or (B, O) of numbers, NaN where one does not. first_row as
    in Batch.
    """

    inputs: Tensor
    lengths: Tensor
    targets: Tensor
    first_row: int = 0


AnyBatch = Batch | PairBatch | EncoderBatch


def as_batch(tokens: Tensor | AnyBatch, segments: Tensor | None) -> AnyBatch:
    """Of tokens a batch whose targets nobody asks for."""
    return Batch(tokens, tokens, segments) if isinstance(tokens, Tensor) else tokens


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """x, of the CPU, on a device. A GPU reads it by itself from memory that stays where it is: nothing waits for it."""
    if not torch.cuda.is_available() or torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
