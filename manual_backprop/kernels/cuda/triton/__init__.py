"""Kernels in Triton, one file an idea, each a launch or two where PyTorch needs a launch for every line.

They are operators of PyTorch (`torch.ops.manual_backprop`) with versions for fake tensors, so that a step is traced and
captured with them. Forward is followed by backward, with the lines of the textbook pair (`manual_backprop.ops`) above
their kernel's: that pair is the oracle. Statistics and sums are float32 whatever the format. Nothing waits for the
device, and no number that changes from step to step is a Python number. There are no atomics: sums over rows are made
in parts, which a second launch adds up in their order, so that the same numbers give the same bits. Loops are `while`,
since with NumPy 2.4 the interpreter of Triton 3.6 has no `range` up to a number that is known when the kernel runs.

What is not here: which kernel serves a pair, and whatever PyTorch has itself (products, attention).
A function is imported when it is asked for: this room imports without Triton, its other files need it.
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
# Kernels that one call launches.
LAUNCHES = dict.fromkeys(FILES, 1) | {"bias_activation_backward": 2, "gradient_norm": 2, "residual_norm_backward": 2}


@cache
def installed() -> bool:
    """Whether there is a Triton. It is not imported."""
    return find_spec("triton") is not None


def __getattr__(name: str) -> Any:
    if name in FILES:
        return getattr(import_module(f"{__name__}.{FILES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
