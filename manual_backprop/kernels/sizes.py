"""Constants that depend on a device: in which pieces its kernels take their work, and what is small there."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """In numbers of a tensor, unless another unit is given."""

    queries: int  # of a tile of attention [positions]
    scores: int  # of a tile of attention, about
    longest_kept: int  # [positions] of longer sequences probabilities are recomputed in backward: their size is T S
    piece: int  # of a wide tensor at a time
    fewest_rows: int  # of the logits at a time in float32, and twice as many in bfloat16: for each piece all of dW is
    # read and written
    logits: int  # at a time, where the vocabulary is small
    even_rows: int  # that fill a product's blocks
    product: int  # at a time, of one that is added in another format: it stays in the cache
    many_rows: int  # of more, a product takes up to twice its time where they do not fill the blocks, as 50257 do not
    uncompiled_piece: int  # that a function which could be compiled, and is not, takes at a time
    large_vocabulary: int  # of which as many numbers more as fill up a row are a few percent
    small: int  # too little memory for the time that it takes to recompute it
    small_beside_weights: float  # likewise, as a share of the weights: a small batch of a network that is not
    replayed: int  # of an activation: in larger steps all that is no arithmetic is less than a hundredth of the time


SIZES = {  # by device; one that is not named has the CPU's
    "cpu": Sizes(  # a tile and a piece fit into a core's cache; oneDNN's blocks
        queries=128,
        scores=1 << 20,
        longest_kept=128,
        piece=1 << 21,
        fewest_rows=256,
        logits=1 << 22,
        even_rows=128,
        product=1 << 21,
        many_rows=1024,
        uncompiled_piece=1 << 17,
        large_vocabulary=1 << 10,
        small=1 << 19,
        small_beside_weights=1.0,
        replayed=1 << 19,
    ),
}
SIZES["cuda"] = replace(  # there a launch costs what a million numbers do, and memory is plenty
    SIZES["cpu"],
    queries=1 << 20,
    scores=1 << 28,
    longest_kept=0,
    piece=1 << 30,
    fewest_rows=1 << 13,
    logits=1 << 30,
    replayed=0,
)


def sizes_of(x: Tensor) -> Sizes:
    """Those of the device that x lies on."""
    return SIZES.get(x.device.type, SIZES["cpu"])
