"""The package has rooms, and what stands where. That they are layers without a cycle: `lint-imports` (.ci/run)."""

from __future__ import annotations

import ast
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
