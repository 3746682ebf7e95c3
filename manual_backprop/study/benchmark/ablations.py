"""The optimizations of the kernels, each with what it saves and its ablation, so that its effect can be measured.

An ablation rebinds names in a process: a pair of `kernels` to the pair of `ops` with the same name, or a shared
function or constant to a version without the optimization. The result is a whole training step with the same gradients,
which the bench compares before it times anything.

A new optimization is a new entry of OPTIMIZATIONS. Torch is imported only when something is ablated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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

PACKAGE = "manual_backprop"
WITHOUT = f"{SUBJECT} without "  # before an optimization's name: the name of a row

Binding = tuple[ModuleType, str, Any]  # a module, a name in it, and the object to bind to it


@dataclass(frozen=True)
class Optimization:
    """An optimization: its pairs of kernels, and the other names that its ablation rebinds."""

    place: str  # its files in the package
    about: str  # what it saves, and why
    pairs: tuple[str, ...] = ()  # always replaced as a pair, since a cache is private to it
    without: Callable[[], list[Binding]] = list
    applies: Callable[[Case], bool] = lambda case: True
    room: str = "kernels"  # the folder that contains the pairs

    def bindings(self) -> list[Binding]:
        """The bindings that undo it in this process."""
        from ... import ops

        halves = [f"{pair}_{way}" for pair in self.pairs for way in ("forward", "backward")]
        return rebound(self.room, **{half: getattr(ops, half) for half in halves})() + self.without()


# Ways to undo an optimization


def _shared(**values: Any) -> Callable[[], list[Binding]]:
    """Bindings of a name in all kernels that import it."""

    def bindings() -> list[Binding]:
        from ... import kernels

        modules = [module for name, module in sys.modules.items() if name.startswith(f"{kernels.__name__}.")]
        found = [(module, name, value) for name, value in values.items() for module in modules if hasattr(module, name)]
        assert {name for _, name, _ in found} == values.keys(), f"no kernel knows one of {', '.join(values)}"
        return found

    return bindings


def rebound(module: str, **values: Any) -> Callable[[], list[Binding]]:
    """Bindings of names in one module of the package."""
    return lambda: [(import_module(f"{PACKAGE}.{module}"), name, value) for name, value in values.items()]


# The replacements


def loss_by_halves(room: str, halves: str) -> Callable[[], list[Binding]]:
    """Bindings of a room's `linear_cross_entropy` to a forward and then a backward, which are those of `halves`."""

    def bindings() -> list[Binding]:
        from ...ops.numerics import no_record

        pair = import_module(f"{PACKAGE}.{halves}")

        def linear_cross_entropy(
            *inputs: Any, padding: int | None = None, dloss: float | Tensor = 1.0, record: Any = no_record
        ) -> tuple[Tensor, Tensor]:
            *given, dweight = inputs
            loss, cache = pair.linear_cross_entropy_forward(*given, padding, record=record)
            return loss, pair.linear_cross_entropy_backward(dloss, cache, dweight, record=record)

        return rebound(room, linear_cross_entropy=linear_cross_entropy)()

    return bindings


def _in_one_piece() -> list[Binding]:
    from ...kernels import sizes

    return [(sizes, "SIZES", {device: replace(own, piece=sys.maxsize) for device, own in sizes.SIZES.items()})]


