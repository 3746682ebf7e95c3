"""Activations of x + bias, one pass forward and one backward, which also recomputes the activated values.

The formulas are those of `ops.activations`; sums are in float32 or wider.
"""

import math

import torch
from torch import Tensor

from ...ops.activations import GATE_CUBIC, GATE_LINEAR
from ...ops.numerics import wide
from .compiled import compiled


def gate_and_rest(x: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(x) and 1 - sigmoid(x), both accurate where they are small, from one exponential that cannot overflow."""
    decay = torch.exp(-x.abs())
    large = 1 / (1 + decay)
    small = decay * large
    is_positive = x > 0
    return torch.where(is_positive, large, small), torch.where(is_positive, small, large)


@compiled("N F", "N F", "F: parameter", by_rows=True)
def bias_gelu_tanh(y: Tensor, x: Tensor, bias: Tensor) -> None:
    """y = gelu(x + bias). y, x (N, F), bias (F)."""
    z = wide(x) + wide(bias)
    y.copy_(z * torch.sigmoid(z * (GATE_LINEAR + GATE_CUBIC * z * z)))


@compiled("N F", "N F", "F: parameter", "N F", "F: parameter", by_rows=True)
def bias_gelu_tanh_gradient(y: Tensor, dx: Tensor, dbias: Tensor, x: Tensor, bias: Tensor) -> None:
    """y = gelu(x + bias); dx, which contains dy, becomes the gradient of x; dbias (F) += its sum over the rows."""
    z = wide(x) + wide(bias)
    squared = z * z
    gate, rest = gate_and_rest(z * (GATE_LINEAR + GATE_CUBIC * squared))
    y.copy_(z * gate)
    _give(dx, dbias, wide(dx) * gate * (1 + z * rest * (GATE_LINEAR + 3 * GATE_CUBIC * squared)))


@compiled("N F", "N F", "F: parameter", by_rows=True)
def bias_gelu(y: Tensor, x: Tensor, bias: Tensor) -> None:
    z = wide(x) + wide(bias)
    y.copy_(z * (0.5 * (1 + torch.erf(z * math.sqrt(0.5)))))


@compiled("N F", "N F", "F: parameter", "N F", "F: parameter", by_rows=True)
def bias_gelu_gradient(y: Tensor, dx: Tensor, dbias: Tensor, x: Tensor, bias: Tensor) -> None:
    z = wide(x) + wide(bias)
    cumulative = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    y.copy_(z * cumulative)
    _give(dx, dbias, wide(dx) * (cumulative + z * density))


@compiled("N F", "N F", "F: parameter", by_rows=True)
def bias_relu(y: Tensor, x: Tensor, bias: Tensor) -> None:
    y.copy_((wide(x) + wide(bias)).clamp(min=0))


@compiled("N F", "N F", "F: parameter", "N F", "F: parameter", by_rows=True)
def bias_relu_gradient(y: Tensor, dx: Tensor, dbias: Tensor, x: Tensor, bias: Tensor) -> None:
    z = wide(x) + wide(bias)
    y.copy_(z.clamp(min=0))
    _give(dx, dbias, torch.where(z > 0, wide(dx), 0))


def _give(dx: Tensor, dbias: Tensor, gradient: Tensor) -> None:
    """dx (N, F) = gradient, dbias (F) += its sum over the rows; the sum reads the gradient before it is rounded."""
    dx.copy_(gradient)
    dbias += gradient.sum(0).to(dbias.dtype)


ACTIVATIONS = {  # forward, and backward
    "gelu_tanh": (bias_gelu_tanh, bias_gelu_tanh_gradient),
    "gelu": (bias_gelu, bias_gelu_gradient),
    "relu": (bias_relu, bias_relu_gradient),
}
