"""Traces the network's functions: every statement that runs, and every tensor that it binds to a name.

It is a line tracer over `ops/` and `models/custom.py`, and the record that it fills: calls, their steps, and the values
of names. It changes nothing and knows no calculus; `autograd.py` computes what the numbers should be.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

PACKAGE = Path(__file__).resolve().parents[2]
NETWORKS = {PACKAGE / "models" / name for name in ("custom.py", "custom_encoders.py", "step.py")}
ROOTS = ("_training_step", "loss_by_autograd")


@dataclass
class Statement:
    """One statement of the source: its lines, and the comment lines right above it."""

    node: ast.stmt
    source: list[str]
    comment: list[str]

    @property
    def targets(self) -> list[str]:
        """The names that it binds, or writes into: `a, (b, c) = ...`, `a += ...`, `a[...] += ...`, `a.copy_(...)`,
        `linear_backward(..., dx=a)`."""
        node = self.node
        if isinstance(node, ast.Assign):
            return [part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)]
        written: ast.expr | None = node.target if isinstance(node, ast.AugAssign) else None
        match node:
            case ast.Expr(ast.Call(ast.Attribute(owner, method), _, keywords)):
                total = next((word.value for word in keywords if word.arg == "dx"), None)
                written = owner if method.endswith("_") else total
        if isinstance(written, ast.Subscript):
            written = written.value
        return [written.id] if isinstance(written, ast.Name) else []

    @property
    def writes_in_place(self) -> bool:
        return isinstance(self.node, ast.AugAssign | ast.Expr)

    def continues(self, name: str) -> bool:
        """Whether it updates the value of `name`: in place, or as a term of a sum (`dx = dx + ...`).

        A statement that only passes the name to a call (`dx = dropout_backward(dx, ...)`) gives it a new value.
        """
        if self.writes_in_place:
            return name in self.targets
        value = getattr(self.node, "value", None)
        return isinstance(value, ast.BinOp) and isinstance(value.left, ast.Name) and value.left.id == name

    @property
    def makes_empty(self) -> bool:
        """Whether it allocates memory that is filled, or added to, later."""
        return any(word in line for line in self.source for word in ("torch.empty", "torch.zeros_like"))


@dataclass(eq=False)
class Value:
    """The tensor that a name was bound to after a statement."""

    name: str
    tensor: Tensor  # the object itself, kept alive so that its id and address stay unique
    copy: Tensor  # its numbers at that moment
    key: tuple  # equal keys mean the same numbers in the same order, so that a view of a whole tensor is not new
    added: Tensor | None = None  # what the function has added so far, if the tensor is a buffer that was passed in
    meaningful: bool = True  # False: allocated at this statement and filled through views of it later
    node: Tensor | None = None  # autograd's node for this name from here on
    forward: Value | None = None  # the value whose gradient it is, if it is one
    part: bool = False  # a partial gradient that a later statement completes
    upstream: Tensor | None = None  # autograd's gradient of what the forward function returned here

    @property
    def numbers(self) -> Tensor:
        return self.copy if self.added is None else self.added

    @property
    def autograd(self) -> Tensor | None:
        if self.upstream is not None:
            return self.upstream
        if self.forward is None or self.forward.node is None or self.forward.node.grad is None:
            return None
        return self.forward.node.grad.reshape(self.copy.shape)

    @property
    def difference(self) -> float | None:
        """The largest difference, over all elements, between the numbers by hand and autograd's."""
        return None if self.part or self.autograd is None else float((self.numbers - self.autograd).abs().max())


@dataclass(eq=False)
class Step:
    """One executed statement: its calls, and the values that it bound."""

    statement: Statement
    calls: list[Call] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class Call:
    """One call of a traced function."""

    function: str
    path: Path
    parameters: dict[str, Value]
    passed: list[str]  # names of all parameters, in order
    steps: list[Step] = field(default_factory=list)
    outputs: list[Tensor | None] = field(default_factory=list)  # what it returned, without the cache
    outcome: Value | None = None  # the one tensor that it returned, with its numbers
    pair: Call | None = None  # the forward of this backward, as autograd saw it

    @property
    def base(self) -> str:
        return self.function.removesuffix("_forward").removesuffix("_backward")

    @property
    def backward(self) -> bool:
        return self.function.endswith("_backward")

    @property
    def calls(self) -> list[Call]:
        return [call for step in self.steps for call in step.calls]

    @property
    def upstream(self) -> list[str]:
        """The arguments of a backward that are gradients of its forward's results."""
        before = self.passed[: self.passed.index("cache")] if self.backward else []
        return [name for name in before if name.startswith("d")]

    @property
    def buffers(self) -> list[str]:
        """The arguments of a backward into which it adds gradients of the network's parameters."""
        after = self.passed[self.passed.index("cache") + 1 :] if self.backward else []
        return [name for name in after if name in self.parameters]

    @property
    def docstring(self) -> str:
        """The function's docstring without its example: the page has numbers of its own."""
        tree = ast.parse(self.path.read_text(encoding="utf-8"))
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == self.function]
        text, _, _ = (ast.get_docstring(nodes[0]) or "").partition("\n\n>>> ")
        return text

    def bound(self, name: str) -> list[Value]:
        """Every value of a local name in order of execution, the argument first."""
        return [value for value in self.values() if value.name == name]

    @property
    def gradients(self) -> list[Value]:
        """The values of the call that were compared with autograd."""
        values = [*self.values(), self.outcome] if self.outcome is not None else self.values()
        return [value for value in values if value.difference is not None]

    def values(self) -> list[Value]:
        """The call's arguments, then the values that its statements bound."""
        return [*self.parameters.values(), *(value for step in self.steps for value in step.values)]

    def names(self) -> set[str]:
        return {value.name for value in self.values()}

    def walk(self) -> Iterator[Call]:
        yield self
        for call in self.calls:
            yield from call.walk()


