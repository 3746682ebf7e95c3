"""A whole step as one CUDA graph, for each shape of a step. `kernels.replay` does the same on a CPU.

A graph repeats the same launches with the same arguments and the same memory, without Python. So whatever changes from
step to step has to be in a tensor. A graph is captured after some eager steps, when everything is compiled and planned.
Capturing computes nothing: the step itself is the first replay.
"""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...common.errors import first_line
from ..replay import is_observed

log = logging.getLogger(__name__)

WARM_UP = 3  # steps of a signature before one is captured
MOST_GRAPHS = 4  # kept at once
MOST_SIGNATURES = 100  # counted, or known not to be capturable

Work = Callable[..., tuple[Tensor, ...]]


class Captured:
    """One graph with the memory of its inputs and of its results."""

    def __init__(self, work: Work, inputs: Sequence[Tensor], pool: Any):
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.results = work(*self.inputs)

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return tuple(result.clone() for result in self.results)


class Graphs:
    """Captures and replays the steps of one network on a GPU."""

    def __init__(self) -> None:
        self.captured: dict[Hashable, Captured] = {}  # least recently used first
        self._seen: Counter[Hashable] = Counter()
        self._refused: set[Hashable] = set()
        self._pool: Any = None  # memory shared by all graphs, since they run one after the other

    def __call__(self, work: Work, inputs: Sequence[Tensor], signature: Hashable) -> tuple[Tensor, ...]:
        """work(*inputs), as new tensors. `signature`: everything besides the inputs that decides what `work` does."""
        if is_observed():
            return work(*inputs)
        key = signature, *[(x.shape, x.stride(), x.dtype, x.device) for x in inputs]
        if (found := self.captured.pop(key, None)) is not None:
            self.captured[key] = found
            return found.replay(inputs)
        if len(self._seen) > MOST_SIGNATURES:
            self._seen.clear()
            self._refused.clear()
        self._seen[key] += 1
        if self._seen[key] <= WARM_UP or key in self._refused or not self._capture(work, inputs, key):
            return work(*inputs)
        return self.captured[key].replay(inputs)

    def _capture(self, work: Work, inputs: Sequence[Tensor], key: Hashable) -> bool:
        """Captures a graph and returns whether it succeeded. If not, the log says why, and steps run eagerly."""
        if len(self.captured) == MOST_GRAPHS:
            oldest = next(iter(self.captured))
            del self.captured[oldest], self._seen[oldest]
        torch.cuda.empty_cache()  # free the cached memory of eager steps: a graph has its own
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self.captured[key] = Captured(work, inputs, self._pool)
        except RuntimeError as error:  # a call that cannot be captured, or not enough memory
            self._refused.add(key)
            log.warning("the step runs without a CUDA graph, and waits for Python: %s", first_line(error))
            torch.cuda.empty_cache()
            return False
        return True
