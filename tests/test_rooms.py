"""The package has rooms, and what stands where. That they are layers without a cycle: `lint-imports` (.ci/run)."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

import manual_backprop
from manual_backprop.__main__ import COMMANDS

PACKAGE = Path(manual_backprop.__file__).parent
ROOMS = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)
MOST_FILES = 15  # in a room, its own __init__ not counted


def test_the_top_level_holds_the_commands_and_nothing_else() -> None:
    """But for `served_model`, which models in MLflow name."""
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert files == {*COMMANDS, "__init__", "__main__", "served_model"}


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.relative_to(PACKAGE).as_posix())
def test_a_room_says_what_it_is_for_and_is_no_warehouse(room: Path) -> None:
    assert ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
    assert len(list(room.glob("*.py"))) - 1 <= MOST_FILES


def test_each_room_at_the_top_is_a_layer_and_stands_in_the_drawing() -> None:
    root = PACKAGE.parent
    layers = (root / "pyproject.toml").read_text(encoding="utf-8").partition("layers = [")[2].partition("]")[0]
    drawing = (
        (root / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The rooms")[2].partition("## An op")[0]
    )
    names = [room.name for room in ROOMS if room.parent == PACKAGE]
    assert 10 < len(names) < 16
    for name in names:
        assert f'"{name}"' in layers, name
        assert f"\n{name} " in drawing, name


@pytest.mark.parametrize("room", [room for room in ROOMS if room.parent == PACKAGE], ids=lambda room: room.name)
def test_what_a_room_says_it_may_import_is_what_lint_holds(room: Path) -> None:
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = contracts[0]["layers"]
    below = layers[layers.index(room.name) + 1 :]
    forbidden = {
        name.removeprefix("manual_backprop.")
        for contract in contracts
        if contract["type"] == "forbidden" and f"manual_backprop.{room.name}" in contract["source_modules"]
        for name in contract["forbidden_modules"]
    }
    docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    found = re.search(r"^May import: (.*?)( and below)?\.$", docstring, flags=re.MULTILINE)
    assert found is not None
    said = [] if found[1] == "no other room" else found[1].split(", ")
    if found[2]:
        said += layers[layers.index(said[-1]) + 1 :]
    assert said == [name for name in below if name not in forbidden]
