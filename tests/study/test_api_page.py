"""docs/api.md is what the docstrings say, and they say enough. test_documents_for_people.py runs their examples."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from manual_backprop import HOMES, __all__, ops
from manual_backprop.study import api_page
from manual_backprop.study.api_page import BACKWARD, FORWARD, Definition

ROOT = Path(__file__).parents[2]
PUBLIC = {definition.name: definition for definition in api_page.public()}


def test_the_page_is_what_the_command_writes() -> None:
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert api_page.page() == written, "python -m manual_backprop.tools.api_page"


def test_every_exported_name_is_on_it() -> None:
    assert set(PUBLIC) == {*HOMES, *ops.__all__} - {"IGNORED"}  # which `common.batch` has
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in PUBLIC if name not in page] == []


def says(definition: Definition) -> str:
    """The docstring of a name, and those of its methods."""
    methods = api_page.methods_of(definition).values() if isinstance(definition.node, ast.ClassDef) else ()
    return "\n".join([definition.docstring, *(method.docstring for method in methods)])


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_name_has_an_example(name: str) -> None:
    """A pair has one, which calls both."""
    if isinstance(PUBLIC[name].node, ast.Assign):
        return  # a constant
    home = PUBLIC[name.removesuffix(BACKWARD) + FORWARD if name.endswith(BACKWARD) else name]
    text, example = api_page.split(home.docstring)
    assert text
    assert f"{name}(" in example


@pytest.mark.parametrize("name", sorted(HOMES))
def test_an_exported_name_says_what_it_raises(name: str) -> None:
    assert "Raises" in says(PUBLIC[name])


@pytest.mark.parametrize("name", [name for name in sorted(ops.__all__) if name.endswith((FORWARD, BACKWARD))])
def test_a_pair_says_its_shapes(name: str) -> None:
    text, _ = api_page.split(PUBLIC[name].docstring)
    own_shape = name in ("gelu_forward", "gelu_tanh_forward", "relu_forward")  # element by element: any
    assert own_shape or "->" in text or "(B, T, D): adds to" in text, text


def test_what_is_shown_is_documented() -> None:
    assert "```\n\n\n" not in api_page.page()


def test_a_docstring_becomes_markdown() -> None:
    docstring = "One line\nand the next:\n    dx = dy W\n    dW = dy^T x\nThe end.\n\n>>> 1 + 1\n2\n\nAfter it."
    assert api_page.markdown(docstring) == (
        "One line and the next:\n\n```text\ndx = dy W\ndW = dy^T x\n```\n\nThe end.\n\n"
        "```pycon\n>>> 1 + 1\n2\n```\n\nAfter it."
    )


def test_type_checkers_see_what_is_exported() -> None:
    """The stub, whose names come from where `HOMES` says."""
    stub = ast.parse((ROOT / "manual_backprop" / "__init__.pyi").read_text(encoding="utf-8"))
    imported = {
        alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported == HOMES
    (listed,) = (node.value for node in stub.body if isinstance(node, ast.Assign))
    assert sorted(ast.literal_eval(listed)) == sorted(__all__)
