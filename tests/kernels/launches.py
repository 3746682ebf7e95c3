"""Counts the kernel launches of some work on a GPU: many small launches, not arithmetic, bound the time of a small
step.

It counts calls of PyTorch's operators, except views and uninitialized memory, and each launch of a kernel of ours. An
operator may launch more than one kernel, but that is outside of this project.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manual_backprop.kernels.cuda.triton import LAUNCHES
from manual_backprop.kernels.replay import MEMORY


class Launches(TorchDispatchMode):
    """Counts launches by operator while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.counts.total()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        if not _only_looks(function, (args, kwargs), results):
            self.counts[str(function)] += LAUNCHES.get(function.overloadpacket.__name__, 1)
        return results


def _only_looks(function: Any, given: Any, results: Any) -> bool:
    """Whether a call computes nothing: it returns a view, a detached tensor, or uninitialized memory."""
    if function._schema.is_mutable:
        return False
    if function.overloadpacket.__name__ in MEMORY or function.namespace == "prim":  # memory, or a query
        return True
    before = {x.untyped_storage()._cdata for x in tree_leaves(given) if isinstance(x, Tensor)}
    made = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
    return bool(made) and all(x.untyped_storage()._cdata in before for x in made)


def launches(work: Callable[[], Any]) -> Counter[str]:
    """The launches of work() by operator; `.total()` is their sum."""
    with torch.no_grad(), Launches() as counted:
        work()
    return counted.counts
