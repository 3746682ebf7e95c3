"""A function as a list of statements, each on one line: what a reader compares with another function."""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

RECORDS = re.compile(r"(self\.recorder|self\._recording|record)\(|record = ")  # statements that only record


@dataclass(frozen=True)
class Statement:
    text: str  # on one line; of a compound statement only the first line
    within: tuple[str, ...] = ()  # the first lines of the compound statements around it, an else with its if
    comment: str = ""  # the comment above it

    @property
    def depth(self) -> int:
        return len(self.within)

    @property
    def targets(self) -> list[str]:
        """The names that it assigns."""
        left, equals, _ = self.text.partition(" = ")
        return re.findall(r"[\w.]+", left) if equals else []


def statements_of(function: Callable[..., Any]) -> list[Statement]:
    """A function's statements in source order, without the docstring and without statements that only record."""
    return statements_in(textwrap.dedent(inspect.getsource(function)))


def statements_in(source: str) -> list[Statement]:
    """The statements of the one function that `source` defines."""
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, column), before = token.start, token.line[: token.start[1]].strip()
        if token.type == tokenize.COMMENT and before:  # after code
            lines[row - 1] = lines[row - 1][:column].rstrip()
    return list(_walk(function.body, lines, ()))


def _walk(body: Sequence[ast.stmt], lines: list[str], within: tuple[str, ...]) -> Iterator[Statement]:
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.AnnAssign) and node.value is None:
            continue  # a type alone
        text, comment = _head(node, lines), _comment_above(node, lines)
        if not hasattr(node, "body"):
            if not RECORDS.match(text):
                yield Statement(text, within, comment)
            continue
        inside = list(_walk(node.body, lines, (*within, text)))
        if inside:
            yield Statement(text, within, comment)
            yield from inside
        otherwise: list[ast.stmt] = getattr(node, "orelse", [])
        if len(otherwise) == 1 and isinstance(otherwise[0], ast.If) and _head(otherwise[0], lines).startswith("elif"):
            yield from _walk(otherwise, lines, within)  # at the depth of its if
        elif inside_else := list(_walk(otherwise, lines, (*within, f"else of {text}"))):
            yield Statement("else:", within)
            yield from inside_else


def _head(node: ast.stmt, lines: list[str]) -> str:
    """A simple statement, or the part of a compound one before its colon; in one line, without comments."""
    last: ast.AST = node
    if isinstance(node, ast.If | ast.While):
        last = node.test
    elif isinstance(node, ast.For):
        last = node.iter
    elif isinstance(node, ast.With):
        last = node.items[-1].optional_vars or node.items[-1].context_expr
    elif isinstance(node, ast.FunctionDef):
        last = node.returns or node.args.args[-1]
    elif hasattr(node, "body"):
        raise NotImplementedError(f"{type(node).__name__} in line {node.lineno}: `_head` does not know where it ends")
    end_line, end_column = last.end_lineno, last.end_col_offset  # type: ignore[attr-defined]
    code = lines[node.lineno - 1 : end_line]
    code[-1] = code[-1].encode()[:end_column].decode()  # ast counts bytes
    parts = [line.strip() for line in code]
    text = re.sub(r",? ([)\]}])", r"\1", re.sub(r"([(\[{]) ", r"\1", " ".join(parts)))
    return text if last is node else f"{text}:"


def _comment_above(node: ast.stmt, lines: list[str]) -> str:
    upwards = (line.strip() for line in reversed(lines[: node.lineno - 1]))
    above = list(takewhile(lambda line: line.startswith("#"), upwards))[::-1]
    return " ".join([*above[:1], *(line.lstrip("# ") for line in above[1:])])
