"""The test inputs of an op: random tensors whose dimensions all differ, and the arguments of one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """Draws random tensors with the sizes of a case, which all differ (docs/glossary.md explains the letters)."""

    generator: torch.Generator
    dtype: torch.dtype = torch.float64
    B: int = 2
    T: int = 5
    D: int = 6
    H: int = 3
    F: int = 11
    V: int = 13

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(self.dtype)

    def weight(self, outputs: int, inputs: int) -> Tensor:
        return self.normal(outputs, inputs, scale=2 / math.sqrt(inputs))

    def gain(self, size: int) -> Tensor:
        return 1 + self.normal(size, scale=0.3)

    def bias(self, size: int) -> Tensor:
        return self.normal(size, scale=0.3)

    def x(self, scale: float = 1.0) -> Tensor:
        return self.normal(self.B, self.T, self.D, scale=scale)

    def ids(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)


@dataclass(frozen=True)
class Case:
    """The arguments of one call. Inputs and parameters have gradients; settings are everything else."""

    name: str
    inputs: dict[str, Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()  # outputs that nothing reads: backward gets None for them
    upstream: dict[str, Any] = field(default_factory=dict)  # gradients of outputs, instead of random numbers

    def on(self, device: torch.device) -> Case:
        """The same values on another device."""
        return self.mapped(lambda value: on_tensors(lambda x: x.to(device), value))

    def strided(self) -> Case:
        """The same values, in tensors with another memory layout."""
        return replace(self.mapped(lambda value: on_tensors(_strided, value)), name="non-contiguous")

    def mapped(self, function: Callable[[Any], Any]) -> Case:
        """The case with `function` of each input, parameter and setting."""
        inputs, parameters, settings = (
            {name: function(value) for name, value in group.items()}
            for group in (self.inputs, self.parameters, self.settings)
        )
        return replace(self, inputs=inputs, parameters=parameters, settings=settings)


def on_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`function` of a tensor, or of every tensor in a named tuple; any other value unchanged."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[on_tensors(function, part) for part in value])
    return value


def _strided(tensor: Tensor) -> Tensor:
    if tensor.dim() < 2:
        return torch.stack([tensor, tensor], -1)[..., 0] if tensor.dim() else tensor
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)
