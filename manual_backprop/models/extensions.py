"""Registers a user's activations and objectives (loss functions): a hand-written pair, its mirror for autograd, and the
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
    element, and y = mirror(x) for autograd. Raises ConfigError if the name is not an identifier or is taken.

    >>> def cube_forward(x):
    ...     return x**3, x
    >>> def cube_backward(dy, x):
    ...     return dy * 3 * x**2
    >>> register_activation("cube", cube_forward, cube_backward, mirror=lambda x: x**3)
    >>> CustomTransformer({"d_model": 8, "n_blocks": 1, "activation": "cube"}).activation
    'cube'
    """
    add_name(name, network.ACTIVATIONS, "activation")
    ELEMENTWISE[name], autograd.ACTIVATIONS[name] = (forward, backward), mirror


def register_objective(
    name: str,
    forward: Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]],
    backward: Callable[[Any, Any], Tensor],
    mirror: Callable[[Tensor, Tensor, Any], Tensor],
    of_numbers: bool = False,
) -> None:
    """Makes head_loss=NAME available in a network's config; a task sets it in its `network_config`.

    loss, cache = forward(outputs, targets, denominator) and doutputs = backward(dloss, cache), and for autograd
    loss = mirror(outputs, targets, denominator). The loss is a sum over the targets that count, divided by
    `denominator`, that of the whole optimizer step; targets of -100 or NaN do not count. A decoder has outputs
    (B, T, V), targets (B, T); an encoder outputs (B, n_outputs), targets (B,), the classes, or with `of_numbers`
    (B, n_outputs), the numbers. Raises ConfigError if the name is not an identifier or is taken.

    >>> def absolute_error_forward(outputs, targets, denominator):
    ...     difference = torch.where(targets.isnan(), 0, outputs - targets)
    ...     return difference.abs().sum() / denominator, (difference, denominator)
    >>> def absolute_error_backward(dloss, cache):
    ...     difference, denominator = cache
    ...     return dloss * difference.sign() / denominator
    >>> def absolute_error_mirror(outputs, targets, denominator):
    ...     return torch.where(targets.isnan(), 0, (outputs - targets).abs()).sum() / denominator
    >>> pair = absolute_error_forward, absolute_error_backward
    >>> register_objective("absolute_error", *pair, absolute_error_mirror, of_numbers=True)
    >>> model = EncoderWrapper(vocab_size=8, d_model=8, n_blocks=1, n_outputs=1, head_loss="absolute_error")
    >>> model.train_step([[1, 2, 3]], targets=[[0.5]], learning_rate=0.1)["status"]
    'success'
    """
    add_name(name, network.HEAD_LOSSES, "objective")
    OBJECTIVES[name], autograd.OBJECTIVES[name] = (forward, backward), mirror
    if of_numbers:
        network.REGRESSION_LOSSES.add(name)