@functools.cache
def statements(path: Path) -> dict[int, Statement]:
    """Line number -> the innermost statement on that line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[int, Statement] = {}
    for node in ast.walk(ast.parse("\n".join(lines))):  # parents come before their children, which overwrite them
        if not isinstance(node, ast.stmt) or isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        body = getattr(node, "body", None)
        last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
        first = above = node.lineno - 1
        while above and lines[above - 1].lstrip().startswith("#"):
            above -= 1
        indent = node.col_offset
        source, comment = ([line[indent:] for line in part] for part in (lines[first:last], lines[above:first]))
        found |= dict.fromkeys(range(node.lineno, last + 1), Statement(node, source, comment))
    return found


def is_traced(code: CodeType) -> bool:
    path = Path(code.co_filename)
    return code.co_name in ROOTS or (
        code.co_name.endswith(("_forward", "_backward")) and (path.parent == PACKAGE / "ops" or path in NETWORKS)
    )


def key_of(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.numel(), tensor.is_contiguous(), tensor._version


class Tracer:
    """`with Tracer() as tracer:` records the traced function that is called inside in `tracer.root`.

    With `nodes`, every tensor that requires grad and is bound to a name is replaced by a view of itself: a node of
    autograd's graph that belongs to this name alone.
    """

    def __init__(self, nodes: bool = False):
        self.nodes = nodes
        self.root: Call | None = None
        self.received: dict[int, Value] = {}  # id of a returned tensor -> the caller's name for it
        self._stack: list[tuple[Call, dict[str, Tensor]]] = []
        self._empty: set[int] = set()  # addresses of storages that were allocated and not filled

    def __enter__(self) -> Tracer:
        self._previous = sys.gettrace()
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(self._previous)

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Callable | None:
        code = frame.f_code
        if event != "call" or not is_traced(code):
            return None
        variables = frame.f_locals
        passed = list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
        parameters = {name: self._value(variables, name) for name in passed if isinstance(variables[name], Tensor)}
        call = Call(code.co_name, Path(code.co_filename), parameters, passed)
        if self._stack:
            self._stack[-1][0].steps[-1].calls.append(call)
        else:
            assert self.root is None, "one step at a time"
            self.root = call
        # the numbers of passed buffers before the call, to compute what += adds to them
        self._stack.append((call, {name: value.copy for name, value in parameters.items()}))
        return self._on_line

    def _on_line(self, frame: FrameType, event: str, argument: Any) -> Callable:
        call, buffers = self._stack[-1]
        if event == "line":
            statement = statements(call.path)[frame.f_lineno]
            if not call.steps or call.steps[-1].statement is not statement:
                self._complete(call, buffers, frame)
                call.steps.append(Step(statement))
        elif event == "return":
            self._stack.pop()
            if not isinstance(call.steps[-1].statement.node, ast.Return):  # the end of a function that returns nothing
                self._complete(call, buffers, frame)
            for value in (value for step in call.steps for value in step.values if not value.meaningful):
                value.copy = value.tensor.detach().clone()
            for name in call.buffers:
                value = call.parameters[name]
                value.added = value.tensor.detach() - buffers[name]
            outputs = argument[:-1] if call.function.endswith("_forward") else argument  # without the cache
            call.outputs = [output for output in tree_leaves(outputs) if output is None or isinstance(output, Tensor)]
            tensors = [output for output in call.outputs if output is not None]
            if len(tensors) == 1:
                call.outcome = Value("", tensors[0], tensors[0].detach().clone(), key_of(tensors[0]))
                given = next((name for name in call.buffers if call.parameters[name].tensor is tensors[0]), None)
                call.outcome.added = call.parameters[given].added if given else None
        return self._on_line

    def _complete(self, call: Call, buffers: dict[str, Tensor], frame: FrameType) -> None:
        """Records what the last statement bound; called when the next one begins."""
        if not call.steps:
            return
        step, variables = call.steps[-1], frame.f_locals
        statement = step.statement
        for name in dict.fromkeys(statement.targets):
            bound = variables.get(name)
            if isinstance(bound, float):
                step.scalars[name] = bound
            if not isinstance(bound, Tensor):
                continue
            if statement.makes_empty:
                self._empty.add(bound.untyped_storage().data_ptr())
            value = self._value(variables, name)
            value.meaningful = statement.writes_in_place or bound.untyped_storage().data_ptr() not in self._empty
            if statement.writes_in_place and name in buffers:
                value.added = value.copy - buffers[name]
            step.values.append(value)

    def _value(self, variables: dict[str, Any], name: str) -> Value:
        tensor = variables[name]
        value = Value(name, tensor, tensor.detach().clone(), key_of(tensor))
        if self.nodes and tensor.requires_grad:
            node = tensor.view_as(tensor)
            node.retain_grad()
            value.tensor = value.node = variables[name] = node
        self.received[id(tensor)] = value
        return value
