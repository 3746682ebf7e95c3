"""What autograd records when a mirror runs, and what is kept for the backward pass: by autograd, and by hand."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ... import ops
from ..gradient_check import ROWS, Draw, cases_of
from ..gradient_check.op_check import call

# Nodes that compute nothing: numbers get another shape, order or place.
MOVES = re.compile(
    r"(Reshape|ReshapeAlias|View|UnsafeView|Permute|Transpose|T|Unsqueeze|Squeeze|Clone|Split|Slice|Select|Unbind|Cat|"
    r"Stack|Expand|ViewAsReal|Complex)Backward\d"
)


@dataclass(frozen=True)
class Recorded:
    """Autograd's nodes for one pair at one case, and the numbers kept for backward, in whole tensors, without
    parameters."""

    nodes: tuple[str, ...]  # the nodes that compute, in the order in which autograd's backward pass runs them
    moves: int  # the number of nodes that only move numbers
    kept_by_hand: int  # numbers
    kept_by_autograd: int  # numbers


def recorded(name: str) -> Recorded:
    """Runs the pair `name` and its mirror at the first case of its row in the table of the gradient check."""
    row = ROWS[name]
    case = cases_of(row, Draw(torch.Generator().manual_seed(0)))[0]
    _, cache = call(row, case, ops)
    leaves = {k: x.detach().clone().requires_grad_() for k, x in (case.inputs | case.parameters).items()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = row.named(row.mirror(**leaves, **case.settings))
    nodes = _nodes(outputs.values())
    computing = [node for node in nodes if not MOVES.fullmatch(node)]
    cached = [part for part in tree_leaves(cache) if isinstance(part, Tensor)]
    kept_by_hand = _numbers(cached, list(case.parameters.values()))
    kept_by_autograd = _numbers(saved, [leaves[k] for k in case.parameters])
    return Recorded(tuple(computing), len(nodes) - len(computing), kept_by_hand, kept_by_autograd)


def _numbers(tensors: list[Tensor], parameters: list[Tensor]) -> int:
    """The numbers in the memory that these tensors keep alive; of views of one memory, all of that memory once."""
    there = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // x.element_size() for x in tensors}
    for parameter in parameters:
        there.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(there.values())


def _nodes(outputs: Iterable[Tensor]) -> list[str]:
    """The nodes that compute, without those that only add into a leaf's gradient."""
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    found: dict[Any, int] = {}
    while waiting:
        node = waiting.pop()
        if node not in found and "AccumulateGrad" not in node.name():
            found[node] = node._sequence_nr()
            waiting += [before for before, _ in node.next_functions if before is not None]
    return [node.name() for node in sorted(found, key=lambda node: -found[node])]
