"""What makes a feed-forward network more than one matrix: ReLU and GELU (Hendrycks and Gimpel 2016)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .numerics import rows, wide

ActivationCache = tuple[Tensor]
BiasGeluCache = tuple[Tensor, Tensor, bool]

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def relu_forward(x: Tensor) -> tuple[Tensor, ActivationCache]:
    """y = max(x, 0), element by element. The slope is 1 where x > 0 and 0 elsewhere (at 0 too, as PyTorch has it)."""
    return x.clamp(min=0), (x,)


def relu_backward(dy: Tensor, cache: ActivationCache) -> Tensor:
    """dy (...) -> dx (...)."""
    (x,) = cache
    # y = max(x, 0)
    return dy * (x > 0)


def gelu_forward(x: Tensor) -> tuple[Tensor, ActivationCache]:
    """y = x Phi(x), with Phi(x) = (1 + erf(x / sqrt(2))) / 2, the normal distribution's cumulative function.

    Its derivative is the normal density phi(x) = exp(-x^2 / 2) / sqrt(2 pi), so dx = dy (Phi(x) + x phi(x)).
    """
    x_wide = wide(x)
    cumulative = 0.5 * (1 + torch.erf(x_wide * math.sqrt(0.5)))
    return (x_wide * cumulative).to(x.dtype), (x,)


def gelu_backward(dy: Tensor, cache: ActivationCache) -> Tensor:
    """dy (...) -> dx (...)."""
    (x,) = cache
    x_wide = wide(x)
    cumulative = 0.5 * (1 + torch.erf(x_wide * math.sqrt(0.5)))
    density = torch.exp(-0.5 * x_wide.square()) / math.sqrt(2 * math.pi)
    # y = x Phi(x)
    dx = wide(dy) * (cumulative + x_wide * density)
    return dx.to(x.dtype)


def gelu_tanh_forward(x: Tensor) -> tuple[Tensor, ActivationCache]:
    """y = x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3): GPT-2's approximation of x Phi(x).

    With t = tanh u: dt/du = 1 - t^2 and du/dx = sqrt(2 / pi) (1 + 3 * 0.044715 x^2), so
        dx = dy ((1 + t) / 2 + x (1 - t^2) du/dx / 2)
    """
    x_wide = wide(x)
    u = SQRT_2_OVER_PI * x_wide * (1 + CUBIC * x_wide.square())
    y = 0.5 * x_wide * (1 + u.tanh())
    return y.to(x.dtype), (x,)


def gelu_tanh_backward(dy: Tensor, cache: ActivationCache) -> Tensor:
    """dy (...) -> dx (...)."""
    (x,) = cache
    x_wide = wide(x)
    squared = CUBIC * x_wide.square()
    t = torch.tanh(SQRT_2_OVER_PI * x_wide * (1 + squared))
    u_slope = SQRT_2_OVER_PI * (1 + 3 * squared)
    # y = x (1 + tanh u) / 2
    dx = wide(dy) * 0.5 * (1 + t + x_wide * (1 - t.square()) * u_slope)
    return dx.to(x.dtype)


def bias_gelu_forward(x: Tensor, bias: Tensor, tanh: bool = True) -> tuple[Tensor, BiasGeluCache]:
    """y = gelu(x + bias), the tanh approximation or the exact one.

    x (..., F), bias (F) -> y (..., F). One pass where the sum is not stored; the cache keeps x alone, and backward adds
    the bias again. Every row adds the same bias, so dbias is the sum over rows of dx.
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
