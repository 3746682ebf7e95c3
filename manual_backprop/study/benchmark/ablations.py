"""The optimizations of the kernels, each with what it saves and its ablation, so that it can be measured alone.

An ablation binds names of a process anew: a pair of `kernels` to the reference's of the same name, a function or a
number that several kernels share to what they would do without it. What is left is a whole training step with the same
gradients, which the bench compares before it times anything.

A new optimization is a new entry of OPTIMIZATIONS. Imports torch only where something is ablated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing.connection import Connection
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import rows
from .cases import SUBJECT, Case

if TYPE_CHECKING:
    from torch import Tensor

WITHOUT = f"{SUBJECT} without "  # before an optimization's name: the name of a row

Binding = tuple[ModuleType, str, Any]  # a module, a name in it, and what the name stands for


@dataclass(frozen=True)
class Optimization:
    """Pairs of the kernels, and whatever else has to be bound anew."""

    place: str  # the files of the package that it lives in
    about: str  # what is saved, and why
    pairs: tuple[str, ...] = ()  # replaced whole, since a cache is private to its pair
    without: Callable[[], list[Binding]] = list
    applies: Callable[[Case], bool] = lambda case: True
    room: str = "manual_backprop.kernels"  # which the pairs are looked up in

    def bindings(self) -> list[Binding]:
        """The bindings that undo it in this process."""
        from ... import ops

        room = import_module(self.room)
        halves = [f"{pair}_{way}" for pair in self.pairs for way in ("forward", "backward")]
        return [(room, half, getattr(ops, half)) for half in halves] + self.without()


# Ways to undo an optimization


def _shared(**values: Any) -> Callable[[], list[Binding]]:
    """Names that several kernels import, in each of them."""

    def bindings() -> list[Binding]:
        from ... import kernels

        modules = [module for name, module in sys.modules.items() if name.startswith(f"{kernels.__name__}.")]
        found = [(module, name, value) for name, value in values.items() for module in modules if hasattr(module, name)]
        assert {name for _, name, _ in found} == values.keys(), f"no kernel knows one of {', '.join(values)}"
        return found

    return bindings


def _without_bound(size: str) -> Callable[[], list[Binding]]:
    """A constant of every device (`kernels/sizes.py`), beyond all bounds."""

    def bindings() -> list[Binding]:
        from ...kernels import sizes

        unbounded = {device: replace(own, **{size: sys.maxsize}) for device, own in sizes.SIZES.items()}
        return [(sizes, "SIZES", unbounded)]

    return bindings


# What takes their places


def _loss_by_halves() -> list[Binding]:
    """The pair, one half after the other, behind the name of both at once."""
    from ... import kernels
    from ...ops.numerics import no_record

    def linear_cross_entropy(
        *inputs: Any, padding: int | None = None, dloss: float | Tensor = 1.0, record: Any = no_record
    ) -> tuple[Tensor, Tensor]:
        x, weight, targets, denominator, smoothing, dweight = inputs
        forward = kernels.linear_cross_entropy_forward
        loss, cache = forward(x, weight, targets, denominator, smoothing, padding, record=record)
        return loss, kernels.linear_cross_entropy_backward(dloss, cache, dweight, record=record)

    return [(kernels, "linear_cross_entropy", linear_cross_entropy)]


def _allocated(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_empty(shape)


@contextmanager
def _allocated_for_a_while(shape: tuple[int, ...], like: Tensor) -> Iterator[Tensor]:
    yield like.new_empty(shape)


def _without_recomputation() -> list[Binding]:
    """What is recomputed lives in a ping-pong buffer. A textbook's cache holds the tensor that it was given, which
    has to stay."""
    from ...kernels.arena import kept

    return _shared(ping_pong=kept)()


def _product_then_sum(total: Tensor, left: Tensor, right: Tensor) -> None:
    total += left @ right


def _is_replayed(case: Case) -> bool:
    from ...kernels import is_replayable

    return is_replayable(case.tokens * case.config.d_model, case.config.dropout, case.config.device)


def _library_of_pytorch() -> list[Binding]:
    from ... import kernels

    return [(kernels, "fastest_products", nullcontext)]


def _uncompiled() -> list[Binding]:
    from ... import kernels

    return [(kernels, "compiled_functions", lambda wanted: nullcontext())]


def _without_replay() -> list[Binding]:
    from ... import kernels

    def run(work: Callable[..., Tensor], inputs: Sequence[Any], signature: Any) -> Tensor:
        return work(*inputs)

    return [(kernels, "Replay", lambda arena: run)]


def _textbook_adamw() -> list[Binding]:
    from ...kernels.cpu import optimizers
    from ...optim.optimizers import AdamW

    return [(optimizers, "AdamW", AdamW)]


def _adamw_tensor_by_tensor() -> list[Binding]:
    import torch

    from ...kernels.cpu import optimizers
    from ...optim.parameters import Flat, Layout
    from ...optim.torch_optimizers import TorchOptimizer

    def optimizer(
        layout: Layout, parameters: Flat, gradients: Flat, weight_decay: float, betas: Any, epsilon: float
    ) -> TorchOptimizer:
        places = {}
        for name, view in parameters.views.items():
            place = torch.nn.Parameter(view)
            place.grad = gradients.views[name]
            places[name] = place, slice(None)
        moments = ("exp_avg", "exp_avg_sq")
        return TorchOptimizer(torch.optim.AdamW, places, weight_decay, {"betas": betas, "eps": epsilon}, moments)

    return [(optimizers, "AdamW", optimizer)]


OPTIMIZATIONS = {
    # pairs
    "chunked-loss": Optimization(
        "kernels/cpu/loss.py",
        "A chunk of rows becomes logits, their loss and, in the same memory, softmax - q but for a number a row; its "
        "parts of dx and dW are made at once. So the gradient is made in the forward pass, with one exponential a "
        "logit: no tensor of N V numbers is kept or read again, and a chunk stays near the processor through all of "
        "its passes.",
        pairs=("linear_cross_entropy",),
        without=_loss_by_halves,
    ),
    "tiled-attention": Optimization(
        "kernels/cpu/attention.py, cpp/attention.h",
        "Scores are made for a block of queries and only the keys that it may see, so that what is above the diagonal "
        "is neither multiplied nor normalized: nearly half of the work at long T. A head's tile goes through its "
        "softmax and into the next product while it is in the cache, and of the probabilities one number a query is "
        "kept, from which backward makes them again: B H T^2 numbers a block less. The textbook's pair holds query, "
        "key and value themselves, so without this optimization they are not recomputed either.",
        pairs=("self_attention", "rotary_attention"),
        without=_without_recomputation,
    ),
    "norm-by-rows": Optimization(
        "kernels/cpu/normalization.py",
        "Sum, statistics and output of the rows in one call that reads them three times; dx, dweight and dbias in "
        "another. The textbook's makes a tensor for every line of its formula. Kept are the sum and two numbers a row.",
        pairs=("layer_norm", "residual_layer_norm", "residual_rms_norm"),
    ),
    "feed-forward": Optimization(
        "kernels/cpu/feed_forward.py, gated_feed_forward.py",
        "Bias and activation are one pass, and so are the activation's derivative and its value, recomputed in "
        "backward from the hidden layer before its bias: one tensor of N F numbers is kept where the textbook keeps "
        "two and makes several on the way.",
        pairs=("feed_forward", "gated_feed_forward"),
        without=_without_recomputation,
    ),
    "linear": Optimization(
        "kernels/cpu/linear.py",
        "The product dy^T x is added where the gradient is kept, dx takes the place of x, and the norm's output and "
        "query, key and value are recomputed in backward: the optimizations below, in this pair alone. It is there for "
        "the memory: without it a large step takes a few percent less time.",
        pairs=("linear",),
        without=_without_recomputation,
    ),
    "token-embedding": Optimization(
        "kernels/cpu/embedding.py",
        "Adds only to the rows of the tokens that occur. The textbook makes a table of zeros of V D numbers first and "
        "adds all of it, two passes over the largest parameter.",
        pairs=("token_embedding",),
    ),
    # what several pairs share
    "arena": Optimization(
        "kernels/arena.py",
        "A step asks for the same tensors as the step before, in the same order, and gets the same memory: no "
        "allocation, no page fault, no holes. Here, as in a run, the C library keeps what is freed; without that and "
        "for blocks beyond 32 MB, which it gives back all the same, the difference is larger.",
        without=lambda: (
            _shared(kept=_allocated, ping_pong=_allocated, scratch=_allocated_for_a_while)() + _without_replay()
        ),
    ),
    "replay": Optimization(
        "kernels/replay.py",
        "The calls of a small network's step are recorded, with the memory they read and write, and replayed: "
        "no Python between them, no views. Larger steps run as they are.",
        without=_without_replay,
        applies=_is_replayed,
    ),
    "gradients-in-place": Optimization(
        "kernels/arena.py",
        "A gradient has the shape of its tensor and is made when that is read for the last time, so it is written "
        "over it, and a residual sum over its branch. Autograd cannot know that nobody reads an activation again.",
        without=_shared(in_place_of=lambda x: x.new_empty(x.shape)),
    ),
    "made-again": Optimization(
        "kernels/arena.py",
        "A norm's output, and query, key and value, are read once more in backward, and can be recomputed from what is "
        "kept anyway. Caches hold the function that does so instead: 5 N D numbers a block less, for two passes over "
        "rows and one product. It is there for the memory, and costs a few percent of a large step's time.",
        without=lambda: _shared(saved=lambda x: x)() + _without_recomputation(),
    ),
    "rows-at-a-time": Optimization(
        "kernels/pieces.py, cpu/feed_forward.py, cpu/gated_feed_forward.py",
        "The activated hidden layer and its gradient are made for some rows at a time, and are done with when their "
        "products are: a few million numbers in place of N F of each, which stay in the cache from one product to the "
        "next.",
        without=_without_bound("piece"),
    ),
    "added-products": Optimization(
        "kernels/cpu/products.py",
        "dW += dy^T x is one call, `addmm` with beta = 1: no tensor of the weight's size, and not the two passes that "
        "write it and add it. In bf16_mixed the gradient is wider than the product, which is made for some rows at a "
        "time and added while it is in the cache.",
        without=_shared(add_product=_product_then_sum),
    ),
    "onednn": Optimization(
        "kernels/cpu/products.py",
        "A float32 product on a CPU by oneDNN in place of MKL, which on processors that are not Intel's leaves half of "
        "their speed unused. Only where oneDNN keeps float32 exact, which is measured once.",
        without=_library_of_pytorch,
        applies=lambda case: case.config.precision == "fp32" and case.config.device == "cpu",
    ),
    "compiled": Optimization(
        "kernels/cpu/compiled.py",
        "What is neither a product nor one pass of PyTorch's becomes one loop over its tensors: on a CPU in C++, "
        "compiled once for a machine, on a GPU in Triton. As it is written, every operation reads and writes "
        "memory.",
        without=_uncompiled,
    ),
    "fused-adamw": Optimization(
        "kernels/cpu/optimizers.py",
        "One loop clips, decays, updates both moments and the parameter, and writes each number once; another one adds "
        "up the squares of the gradient. It is bound by memory, and the textbook's lines read the moments several "
        "times and make a tensor for each intermediate result.",
        without=_textbook_adamw,
    ),
    "flat-buffers": Optimization(
        "optim/parameters.py, optimizers.py",
        "Parameters, gradients and moments are one buffer each: one norm, and one pass over all that decays and one "
        "over the rest. Without: PyTorch's own fused AdamW and clipping, parameter by parameter, as the peers have "
        "them.",
        without=_adamw_tensor_by_tensor,
        applies=lambda case: case.config.precision != "bf16",  # PyTorch's moments would be narrow: another optimizer
    ),
}


@contextmanager
def ablated(optimization: Optimization) -> Iterator[None]:
    """Inside, networks that are built and steps that are made do without it."""
    bindings = optimization.bindings()
    before = [(module, name, getattr(module, name)) for module, name, _ in bindings]
    try:
        for module, name, value in bindings:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def work(end: Connection, name: str, case: Case) -> None:
    """`rows.work` for a row of the bench, or for the subject without an optimization."""
    if name.startswith(WITHOUT):
        rows.prepare(SUBJECT, case)  # first, as in every row: an ablation imports torch
        with ablated(OPTIMIZATIONS[name.removeprefix(WITHOUT)]):
            rows.work(end, SUBJECT, case)
    else:
        rows.work(end, name, case)
