"""The error of a gradient: one number for each tensor, and the bar that it must not exceed.

An absolute tolerance misses bugs in small tensors, and a relative one fails where the true gradient is zero, so the
error of a tensor is |got - want| / max(|want|, 1e-3 |all gradients| / sqrt(number of tensors)), in Euclidean norms.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

AUTOGRAD_BAR = 1e-12  # float64, against the mirror
DIRECTION_BAR = 1e-6  # float64, along a random direction, against central differences
DIRECTION_STEP = 1e-6  # h of these differences
ZERO_BAR = 1e-13  # float64: a gradient that is zero by structure, relative to all gradients
LOW_PRECISION_BAR = 2.0  # fp32, bf16: error against float64, relative to the mirror's error in that precision
EXACT = 0.0  # bitwise


@dataclass(frozen=True)
class Finding:
    """One measured error and its bar. NaN exceeds every bar."""

    subject: str  # an op, or a network
    quantity: str  # a gradient by name, or another measured quantity
    error: float
    bar: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bar


def worst(findings: Iterable[Finding]) -> Finding:
    """The finding with the largest ratio of error to bar."""
    return max(findings, key=lambda finding: (not finding.ok, finding.error / (finding.bar or 1)))


def floor_of(want: Mapping[str, Tensor]) -> float:
    """The norm below which a tensor's gradient counts as small: 1e-3 of the root mean square of all tensors' norms."""
    return 1e-3 * norm_of(want.values()) / math.sqrt(max(len(want), 1))


def norm_of(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def error_of(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """|got - want| / max(|want|, floor); infinite if shapes differ, or if want is 0 and got is not."""
    if got.shape != want.shape:
        return math.inf
    difference = norm_of([got.double() - want.double()])
    size = max(norm_of([want]), floor)
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / size


def errors_of(got: Mapping[str, Tensor], want: Mapping[str, Tensor], apart: Collection[str] = ()) -> dict[str, float]:
    """The error of every tensor except those in `apart`; infinite for a name that only one side has."""
    floor = floor_of(want)
    return {
        name: error_of(got[name], want[name], floor) if name in got and name in want else math.inf
        for name in sorted((got.keys() | want.keys()) - set(apart))
    }


def differing(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """The number of tensors whose bits have changed. NaN is equal to itself here."""
    return float(sum(not torch.equal(_bits(before[name]), _bits(after[name])) for name in before))


def _bits(tensor: Tensor) -> Tensor:
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(size[tensor.element_size()])
