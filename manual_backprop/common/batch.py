"""Batches: the input of one training pass, for each kind of network, and the target value that the loss ignores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # a target that the loss ignores: padding, or text that is only input


@dataclass(frozen=True)
class Batch:
    """A batch of a decoder.

    tokens, targets (B, T) int64: targets are already shifted; the loss skips those that are IGNORED. segments (B, T):
    a position attends only to its own segment (a document, or padding); None means one segment. first_row is the index
    of this batch's first row in the whole optimizer step, which may take several batches: dropout depends on it.
    """

    tokens: Tensor
    targets: Tensor
    segments: Tensor | None = None
    first_row: int = 0


@dataclass(frozen=True)
class PairBatch:
    """A batch of an encoder-decoder: pairs of a source and a target.

    source (B, S) int64, padded after source_lengths (B,); a length may be 0. tokens, targets (B, T) int64: tokens begin
    with the beginning-of-sequence id, targets are the same sequence shifted by one, and the loss skips IGNORED.
    target_lengths (B,) may be None if the padding is on the right: causal attention hides it from all real positions.
    first_row as in Batch.
    """

    source: Tensor
    source_lengths: Tensor
    tokens: Tensor
    targets: Tensor
    target_lengths: Tensor | None = None
    first_row: int = 0


@dataclass(frozen=True)
class EncoderBatch:
    """A batch of an encoder: sequences, and one target for each.

    inputs (B, T) int64 are tokens, (B, T, C) are numbers; both are padded after lengths (B,) positions. targets (B,)
    int64 are classes, and the loss skips IGNORED; targets (B, O) are numbers, and the loss skips NaN. first_row as in
    Batch.
    """

    inputs: Tensor
    lengths: Tensor
    targets: Tensor
    first_row: int = 0


AnyBatch = Batch | PairBatch | EncoderBatch


def as_batch(tokens: Tensor | AnyBatch, segments: Tensor | None) -> AnyBatch:
    """The batch itself; or, for tokens alone, a Batch for a forward pass that does not use the targets."""
    return Batch(tokens, tokens, segments) if isinstance(tokens, Tensor) else tokens


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """x copied from the CPU to a device. The copy to a GPU is asynchronous, from pinned memory."""
    if not torch.cuda.is_available() or torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
