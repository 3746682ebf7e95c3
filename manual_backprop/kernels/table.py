"""Which function serves a pair: one table, by what was asked for, the device and the precision.

A network calls `table.linear_forward(...)`. The first row that fits and has a function of that name serves it, so that
a kernel for one device or one precision is one more row, above those that it stands in for. At which sizes a device's
kernels do what stands in `sizes.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from ..ops import __all__ as pairs
from .arena import Arena
from .cpu.compiled import compiles
from .replay import is_replayable


class Row(NamedTuple):
    """The functions of a module, under the names of the pairs; on which devices, in which precisions (None: all)."""

    module: str
    devices: Collection[str] | None = None
    precisions: Collection[str] | None = None

    def fits(self, device: str, precision: str) -> bool:
        fits_device = self.devices is None or device in self.devices
        return fits_device and (self.precisions is None or precision in self.precisions)


REFERENCE, FUSED = "manual_backprop.ops", "manual_backprop.kernels"
ROWS: dict[str, tuple[Row, ...]] = {  # kernels=...: the rows, from the first choice to the last
    "reference": (Row(REFERENCE),),
    "fused": (Row(FUSED),),  # its own pairs, and the reference's where it has no faster one
}


class Table:
    """The rows of ROWS[which] that fit a network. The functions are looked up when they are called: who puts another
    one in its module is heard."""

    def __init__(self, which: str, device: torch.device, precision: str):
        self.which, self.device = which, device
        self.modules = [sys.modules[row.module] for row in ROWS[which] if row.fits(device.type, precision)]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        for module in self.modules:
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"no row of kernels={self.which} serves {name} on {self.device.type}")

    def serves(self, name: str) -> bool:
        return any(hasattr(module, name) for module in self.modules)

    def functions(self) -> list[Any]:
        """Everything that a network may call, as it is now."""
        return [getattr(self, name) for name in (*pairs, "linear_cross_entropy") if self.serves(name)]

    def calculation(self, arena: Arena | None, uses_library: bool) -> AbstractContextManager[None]:
        """What these functions want around them; `arena`: in a training step, from where their memory comes."""
        if self.which == "reference":
            return nullcontext()
        return self.fast(uses_library, self.device) if arena is None else self.step(arena, uses_library, self.device)

    def compiles(self, how: str) -> bool:
        """Whether parts of them run compiled (kernels.compile)."""
        return self.which != "reference" and compiles(how, self.device)

    def is_replayable(self, size: int, dropout: float) -> bool:
        """Whether steps with activations of so many numbers are replayed."""
        return self.which != "reference" and is_replayable(size, dropout, self.device.type)
