"""Dropout (Srivastava et al. 2014) whose mask is a function of (seed, step, place, element) and is never stored.

Backward recomputes the mask. The mask is the same in a resumed run, on another device, with another number of workers,
with another padding, and for another split of the batch into pieces or of the scores into tiles. Training divides by
the keep probability.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor


class Dropout(NamedTuple):
    """Identifies a mask: all that `dropout_backward` needs to recompute it.

    An element has an index: its row in the batch of the whole optimizer step, then head and position, or position
    alone, then key or feature. `sizes` are those of the network, not of a tensor.

    >>> dropout = Dropout(0.5, random_key(seed=0, step=1, place="embedding"), sizes=(4,))
    >>> whole = keep_mask((1, 4, 8), dropout, torch.device("cpu"))
    >>> second_half = keep_mask((1, 2, 8), dropout.tile(0, 2), torch.device("cpu"))
    >>> torch.equal(whole[:, 2:], second_half)
    True
    """

    probability: float  # that an element is dropped, in [0, 1)
    key: int | Tensor  # 64 random bits of (seed, step, place): `random_key`; as a tensor int64, on the mask's device
    sizes: tuple[int, ...]  # of the dimensions between the first and the last: (n_heads, max_seq_len) or (max_seq_len,)
    first: tuple[int, ...] = ()  # index of the tensor's first element; missing dimensions are 0

    def tile(self, *steps: int) -> Dropout:
        """The mask of a part of the tensor; the part begins `steps` elements further on in each dimension."""
        old = (*self.first, *[0] * len(steps))[: max(len(self.first), len(steps))]
        new = (*steps, *[0] * len(old))
        return self._replace(first=tuple(map(sum, zip(old, new, strict=False))))


def random_key(seed: int, step: int, place: str) -> int:
    """A 64-bit hash of the seed, the optimizer step and the place in the network.

    >>> random_key(0, 1, "embedding") == random_key(0, 1, "embedding"), random_key(0, 1, "embedding") < 2**64
    (True, True)
    >>> random_key(0, 1, "embedding") == random_key(0, 2, "embedding")
    False
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{place}".encode(), digest_size=8).digest(), "little")


def signed(value: int, bits: int) -> int:
    """`value`, an unsigned integer of `bits` bits, read as a signed integer (two's complement)."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _shifted(x: Tensor, distance: int, bits: int) -> Tensor:
    """x >> distance of an unsigned x: the `>>` of signed integers would copy the sign bit."""
    return (x >> distance).bitwise_and_((1 << (bits - distance)) - 1)


def _row_keys(shape: tuple[int, ...], dropout: Dropout, device: torch.device) -> Tensor:
    """64 bits for every row of a mask (all dimensions but the last): shape[:-1] of int64.

    The finalizer of SplitMix64 (Steele, Lea and Flood 2014) mixes the row's number, counted in the network's sizes,
    with the key. It is a bijection, so no two rows of a mask have the same bits.
    """
    number = torch.zeros((), dtype=torch.int64, device=device)
    for dimension, (size, length) in enumerate(zip((1, *dropout.sizes), shape[:-1], strict=True)):
        first = dropout.first[dimension] if dimension < len(dropout.first) else 0
        if dimension and first + length > size:
            raise ValueError(f"a mask of shape {shape} that begins at {dropout.first} is larger than {dropout.sizes}")
        number = number[..., None] * size + torch.arange(first, first + length, device=device)
    h = number.mul_(signed(0x9E3779B97F4A7C15, 64))
    h.add_(signed(dropout.key, 64) if isinstance(dropout.key, int) else dropout.key)
    h.bitwise_xor_(_shifted(h, 30, 64)).mul_(signed(0xBF58476D1CE4E5B9, 64))
    h.bitwise_xor_(_shifted(h, 27, 64)).mul_(signed(0x94D049BB133111EB, 64))
    return h.bitwise_xor_(_shifted(h, 31, 64))


def keep_mask(shape: tuple[int, ...], dropout: Dropout, device: torch.device) -> Tensor:
    """True where an element is kept: (...) of bool, with probability 1 - p, independently.

    Each row of the mask has its own 64 bits. The finalizer of MurmurHash3, with multiplications and shifts of 32-bit
    integers that wrap, mixes the element's place in the row with both halves of these bits: the second half enters
    between its rounds. Every device computes the same integers. The 32 bits count only within a row, so the number of
    elements has no limit.

    >>> dropout = Dropout(0.25, random_key(0, 1, "embedding"), sizes=(100,))
    >>> mask = keep_mask((10, 100, 100), dropout, torch.device("cpu"))
    >>> mask.shape, round(mask.double().mean().item(), 2)
    (torch.Size([10, 100, 100]), 0.75)
    """
    keys = _row_keys(shape, dropout, device)[..., None]
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)  # `to` keeps the lower bits
    start = dropout.first[-1] if len(dropout.first) == len(shape) else 0
    place = torch.arange(start, start + shape[-1], dtype=torch.int32, device=device)
    h = place.mul_(signed(0x9E3779B1, 32)).bitwise_xor(low)
    h.bitwise_xor_(_shifted(h, 16, 32)).mul_(signed(0x85EBCA6B, 32)).add_(high)
    h.bitwise_xor_(_shifted(h, 13, 32)).mul_(signed(0xC2B2AE35, 32))
    h.bitwise_xor_(_shifted(h, 16, 32)).bitwise_and_(0x7FFFFFFF)
    return h >= int(dropout.probability * (1 << 31))


def dropout_forward(x: Tensor, dropout: Dropout | None) -> tuple[Tensor, Dropout | None]:
    """y = x * mask / (1 - p): each element is dropped with probability p; the expected value stays the same.

    x (B, ...) -> y (B, ...). Without a Dropout, or with p = 0, y is x itself. The mask does not depend on x, so
    dx = dy * mask / (1 - p).

    >>> dropout = Dropout(0.5, random_key(0, 1, "embedding"), sizes=(3,))
    >>> y, cache = dropout_forward(torch.ones(2, 3, 4), dropout)
    >>> y.unique(), torch.equal(dropout_backward(torch.ones(2, 3, 4), cache), y)
    (tensor([0., 2.]), True)
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
