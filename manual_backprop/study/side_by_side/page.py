"""What the page shows: every function of the network and every pair of the calculus, beside its mirror.

How it is written: `markdown`, `html`.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import ops
from ...models.custom import CustomTransformer
from ...models.mirror import TorchTransformer
from ..gradient_check import ROWS
from .alignment import Row, aligned, backward_rows, line_by_line
from .recorded import Recorded, recorded
from .statements import Statement, statements_of

COMMAND = "python -m manual_backprop.tools.side_by_side"
PACKAGE = Path(__file__).resolve().parents[2]
INTRODUCTION = (
    f"`{COMMAND}` writes this page from the sources: no line of code on it is typed in. On the left is the network by "
    "hand, on the right the same one under autograd, statement beside statement. Docstrings, and statements that only "
    "record activations, are left out; each statement is on one line, however many it has in its file.",
    "In the forward pass both sides are the same. The left one also keeps a *cache* of what its backward will need. "
    "Under *backward* the right side has no code, since autograd has kept the graph and traverses it. There the right "
    "column names the forward statement that autograd differentiates at this point: the one whose cache the left "
    "side reads. A statement with nothing beside it is bookkeeping that autograd does too: to unpack caches, to go "
    "through the blocks in reverse, to add up gradients that arrive on two paths. If the mirror computes a pair in "
    "several statements, none of them is named.",
)
NETWORK = (
    "First the functions of the network. They only call pairs, and add up gradients; the calculus is inside the pairs, "
    "below."
)
PAIRS = (
    "Then the calculus, pair by pair. The mirror is the function with which the gradient check compares the pair. Its "
    "statements differ, so it is beside the forward as a whole. Under *backward* the right column has the nodes "
    "of autograd's graph, in the order in which its backward pass runs them; those that only move numbers (views, "
    "transpositions, copies) are counted.",
    "*Kept* counts the numbers that stay in memory from forward to backward, parameters left out, at the first case of "
    "the pair in the gradient check's table: by hand, and by autograd. A pair that is made of others keeps what they "
    "keep. Where ours keeps less, its backward recomputes the rest.",
)


@dataclass(frozen=True)
class Section:
    title: str
    about: str  # the first sentence of the docstring
    files: tuple[str, str]  # below the package: by hand, and the mirror
    forward: list[Row]
    backward: list[Row]
    recorded: Recorded | None = None  # of a pair

    @property
    def note(self) -> str:
        """The heading above a pair's backward in the right column: moves, and the numbers kept."""
        found = self.recorded
        if found is None:
            return ""
        moved = f"; {found.moves} nodes that move numbers" if found.moves else ""
        return f"{moved}; kept: {found.kept_by_hand} by hand, {found.kept_by_autograd} by autograd"

    def statements(self) -> tuple[int, int]:
        """The numbers of statements by hand and under autograd."""
        rows = self.forward + self.backward
        by_autograd = self.forward if self.recorded else rows  # beside a pair's backward are names of nodes
        return sum(row.hand is not None for row in rows), sum(row.autograd is not None for row in by_autograd)


@dataclass(frozen=True)
class Page:
    network: list[Section]
    pairs: list[Section]
    torch: str  # the version, on which the names of the nodes depend

    @property
    def sections(self) -> list[Section]:
        return self.network + self.pairs


def made_page() -> Page:
    version = ".".join(torch.__version__.split(".")[:2])
    return Page(
        [_of_network(name) for name in mirrored(TorchTransformer)], [_of_pair(name) for name in in_order()], version
    )


def mirrored(network: type) -> list[str]:
    """The functions of a class, in the order of its file."""
    return [name for name, function in vars(network).items() if inspect.isfunction(function)]


def in_order() -> list[str]:
    """The pairs, in the order in which `ops` says that a network uses them."""
    of_file: dict[str, list[str]] = {}
    for name in ROWS:
        file = getattr(ops, f"{name}_forward").__module__.rpartition(".")[2]
        of_file.setdefault(file, []).append(name)
    files = re.findall(r"\b\w+\b", (ops.__doc__ or "").partition("uses them:")[2])
    return [name for file in dict.fromkeys(file for file in files if file in of_file) for name in of_file[file]]


def _of_network(name: str) -> Section:
    by_hand, mirror = getattr(CustomTransformer, name), getattr(TorchTransformer, name)
    forward, backward = statements_of(by_hand), []
    if name.endswith("_forward"):
        backward = statements_of(getattr(CustomTransformer, f"{name.removesuffix('_forward')}_backward"))
    else:  # a whole step holds forward and backward
        calls = [place for place, statement in enumerate(forward) if "_backward(" in statement.text]
        turn = min(calls, default=len(forward))
        forward, backward = forward[:turn], forward[turn:]
    rows, files = aligned(forward, statements_of(mirror)), (_file_of(by_hand), _file_of(mirror))
    return Section(name, _first_sentence(by_hand), files, rows, backward_rows(backward, rows))


def _of_pair(name: str) -> Section:
    forward, backward = getattr(ops, f"{name}_forward"), getattr(ops, f"{name}_backward")
    mirror, found = ROWS[name].mirror, recorded(name)
    return Section(
        name,
        _first_sentence(forward),
        (_file_of(forward), _file_of(mirror)),
        line_by_line(statements_of(forward), statements_of(mirror)),
        line_by_line(statements_of(backward), [Statement(node) for node in found.nodes]),
        found,
    )


def _first_sentence(function: Callable[..., Any]) -> str:
    """The first paragraph of the docstring, without the shapes that follow it."""
    first = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
    return first if not first or first.endswith(".") else f"{first}."


def _file_of(function: Callable[..., Any]) -> str:
    return Path(inspect.getfile(function)).resolve().relative_to(PACKAGE).as_posix()
