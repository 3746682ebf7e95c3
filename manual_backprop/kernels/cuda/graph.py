"""A whole step as one CUDA graph: what `kernels.replay` is on a CPU, of all that a step does, for each shape of it.

A graph makes the same launches with the same numbers and the same memory each time, without Python: so whatever changes
from step to step has to come in a tensor. It is captured after some steps that have run as they are, by which time all
is compiled and planned, and nothing is computed while it is: the step is its first replay.
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
MOST_GRAPHS = 4  # that are kept
MOST_SIGNATURES = 100  # that are counted, or known not to be capturable

Work = Callable[..., tuple[Tensor, ...]]


class Captured:
    """One graph, where its inputs are read, and where its results lie."""

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
        self.captured: dict[Hashable, Captured] = {}  # the last used one comes last
        self._seen: Counter[Hashable] = Counter()
        self._refused: set[Hashable] = set()
        self._pool: Any = None  # of memory: the graphs run one after the other

    def __call__(self, work: Work, inputs: Sequence[Tensor], signature: Hashable) -> tuple[Tensor, ...]:
        """work(*inputs), new tensors. `signature`: all that decides what `work` does, beside the inputs."""
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
        """Whether there is a graph now. Where there is none, the log says why and steps run as they are."""
        if len(self.captured) == MOST_GRAPHS:
            oldest = next(iter(self.captured))
            del self.captured[oldest], self._seen[oldest]
        torch.cuda.empty_cache()  # what the steps so far have left: a graph has memory of its own
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self.captured[key] = Captured(work, inputs, self._pool)
        except RuntimeError as error:  # what cannot be captured, or does not fit beside what is there
            self._refused.add(key)
            log.warning("the step runs without a CUDA graph, and waits for Python: %s", first_line(error))
            torch.cuda.empty_cache()
            return False
        return True
