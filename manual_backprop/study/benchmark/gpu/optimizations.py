"""The optimizations of the GPU kernels, each with what it saves and its ablation, like `ablations.py` for a CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..ablations import Binding, Optimization

ROOM = "manual_backprop.kernels.cuda"


def _without_graph() -> list[Binding]:
    from ....models import training_step

    return [(training_step, "TrainingStep", partial(training_step.TrainingStep, graph=False))]


def _without_triton() -> list[Binding]:
    from ....kernels.cuda import triton

    return [(triton, "installed", lambda: False)]


def _textbook_adamw() -> list[Binding]:
    from ....kernels.cuda import optimizers
    from ....optim.optimizers import AdamW

    return [(optimizers, "AdamW", AdamW)]


def _loss_by_halves() -> list[Binding]:
    """`linear_cross_entropy` as a forward and then a backward."""
    from .... import ops
    from ....kernels import cuda
    from ....ops.numerics import no_record

    def linear_cross_entropy(
        *inputs: Any, padding: int | None = None, dloss: Any = 1.0, record: Any = no_record
    ) -> Any:
        x, weight, targets, denominator, smoothing, dweight = inputs
        settings = targets, denominator, smoothing, padding
        loss, cache = ops.linear_cross_entropy_forward(x, weight, *settings, record=record)
        return loss, ops.linear_cross_entropy_backward(dloss, cache, dweight, record=record)

    return [(cuda, "linear_cross_entropy", linear_cross_entropy)]


OPTIMIZATIONS = {
    "graph": Optimization(
        "models/training_step.py, kernels/cuda/graph.py",
        "The whole step is captured once and replayed: no Python, no launches from the host.",
        without=_without_graph,
    ),
    "triton": Optimization(
        "kernels/cuda/triton/",
        "One launch for a chain of operations; without it, launches of PyTorch.",
        without=_without_triton,
    ),
    "attention": Optimization(
        "kernels/cuda/attention.py",
        "cuDNN's attention or flash attention keep one number per query; without them, the textbook pair.",
        pairs=("self_attention", "rotary_attention"),
        room=ROOM,
    ),
    "loss": Optimization(
        "kernels/cuda/loss.py",
        "The loss and its gradient in place, in chunks of rows: no N V numbers are kept.",
        without=_loss_by_halves,
    ),
    "feed-forward": Optimization(
        "kernels/cuda/feed_forward.py",
        "Bias and activation in one pass, their values recomputed in backward.",
        pairs=("feed_forward", "gated_feed_forward"),
        room=ROOM,
    ),
    "linear": Optimization(
        "kernels/cuda/linear.py",
        "The weight's gradient is added in float32 by the product itself.",
        pairs=("linear",),
        room=ROOM,
    ),
    "norm": Optimization(
        "kernels/cuda/normalization.py",
        "A residual sum and its norm in one pass.",
        pairs=("residual_layer_norm",),
        room=ROOM,
        applies=lambda case: case.config.traits.norm == "layer",
    ),
    "adamw": Optimization(
        "kernels/cuda/optimizers.py, kernels/cuda/triton/adamw.py",
        "One launch over all parameters, which also writes the bfloat16 weights.",
        without=_textbook_adamw,
    ),
}