def _allocated(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_empty(shape)


@contextmanager
def _allocated_scratch(shape: tuple[int, ...], like: Tensor) -> Iterator[Tensor]:
    yield like.new_empty(shape)


def _without_recomputation() -> list[Binding]:
    """Recomputed tensors are in a ping-pong buffer, but the cache of a textbook pair keeps the tensor itself: so
    nothing is recomputed."""
    from ...kernels.arena import kept

    return _shared(ping_pong=kept)()


def _product_then_sum(total: Tensor, left: Tensor, right: Tensor) -> None:
    total += left @ right.to(left.dtype)


def _is_replayed(case: Case) -> bool:
    from ...kernels import is_replayable

    return is_replayable(case.tokens * case.config.d_model, case.config.dropout, case.config.device)


def _run(work: Callable[..., Tensor], inputs: Sequence[Any], signature: Any) -> Tensor:
    return work(*inputs)


_without_replay = rebound("kernels", Replay=lambda arena, around: _run)


def textbook_adamw(room: str) -> Callable[[], list[Binding]]:
    """Bindings of a room's AdamW to the textbook's."""

    def bindings() -> list[Binding]:
        from ...optim.optimizers import AdamW

        return rebound(f"{room}.optimizers", AdamW=AdamW)()

    return bindings


def _adamw_tensor_by_tensor() -> list[Binding]:
    import torch

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

    return rebound("kernels.cpu.optimizers", AdamW=optimizer)()


OPTIMIZATIONS = {
    # pairs
    "chunked-loss": Optimization(
        "kernels/cpu/loss.py",
        "A chunk of rows gives logits, their loss and, in the same memory, softmax - q up to a factor per row; its "
        "parts of dx and dW follow at once. So the forward pass computes the gradient, with one exponential per "
        "logit: no tensor of N V numbers is kept or read again, and a chunk stays in the cache through all of its "
        "passes.",
        pairs=("linear_cross_entropy",),
        without=loss_by_halves("kernels", "kernels"),
    ),
    "tiled-attention": Optimization(
        "kernels/cpu/attention.py, cpp/attention.h",
        "Scores are computed for a block of queries and only the keys that it may see, so the part above the diagonal "
        "is neither multiplied nor normalized: nearly half of the work at long T. A head's tile goes through its "
        "softmax and into the next product while it is in the cache. Instead of the probabilities one number per query "
        "is kept, from which backward recomputes them: B H T^2 numbers less in each block. The textbook pair keeps "
        "query, key and value themselves, so without this optimization they are not recomputed either.",
        pairs=("self_attention", "rotary_attention"),
        without=_without_recomputation,
    ),
    "norm-by-rows": Optimization(
        "kernels/cpu/normalization.py",
        "One call computes sum, statistics and output of the rows and reads them three times; another one computes dx, "
        "dweight and dbias. The textbook pair allocates a tensor for every line of its formula. The cache keeps the "
        "sum and two numbers per row.",
        pairs=("layer_norm", "residual_layer_norm", "residual_rms_norm"),
    ),
    "feed-forward": Optimization(
        "kernels/cpu/feed_forward.py, gated_feed_forward.py",
        "Bias and activation are one pass. In backward the activation's derivative and its recomputed value are one "
        "pass too. One tensor of N F numbers is kept, the hidden layer before its bias; the textbook pair keeps two "
        "and allocates several more.",
        pairs=("feed_forward", "gated_feed_forward"),
        without=_without_recomputation,
    ),
    "linear": Optimization(
        "kernels/cpu/linear.py",
        "The product dy^T x is added directly to the gradient, dx overwrites x, and the norm's output and query, key "
        "and value are recomputed in backward: the optimizations below, in this pair alone. It is kept for the memory "
        "that it saves: without it a large step takes up to a tenth less time.",
        pairs=("linear",),
        without=_without_recomputation,
    ),
    "token-embedding": Optimization(
        "kernels/cpu/embedding.py",
        "It adds only to the rows of tokens that occur. The textbook pair first allocates a table of V D zeros and "
        "then adds all of it: two passes over the largest parameter.",
        pairs=("token_embedding",),
    ),
    # what several pairs share
    "arena": Optimization(
        "kernels/arena.py",
        "A step asks for the same tensors as the step before, in the same order, and gets the same memory: no "
        "allocation, no page faults, no fragmentation. In this measurement, as in a run, the C library keeps freed "
        "memory. Otherwise, and for blocks above 32 MB, which it always returns, the difference is larger.",
        without=lambda: (
            _shared(kept=_allocated, ping_pong=_allocated, scratch=_allocated_scratch)() + _without_replay()
        ),
    ),
    "replay": Optimization(
        "kernels/replay.py",
        "The calls of a small network's step are recorded, with the memory they read and write, and replayed: "
        "no Python between them, no views. Larger steps are not recorded.",
        without=_without_replay,
        applies=_is_replayed,
    ),
    "gradients-in-place": Optimization(
        "kernels/arena.py",
        "A gradient has the shape of its tensor and is computed when the tensor is read for the last time, so it "
        "overwrites the tensor; a residual sum overwrites its branch. Autograd cannot know that an activation is not "
        "read again.",
        without=_shared(in_place_of=lambda x: x.new_empty(x.shape)),
    ),
    "made-again": Optimization(
        "kernels/arena.py",
        "Backward reads a norm's output, and query, key and value, once more, and they can be recomputed from tensors "
        "that are kept anyway. Caches keep a function that recomputes them: 5 N D numbers less in each block, for two "
        "passes over rows and one product. It is kept for this memory: it costs up to a tenth of a large step's time.",
        without=lambda: _shared(saved=lambda x: x)() + _without_recomputation(),
    ),
    "rows-at-a-time": Optimization(
        "kernels/pieces.py, cpu/feed_forward.py, cpu/gated_feed_forward.py",
        "The activated hidden layer and its gradient are computed for some rows at a time, and freed after their "
        "products: a few million numbers instead of N F of each, which stay in the cache from one product to the next.",
        without=_in_one_piece,
    ),
    "added-products": Optimization(
        "kernels/cpu/products.py",
        "dW += dy^T x is one call: no tensor of the weight's size, and no two passes to write and add it. PyTorch's is "
        "`addmm` with beta = 1; in bf16_mixed, where the gradient is wider than the product, it is computed for some "
        "rows at a time and added while it is in the cache.",
        without=_shared(add_product=_product_then_sum),
    ),
    "own-products": Optimization(
        "kernels/cpu/cpp/products.h",
        "Products of linear layers are the library's own on processors that multiply bfloat16 numbers in vectors and "
        "have no matrix registers. There PyTorch's lose time in small products, in those with a bias, and in dW.",
        without=rebound("kernels.cpu.products", _in_library=lambda *_: False, rounds_weights=lambda *_: False),
        applies=lambda case: case.config.device == "cpu",
    ),
    "onednn": Optimization(
        "kernels/cpu/products.py",
        "float32 products on a CPU use oneDNN instead of MKL, which leaves half of the speed unused on processors that "
        "are not from Intel. This applies only if oneDNN computes in full float32 precision, which is measured once. "
        "It matters where the library has no products of its own.",
        without=rebound("kernels", fastest_products=nullcontext),
        applies=lambda case: case.config.precision == "fp32" and case.config.device == "cpu",
    ),
    "compiled": Optimization(
        "kernels/cpu/compiled.py",
        "Formulas that are neither a product nor one pass of PyTorch become one loop over their tensors in C++, "
        "compiled once per machine, and so do products where that is faster. Uncompiled, every operation reads and "
        "writes memory.",
        without=lambda: (
            rebound("kernels", compiled_functions=lambda wanted: nullcontext())()
            + rebound("kernels.cpu.products", rounds_weights=lambda *_: False)()
        ),
    ),
    "fused-adamw": Optimization(
        "kernels/cpu/optimizers.py",
        "One loop clips, decays, updates both moments and the parameter, and writes each number once; another loop "
        "sums the squares of the gradient. The update is bound by memory. The textbook version reads the moments "
        "several times and allocates a tensor for each intermediate result.",
        without=textbook_adamw("kernels.cpu"),
    ),
    "flat-buffers": Optimization(
        "optim/parameters.py, optimizers.py",
        "Parameters, gradients and moments are one buffer each: one norm, one pass over the parameters with weight "
        "decay and one over the rest. Without it, PyTorch's fused AdamW and clipping run parameter by parameter, as in "
        "the peers, which is as fast on a CPU. What needs the buffers is a sharded optimizer and a CUDA graph.",
        without=_adamw_tensor_by_tensor,
        applies=lambda case: case.config.precision != "bf16",  # PyTorch's moments would be bf16: another optimizer
    ),
}


@contextmanager
def ablated(optimization: Optimization) -> Iterator[None]:
    """A context in which networks are built and steps run without the optimization."""
    bindings = optimization.bindings()
    before = [(module, name, getattr(module, name)) for module, name, _ in bindings]
    try:
        for module, name, value in bindings:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def work(
    end: Connection,
    name: str,
    case: Case,
    optimizations: Mapping[str, Optimization] = OPTIMIZATIONS,
    subject: str = SUBJECT,
) -> None:
    """`rows.work` for a row of the bench, or for the subject without one optimization."""
    if not name.startswith(WITHOUT):
        return rows.work(end, name, case)
    rows.prepare(subject, case)  # first, as in every row: an ablation imports torch
    with ablated(optimizations[name.removeprefix(WITHOUT)]):
        return rows.work(end, subject, case)
