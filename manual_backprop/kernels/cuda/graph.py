"""A whole step as one CUDA graph, for each shape of a step. `kernels.replay` does the same on a CPU.

A graph repeats the same launches with the same arguments and the same memory, without Python. So whatever changes from
step to step has to be in a tensor. A graph is captured after some eager steps, when everything is compiled and planned.
Capturing computes nothing: the step itself is the first replay.
"""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...common.errors import first_line
from ..replay import StepRecorder

log = logging.getLogger(__name__)

WARM_UP = 3  # steps of a signature before one is captured
MOST_GRAPHS = 4  # kept at once

Work = Callable[..., tuple[Tensor, ...]]


class Captured:
    """One graph with the memory of its inputs and of its results."""

    def __init__(self, work: Work, inputs: Sequence[Tensor], pool: Any, stream: torch.cuda.Stream):
        self.inputs = [x.clone() for x in inputs]
        with torch.cuda.device(stream.device):
            self.graph = torch.cuda.CUDAGraph()
            with _cleaned_up(pool), torch.cuda.graph(self.graph, pool=pool, stream=stream):
                self.results = work(*self.inputs)

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return tuple(result.clone() for result in self.results)


@contextmanager
def _cleaned_up(pool: Any) -> Iterator[None]:
    """Wraps a capture, and restores PyTorch's state if it fails, so that steps can continue without a graph.

    After a failure `torch.cuda.graph` leaves its own stream as the current one. If CUDA refuses to end the capture, as
    after a call that waits for the device, PyTorch's allocator still believes in it: it frees nothing more, and
    `empty_cache` is an internal error.
    """
    stream = torch.cuda.current_stream()
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        try:
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        except RuntimeError:  # it has ended
            pass
        else:
            torch._C._cuda_releasePool(stream.device_index, pool)
        raise


def _first_cause(error: Exception) -> Exception:
    """The error that made a capture fail. The error at its end says only that it failed."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error


class Graphs(StepRecorder):
    """Captures and replays the steps of one network on a GPU."""

    def __init__(self) -> None:
        super().__init__({}, WARM_UP)
        self._pool: Any = None  # of memory: the graphs run one after the other
        self._stream: torch.cuda.Stream | None = None  # on which they are captured, of the device of their inputs
        self.refusal = ""  # why the last one that was tried is not there

    def _record(self, work: Work, inputs: Sequence[Tensor], key: Hashable) -> tuple[Tensor, ...]:
        return self.recorded[key].replay(inputs) if self._capture(work, inputs, key) else work(*inputs)

    def _capture(self, work: Work, inputs: Sequence[Tensor], key: Hashable) -> bool:
        """Captures a graph and returns whether it succeeded. If not, the log says why, and steps run eagerly."""
        if len(self.recorded) == MOST_GRAPHS:
            self._drop_oldest()
        torch.cuda.empty_cache()  # free the cached memory of eager steps: a graph has its own
        try:
            if self._stream is None:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(inputs[0].device)
            self.recorded[key] = Captured(work, inputs, self._pool, self._stream)
            return True
        except RuntimeError as error:  # what cannot be captured, or does not fit beside what is there
            self._refused.add(key)
            self.refusal = first_line(_first_cause(error))
            log.warning("the step runs without a CUDA graph, and waits for Python: %s", self.refusal)
        torch.cuda.empty_cache()  # here, where the error no longer holds what the attempt has made
        return False
