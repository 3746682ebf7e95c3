"""Constants that depend on a device: in which pieces its kernels take their work."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """In numbers of a tensor, unless another unit is given."""

    queries: int  # of a tile of attention [positions]
    scores: int  # of a tile of attention, about
    longest_kept: int  # [positions] of longer sequences probabilities are recomputed in backward: their size is T S
    piece: int  # of a wide tensor at a time
    fewest_rows: int  # of the logits at a time: for each piece all of dW is read and written
    logits: int  # at a time, where the vocabulary is small
    even_rows: int  # that fill a product's blocks
    many_rows: int  # of more, a product takes up to twice its time where they do not fill the blocks, as 50257 do not


SIZES = {  # by device; one that is not named has the CPU's
    "cpu": Sizes(  # a tile and a piece fit into a core's cache; oneDNN's blocks
        queries=128,
        scores=1 << 20,
        longest_kept=128,
        piece=1 << 21,
        fewest_rows=256,
        logits=1 << 22,
        even_rows=128,
        many_rows=1024,
    ),
}


def sizes_of(x: Tensor) -> Sizes:
    """Those of the device that x lies on."""
    return SIZES.get(x.device.type, SIZES["cpu"])
