"""All functions that become libraries, in every format; as a program: compiles those that are missing.

A compiler's start takes as long as a dozen functions, so that one process compiles all of them in a fraction of the
time that the tests' runs would take one after the other, each what it misses itself (conftest.py).
"""

from __future__ import annotations

import torch

from manual_backprop.kernels.cpu import compiled
from manual_backprop.kernels.cpu.compiled import CompiledFunction

FORMATS = {  # of activations, of parameters
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16_mixed": (torch.bfloat16, torch.float32),
}


def functions() -> list[tuple[CompiledFunction, str]]:
    """Each in every format, where that is another one for it."""
    import manual_backprop.kernels.cpu.optimizers
    import manual_backprop.models.custom  # noqa: F401

    found = {
        function.request(kinds_of(precision)): (function, precision)
        for precision in reversed(FORMATS)
        for function in compiled._registered
    }
    return list(found.values())


def kinds_of(precision: str) -> dict[str, torch.dtype]:
    return dict(zip(("activation", "parameter"), FORMATS[precision], strict=True))


def compile_missing() -> None:
    compiled._compile([function.request(kinds_of(precision)) for function, precision in functions()])


if __name__ == "__main__":
    compile_missing()
