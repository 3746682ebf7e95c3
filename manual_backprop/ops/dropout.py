"""Dropout whose mask is a function of (seed, step, place, element), so that nothing has to be stored.

Backward computes the mask again; a resumed run, another device, another number of workers or another split of the batch
into pieces sees the same one (Srivastava et al. 2014; the division by the keep probability happens in training).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor


class Dropout(NamedTuple):
    """Which mask: all that `dropout_backward` needs to draw the same one again."""

    probability: float  # that an element is dropped, in [0, 1)
    key: int  # 64 random bits of (seed, step, place): `random_key`
    first_row: int = 0  # place of the tensor's first row (a sequence) in the batch of the whole optimizer step


def random_key(seed: int, step: int, place: str) -> int:
    """64 bits that any change of the seed, the optimizer step or the place in the network changes."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{place}".encode(), digest_size=8).digest(), "little")


def _signed32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def keep_mask(shape: tuple[int, ...], dropout: Dropout, device: torch.device) -> Tensor:
    """True where an element is kept: (...) of bool, with probability 1 - p, independently.

    The element's number is mixed with the two halves of the key by multiplications and shifts in 32-bit integers that
    wrap (the finalizer of MurmurHash3, with the key's second half between its rounds), which every device computes
    alike.
    """
    count = 1
    for size in shape:
        count *= size
    first = dropout.first_row * (count // shape[0]) if count else 0
    low, high = dropout.key & 0xFFFFFFFF, dropout.key >> 32
    h = torch.arange(count, dtype=torch.int32, device=device)
    h.add_(_signed32(first)).mul_(_signed32(0x9E3779B1)).bitwise_xor_(_signed32(low))
    # >> copies the sign bit in, so each shift is followed by a mask of the bits that are left
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).mul_(_signed32(0x85EBCA6B)).add_(_signed32(high))
    h.bitwise_xor_((h >> 13).bitwise_and_(0x7FFFF)).mul_(_signed32(0xC2B2AE35))
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).bitwise_and_(0x7FFFFFFF)
    return (h >= int(dropout.probability * (1 << 31))).view(shape)


def dropout_forward(x: Tensor, dropout: Dropout | None) -> tuple[Tensor, Dropout | None]:
    """y = x * mask / (1 - p): each element is dropped with probability p, and the mean stays.

    x (B, ...) -> y (B, ...). Without a Dropout, or with p = 0, y is x itself. The mask does not depend on x, so
    dx = dy * mask / (1 - p).
    """
    if dropout is None or dropout.probability == 0:
        return x, None
    mask = keep_mask(tuple(x.shape), dropout, x.device)
    return x * mask / (1 - dropout.probability), dropout


def dropout_backward(dy: Tensor, cache: Dropout | None) -> Tensor:
    """dy (B, ...) -> dx (B, ...)."""
    dropout = cache
    if dropout is None:
        return dy
    mask = keep_mask(tuple(dy.shape), dropout, dy.device)
    # y = x * mask / (1 - p)
    return dy * mask / (1 - dropout.probability)
