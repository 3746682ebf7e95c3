"""Activations and objectives (loss functions) that users register: a pair by hand, its mirror for autograd, and the
name that a config uses.

Register them before a network is built, in a module that is imported or named by `--plugin`. The gradient check at the
end of each run compares the pair with its mirror, and so does `python -m manual_backprop.verify`.
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
    """Makes architecture.activation=NAME available: y, cache = forward(x), dx = backward(dy, cache), element by
    element, and y = mirror(x) for autograd. Raises ConfigError if the name is not a word or is taken."""
    add_name(name, network.ACTIVATIONS, "activation")
    ELEMENTWISE[name], autograd.ACTIVATIONS[name] = (forward, backward), mirror


def register_objective(
    name: str,
    forward: Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]],
    backward: Callable[[Any, Any], Tensor],
    mirror: Callable[[Tensor, Tensor, Any], Tensor],
    of_numbers: bool = False,
) -> None:
    """Makes head_loss=NAME available in a network's config; a task asks for it in its `network_config`.

    loss, cache = forward(outputs, targets, denominator) and doutputs = backward(dloss, cache), and for autograd
    loss = mirror(outputs, targets, denominator). The loss is a sum over the targets that count, divided by
    `denominator`, which is that of the whole optimizer step. A target of -100 does not count, nor does a number that is
    NaN. outputs (B, T, V) with targets (B, T); an encoder's (B, n_outputs) with classes (B,), or with `of_numbers` with
    (B, n_outputs). Raises ConfigError as above.
    """
    add_name(name, network.HEAD_LOSSES, "objective")
    OBJECTIVES[name], autograd.OBJECTIVES[name] = (forward, backward), mirror
    if of_numbers:
        network.OF_NUMBERS.add(name)
