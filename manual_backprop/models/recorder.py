"""Records intermediate tensors of a step: copies of activations and gradients whose names match a pattern."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import Tensor

from ..ops.numerics import Record, no_record


class Recorder:
    """`network.recorder = Recorder("blocks.0.*")` keeps what the next steps record under a matching name.

    An activation has its name in the network (`blocks.0.attention.probabilities`); its gradient has the same name with
    a d before the last part (`blocks.0.attention.dprobabilities`). A later step overwrites an earlier one. Recording
    changes no bit of the step.
    """

    def __init__(self, *patterns: str):
        self.patterns = patterns or ("*",)
        self.tensors: dict[str, Tensor] = {}

    def wants(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def __call__(self, name: str, tensor: Tensor) -> None:
        if self.wants(name):
            self.tensors[name] = tensor.detach().clone()


class Scoped:
    """A recorder that passes everything to `record`, with `scope` before every name."""

    def __init__(self, record: Record, scope: str):
        self.record, self.scope = record, scope

    def wants(self, name: str) -> bool:
        return self.record.wants(self.scope + name)

    def __call__(self, name: str, tensor: Tensor) -> None:
        self.record(self.scope + name, tensor)


def gradient_name(name: str) -> str:
    """blocks.0.attention.context -> blocks.0.attention.dcontext"""
    scope, dot, last = name.rpartition(".")
    return f"{scope}{dot}d{last}"


def scoped(record: Record, scope: str) -> Record:
    """`record` with `scope` before every name; the null recorder itself where nothing is recorded."""
    return no_record if record is no_record else Scoped(record, scope)
