"""Constants of each device: the sizes of pieces and tiles in its kernels, and the limits of what counts as small."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Sizes for one device, counted in numbers (elements of a tensor) unless another unit is given."""

    queries: int  # of a tile of attention [positions]
    scores: int  # of a tile of attention, about
    longest_kept: int  # [positions] for longer sequences backward recomputes the probabilities, whose size is T S
    piece: int  # of a wide tensor at a time
    fewest_rows: int  # of logits at a time in float32, twice as many in bfloat16: each piece reads and writes all of dW
    logits: int  # at a time, for a small vocabulary
    even_rows: int  # multiples of this fill a product's blocks
    product: int  # at a time, for a product of PyTorch that is added in another dtype: it stays in the cache
    many_rows: int  # beyond this, PyTorch's take up to twice as long if the rows do not fill its blocks (50257 do not)
    uncompiled_piece: int  # at a time, for a function that could be compiled but is not
    large_vocabulary: int  # from here on padding a row costs only a few percent
    small: int  # tensors up to this size are kept: recomputing them saves too little memory for its time
    small_beside_weights: float  # the same as a share of the weights, for small batches of large networks
    replayed: int  # largest activation of replayed steps: in larger ones less than 1 % of the time is not arithmetic


SIZES = {  # by device; other devices have those of the CPU
    "cpu": Sizes(  # a tile and a piece fit into a core's cache; rows fill oneDNN's blocks
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
        small=5 << 16,
        small_beside_weights=1.0,
        replayed=1 << 19,
    ),
}
SIZES["cuda"] = replace(  # there a launch costs as much as a million numbers, and memory is plenty
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
    """The sizes of the device of x."""
    return SIZES.get(x.device.type, SIZES["cpu"])
