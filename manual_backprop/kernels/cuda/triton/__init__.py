"""Triton kernels, one file per idea. Each takes a launch or two where PyTorch needs a launch for every line.

They are operators of PyTorch (`torch.ops.manual_backprop`) with versions for fake tensors, so that a step can be traced
and captured with them. Forward is followed by backward; the lines of the textbook pair (`manual_backprop.ops`), which
is the oracle, are quoted above those of the kernel. Statistics and sums are in float32 for every dtype. Nothing waits
for the device, and no number that changes from step to step is a Python number. There are no atomics: sums over rows
are computed in parts, and a second launch adds the parts in a fixed order, so that the same numbers give the same bits.
Loops are `while` loops: with NumPy 2.4 the interpreter of Triton 3.6 has no `range` with a bound that is a runtime
value.

Not here: the choice of the kernel for a pair, and what PyTorch has already (products, attention).
Functions are imported on first use: this room imports without Triton, its other files need it.
May import: ops.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

FILES = {
    "adamw_": "adamw",
    "bias_activation": "activations",
    "bias_activation_backward": "activations",
    "cross_entropy_": "loss",
    "gradient_norm": "clipping",
    "residual_norm": "normalization",
    "residual_norm_backward": "normalization",
    "swiglu": "gate",
    "swiglu_backward": "gate",
}
# The number of launches of one call.
LAUNCHES = dict.fromkeys(FILES, 1) | {"bias_activation_backward": 2, "gradient_norm": 2, "residual_norm_backward": 2}


@cache
def installed() -> bool:
    """Whether Triton is installed. Does not import it."""
    return find_spec("triton") is not None


def __getattr__(name: str) -> Any:
    if name in FILES:
        return getattr(import_module(f"{__name__}.{FILES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
