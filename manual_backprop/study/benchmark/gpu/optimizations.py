"""The optimizations of the GPU kernels, each with what it saves and its ablation, like `ablations.py` for a CPU."""

from __future__ import annotations

from functools import partial

from ..ablations import Binding, Optimization, loss_by_halves, rebound, textbook_adamw

ROOM = "kernels.cuda"


def _without_graph() -> list[Binding]:
    from ....models.training_step import TrainingStep

    return rebound("models.training_step", TrainingStep=partial(TrainingStep, graph=False))()


OPTIMIZATIONS = {
    "graph": Optimization(
        "models/training_step.py, kernels/cuda/graph.py",
        "The whole step is captured once and replayed: no Python, no launches from the host.",
        without=_without_graph,
    ),
    "triton": Optimization(
        "kernels/cuda/triton/",
        "One launch for a chain of operations; without it, launches of PyTorch.",
        without=rebound("kernels.cuda.triton", installed=lambda: False),
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
        without=loss_by_halves(ROOM, "ops"),
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
        without=textbook_adamw(ROOM),
    ),
}
