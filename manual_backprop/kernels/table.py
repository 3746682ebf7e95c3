"""The table that chooses the function for a pair, and the class for an optimizer, by kernels=..., device, precision and
the network's sizes.

A network calls `table.linear_forward(...)`. The first row that fits and has a function of that name serves the call. So
a kernel for one device or one precision is one more row, above the rows that it replaces. The constants of each device
are in `sizes.py`.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import torch

from ..config.network import CPU_PRECISIONS, CustomTransformerConfig
from ..ops import __all__ as pairs
from .arena import Arena
from .cpu import products
from .cpu.compiled import compiled_functions, compiles
from .replay import is_replayable


class Row(NamedTuple):
    """A module with functions named like the pairs, and conditions on the networks that it serves (None: all)."""

    module: str
    devices: Collection[str] | None = None
    precisions: Collection[str] | None = None
    at_most: Mapping[str, int] | None = None  # largest sizes, by their names in a network's config: {"d_head": 128}

    def fits(self, config: CustomTransformerConfig, device: torch.device) -> bool:
        return (
            (self.devices is None or device.type in self.devices)
            and (self.precisions is None or config.precision in self.precisions)
            and all(getattr(config, size) <= most for size, most in (self.at_most or {}).items())
        )


FUSED = "manual_backprop.kernels"
GPU = f"{FUSED}.cuda"
TEXTBOOK = (Row("manual_backprop.ops"), Row("manual_backprop.optim.optimizers"))
ON_CPU = ("cpu", "meta")  # where the CPU's kernels serve
NAMES = (*pairs, "linear_cross_entropy")  # of the functions that a network calls
ROWS: dict[str, tuple[Row, ...]] = {  # kernels=...: the rows, from the first choice to the last
    "reference": TEXTBOOK,
    "fused": (
        Row(GPU, ("cuda",)),
        Row(f"{GPU}.optimizers", ("cuda",)),
        Row(FUSED, ON_CPU, CPU_PRECISIONS),
        Row(f"{FUSED}.cpu.optimizers", ON_CPU, CPU_PRECISIONS),
        *TEXTBOOK,
    ),
}


class Table:
    """The rows of ROWS that fit a network on a device. A function is looked up at every call, so replacing it in its
    module takes effect."""

    def __init__(self, config: CustomTransformerConfig, device: torch.device):
        self.which, self.precision, self.device = config.kernels, config.precision, device
        rows = [row.module for row in ROWS[self.which] if row.fits(config, device)]
        self.modules = [import_module(module) for module in rows]
        for module in self.modules:
            getattr(module, "told", set()).clear()  # reasons logged for another network
        self.on_cpu, self.on_gpu = FUSED in rows, GPU in rows  # whether the kernels of that device are the first choice

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if (function := self._find(name)) is None:
            raise AttributeError(f"no row of kernels={self.which} serves {name} on {self.device.type}")
        return function

    def _find(self, name: str) -> Callable[..., Any] | None:
        for module in self.modules:
            if (function := vars(module).get(name)) is not None:
                return function
        return None

    def serves(self, name: str) -> bool:
        return self._find(name) is not None

    def functions(self) -> list[Any]:
        """All functions that a network may call at present, row by row; None where a row has no such function."""
        return [function for module in self.modules for function in map(vars(module).get, NAMES)]

    def calculation(self, arena: Arena | None, uses_library: bool) -> AbstractContextManager[None]:
        """The context that these functions need. `arena`: the memory of a training step."""
        if not self.on_cpu:
            return compiled_functions(uses_library) if self.on_gpu else nullcontext()
        return self.fast(uses_library, self.device) if arena is None else self.step(arena, uses_library, self.device)

    def compiles(self, how: str) -> bool:
        """Whether parts of them run compiled (kernels.compile)."""
        return (self.on_cpu or self.on_gpu) and compiles(how, self.device)

    def rounds_weights(self, how: str) -> bool:
        """Whether products read the parameters themselves although they are wider, and no rounded copy of them is
        needed."""
        return self.on_cpu and self.compiles(how) and products.rounds_weights(self.precision, self.device)

    def is_replayable(self, size: int, dropout: float) -> bool:
        """Whether steps whose activations have `size` numbers are replayed."""
        return self.on_cpu and is_replayable(size, dropout, self.device.type)
