"""Activations behind a bias, one pass each way; backward makes the activated values again in the pass of the gradient.

Sums in the wide format, as in `ops.activations`, whose formulas these are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.activations import GATE_CUBIC, GATE_LINEAR
from ..ops.numerics import wide
from .compiled import elementwise


@elementwise
def bias_gelu_tanh(y: Tensor, x: Tensor, bias: Tensor) -> None:
    """y = gelu(x + bias). y, x (N, F), bias (F)."""
    z = wide(x) + wide(bias)
    y.copy_(z * torch.sigmoid(z * (GATE_LINEAR + GATE_CUBIC * z * z)))


@elementwise
def bias_gelu_tanh_gradient(y: Tensor, dx: Tensor, x: Tensor, bias: Tensor) -> None:
    """y = gelu(x + bias), and dx, which holds dy, becomes the gradient of x."""
    z = wide(x) + wide(bias)
    squared = z * z
    twice_u = z * (GATE_LINEAR + GATE_CUBIC * squared)
    gate, rest = torch.sigmoid(twice_u), torch.sigmoid(-twice_u)
    y.copy_(z * gate)
    dx.copy_(wide(dx) * gate * (1 + z * rest * (GATE_LINEAR + 3 * GATE_CUBIC * squared)))


@elementwise
def bias_gelu(y: Tensor, x: Tensor, bias: Tensor) -> None:
    z = wide(x) + wide(bias)
    y.copy_(z * (0.5 * (1 + torch.erf(z * math.sqrt(0.5)))))


@elementwise
def bias_gelu_gradient(y: Tensor, dx: Tensor, x: Tensor, bias: Tensor) -> None:
    z = wide(x) + wide(bias)
    cumulative = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    y.copy_(z * cumulative)
    dx.copy_(wide(dx) * (cumulative + z * density))


@elementwise
def bias_relu(y: Tensor, x: Tensor, bias: Tensor) -> None:
    y.copy_((wide(x) + wide(bias)).clamp(min=0))


@elementwise
def bias_relu_gradient(y: Tensor, dx: Tensor, x: Tensor, bias: Tensor) -> None:
    z = wide(x) + wide(bias)
    y.copy_(z.clamp(min=0))
    dx.copy_(torch.where(z > 0, wide(dx), 0))


ACTIVATIONS = {  # forward, and backward
    "gelu_tanh": (bias_gelu_tanh, bias_gelu_tanh_gradient),
    "gelu": (bias_gelu, bias_gelu_gradient),
    "relu": (bias_relu, bias_relu_gradient),
}
