"""Activations and learning objectives from outside of the package: a pair by hand, and its mirror for autograd, under a
name that a config can have.

Whoever registers one does so before a network is built, in a module that is imported or named by `--plugin`. The check
of gradients at the end of each run compares the two, and `python -m manual_backprop.verify` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..config import network
from ..config.plugins import add_name
from ..ops.activations import ELEMENTWISE
from ..ops.loss import OBJECTIVES
from . import autograd


def register_activation(
    name: str,
    forward: Callable[[Tensor], tuple[Tensor, Any]],
    backward: Callable[[Tensor, Any], Tensor],
    mirror: Callable[[Tensor], Tensor],
) -> None:
    """Makes architecture.activation=NAME: y, cache = forward(x), dx = backward(dy, cache), element by element, and
    y = mirror(x) for autograd. Raises ConfigError where the name is no word, or is another one's."""
    add_name(name, network.ACTIVATIONS, "activation")
    ELEMENTWISE[name], autograd.ACTIVATIONS[name] = (forward, backward), mirror


def register_objective(
    name: str,
    forward: Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]],
    backward: Callable[[Any, Any], Tensor],
    mirror: Callable[[Tensor, Tensor, Any], Tensor],
    of_numbers: bool = False,
) -> None:
    """Makes head_loss=NAME of a network's config, which a task asks for in its `network_config`.

    loss, cache = forward(outputs, targets, denominator) and doutputs = backward(dloss, cache), and loss =
    mirror(outputs, targets, denominator) for autograd: a sum over the targets that count (-100 does not, of numbers
    NaN) over `denominator`, that of the whole optimizer step. outputs (B, T, V) with targets (B, T), or of an encoder
    (B, n_outputs) with classes (B,), or `of_numbers` with (B, n_outputs). Raises ConfigError as above.
    """
    add_name(name, network.HEAD_LOSSES, "objective")
    OBJECTIVES[name], autograd.OBJECTIVES[name] = (forward, backward), mirror
    if of_numbers:
        network.REGRESSION_LOSSES.add(name)
