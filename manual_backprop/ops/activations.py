"""The activation functions ReLU and GELU (Hendrycks and Gimpel 2016)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .numerics import rows, wide

ActivationCache = tuple  # private to its pair
BiasGeluCache = tuple[Tensor, Tensor, bool]

GATE_LINEAR = 2 * math.sqrt(2 / math.pi)
GATE_CUBIC = 0.044715 * GATE_LINEAR


def relu_forward(x: Tensor) -> tuple[Tensor, ActivationCache]:
    """y = max(x, 0), element by element. The derivative is 1 where x > 0 and 0 elsewhere (also at 0, as in PyTorch).

    >>> y, cache = relu_forward(torch.tensor([-1.0, 2.0]))
    >>> y, relu_backward(torch.tensor([10.0, 10.0]), cache)
    (tensor([0., 2.]), tensor([ 0., 10.]))
    """
    return x.clamp(min=0), (x,)


def relu_backward(dy: Tensor, cache: ActivationCache) -> Tensor:
    """dy (...) -> dx (...)."""
    (x,) = cache
    # y = max(x, 0)
    return dy * (x > 0)


# Pairs that add no bias, by the name of the activation. `models.extensions` registers the activations of users here.
ELEMENTWISE: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Any]], Callable[[Tensor, Any], Tensor]]] = {
    "relu": (relu_forward, relu_backward)
}


def gelu_forward(x: Tensor) -> tuple[Tensor, ActivationCache]:
    """y = x Phi(x), with Phi(x) = (1 + erf(x / sqrt(2))) / 2, the normal distribution's cumulative function.

    Its derivative is the normal density phi(x) = exp(-x^2 / 2) / sqrt(2 pi), so dx = dy (Phi(x) + x phi(x)).

    >>> y, cache = gelu_forward(torch.tensor([0.0, 100.0]))
    >>> y, gelu_backward(torch.ones(2), cache)
    (tensor([  0., 100.]), tensor([0.5000, 1.0000]))
    """
    x_wide = wide(x)
    cumulative = (x_wide * math.sqrt(0.5)).erf_().add_(1).mul_(0.5)
    return (x_wide * cumulative).to(x.dtype), (x,)


def gelu_backward(dy: Tensor, cache: ActivationCache) -> Tensor:
    """dy (...) -> dx (...)."""
    (x,) = cache
    x_wide = wide(x)
    cumulative = (x_wide * math.sqrt(0.5)).erf_().add_(1).mul_(0.5)
    density = x_wide.square().mul_(-0.5).exp_().div_(math.sqrt(2 * math.pi))
    # y = x Phi(x)
    dx = density.mul_(x_wide).add_(cumulative).mul_(wide(dy))
    return dx.to(x.dtype)


def gelu_tanh_forward(x: Tensor) -> tuple[Tensor, ActivationCache]:
    """y = x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3): GPT-2's approximation of x Phi(x).

    (1 + tanh u) / 2 = sigmoid(2u) =: gate. The sigmoid is cheaper, and accurate where 1 + tanh u cancels. So y = x
    gate. The derivative of a sigmoid gives dgate/dx = gate (1 - gate) d(2u)/dx, with
    d(2u)/dx = 2 sqrt(2 / pi) (1 + 3 * 0.044715 x^2). Therefore
        dx = dy (gate + x gate (1 - gate) d(2u)/dx)

    >>> y, cache = gelu_tanh_forward(torch.tensor([0.0, 100.0]))
    >>> y, gelu_tanh_backward(torch.ones(2), cache)
    (tensor([  0., 100.]), tensor([0.5000, 1.0000]))
    """
    x_wide = wide(x)
    gate = x_wide.square().mul_(GATE_CUBIC).add_(GATE_LINEAR).mul_(x_wide).sigmoid_()  # 2u = x (linear + cubic x^2)
    return (x_wide * gate).to(x.dtype), (x,)


def gelu_tanh_backward(dy: Tensor, cache: ActivationCache) -> Tensor:
    """dy (...) -> dx (...)."""
    (x,) = cache
    x_wide = wide(x)
    squared = x_wide.square()
    slope = (squared * (3 * GATE_CUBIC)).add_(GATE_LINEAR)  # d(2u)/dx
    twice_u = squared.mul_(GATE_CUBIC).add_(GATE_LINEAR).mul_(x_wide)
    gate, rest = twice_u.sigmoid(), twice_u.neg_().sigmoid_()  # rest = 1 - gate, without cancellation
    # y = x gate
    dx = rest.mul_(slope).mul_(x_wide).add_(1).mul_(gate).mul_(wide(dy))  # dy gate (1 + x rest slope)
    return dx.to(x.dtype)


def bias_gelu_forward(x: Tensor, bias: Tensor, tanh: bool = True) -> tuple[Tensor, BiasGeluCache]:
    """y = gelu(x + bias), the tanh approximation or the exact function.

    x (..., F), bias (F) -> y (..., F). The cache keeps x and not the sum: backward adds the bias again, so that a fast
    version needs one pass. Every row adds the same bias, so dbias is the sum of dx over rows.

    >>> y, cache = bias_gelu_forward(torch.zeros(3, 2), bias=torch.tensor([0.0, 100.0]))
    >>> dbias = torch.zeros(2)
    >>> dx = bias_gelu_backward(torch.ones(3, 2), cache, dbias)
    >>> y[0], dx[0], dbias
    (tensor([  0., 100.]), tensor([0.5000, 1.0000]), tensor([1.5000, 3.0000]))
    """
    gelu = gelu_tanh_forward if tanh else gelu_forward
    y, _ = gelu(wide(x) + wide(bias))
    return y.to(x.dtype), (x, bias, tanh)


def bias_gelu_backward(dy: Tensor, cache: BiasGeluCache, dbias: Tensor) -> Tensor:
    """dy (..., F) -> dx (..., F); adds to dbias (F)."""
    x, bias, tanh = cache
    gelu_derivative = gelu_tanh_backward if tanh else gelu_backward
    # y = gelu(x + bias)
    dx = gelu_derivative(dy, (wide(x) + wide(bias),))
    dbias += rows(dx).sum(0)
    return dx.to(x.dtype)
