"""Pairs of an expression from the standard library's sources and the same in postfix notation: every operator follows
its operands, and no parentheses are needed.

    (lo + hi) // 2                 ->  lo hi + 2 //
    not a.b and -x < 2 ** (y + 1)  ->  a.b not x u- 2 y 1 + ** < and

Operands stay as they are written: names, numbers, calls and anything else without a space. u- and u+ are the unary
signs; they are not valid names, so that they cannot be operands. An expression that occurs several times is used once.
Sources are parsed with `ast`, not imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from .pairs import Pair, PairSource
from .python_docs import PythonDocs, syntax_trees

LONGEST = 48  # [characters]; longer expressions are left out
EXPRESSIONS = (ast.BinOp, ast.BoolOp, ast.Compare, ast.UnaryOp)
OPERATORS: dict[type, str] = {
    **{ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.MatMult: "@", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%"},
    **{ast.Pow: "**", ast.LShift: "<<", ast.RShift: ">>", ast.BitOr: "|", ast.BitXor: "^", ast.BitAnd: "&"},
    **{ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="},
    **{ast.In: "in", ast.NotIn: "not-in", ast.Is: "is", ast.IsNot: "is-not"},
    **{ast.And: "and", ast.Or: "or", ast.Not: "not", ast.Invert: "~", ast.USub: "u-", ast.UAdd: "u+"},
}


class Postfix(PairSource):
    test_share = 0.05

    def __init__(self) -> None:
        """Raises InputError if Python is installed without its sources."""
        self.source = PythonDocs()

    def identity(self) -> dict[str, Any]:
        return {"kind": "postfix 1", "library": self.source.identity()}

    def rows(self) -> Iterator[Pair]:
        seen: set[str] = set()
        for file, tree in syntax_trees((str(file.path), file.path.read_bytes()) for file in self.source.files):
            for node in ast.walk(tree):
                if not isinstance(node, EXPRESSIONS) or _length(node) > LONGEST:
                    continue
                text = ast.unparse(node)
                if text in seen or len(text) > LONGEST or (words := postfix_of(node)) is None:
                    continue
                seen.add(text)
                yield Pair(text, " ".join(words), f"{file}, line {node.lineno}", unit=text)

    def check_unchanged(self) -> None:
        self.source.check_unchanged()


def postfix_of(node: ast.AST) -> list[str] | None:
    """The words of an expression in postfix notation; None if it has other operators, or an operand with a space."""
    operators: list[type]
    match node:
        case ast.UnaryOp():
            operands, operators = [node.operand], [type(node.op)]
        case ast.BinOp():
            operands, operators = [node.left, node.right], [type(node.op)]
        case ast.BoolOp():
            operands, operators = node.values, [type(node.op)] * (len(node.values) - 1)
        case ast.Compare(ops=[operator]):
            operands, operators = [node.left, *node.comparators], [type(operator)]
        case ast.Compare() | ast.IfExp() | ast.NamedExpr() | ast.Lambda():
            return None
        case _:
            text = ast.unparse(node)
            return None if any(letter.isspace() or not letter.isprintable() for letter in text) else [text]
    parts = [postfix_of(operand) for operand in operands]
    if any(part is None for part in parts) or not all(operator in OPERATORS for operator in operators):
        return None
    # a and b and c is a b and c and: each operator follows its second operand
    words = [*(parts[0] or [])]
    for part in parts[1:]:
        words += [*(part or []), OPERATORS[operators[0]]]
    return words if len(parts) > 1 else [*words, OPERATORS[operators[0]]]


def _length(node: ast.expr) -> int:
    """The approximate length of an expression's text; LONGEST + 1 if it has several lines."""
    return LONGEST + 1 if node.lineno != node.end_lineno else (node.end_col_offset or 0) - node.col_offset
