"""The rooms of the package and their files. `lint-imports` (.ci/run) checks that they are layers without cycles."""

from __future__ import annotations

import ast
import itertools
import re
import runpy
import tomllib
from pathlib import Path

import pytest

import manual_backprop
from manual_backprop import ops
from manual_backprop.__main__ import COMMANDS
from manual_backprop.config.network import CustomTransformerConfig
from manual_backprop.config.schema import RunConfig
from manual_backprop.config.validation import groups

PACKAGE = Path(manual_backprop.__file__).parent
ROOMS = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)
MOST_FILES = 15  # in a room, its own __init__ not counted


def test_the_top_level_holds_the_commands_and_nothing_else() -> None:
    """Except `served_model`, whose name is recorded in MLflow's models."""
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert files == {*COMMANDS, "__init__", "__main__", "served_model"}


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.relative_to(PACKAGE).as_posix())
def test_a_room_says_what_it_is_for_and_is_no_warehouse(room: Path) -> None:
    assert ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
    assert len(list(room.glob("*.py"))) - 1 <= MOST_FILES


def test_each_room_at_the_top_is_a_layer_and_stands_in_the_picture() -> None:
    root = PACKAGE.parent
    layers = (root / "pyproject.toml").read_text(encoding="utf-8").partition("layers = [")[2].partition("]")[0]
    picture = (root / "docs" / "architecture.svg").read_text(encoding="utf-8")
    names = [room.name for room in ROOMS if room.parent == PACKAGE]
    assert 10 < len(names) < 16
    for name in names:
        assert f'"{name}"' in layers, name
        assert f">{name}/</text>" in picture, name


def test_the_table_of_rooms_has_the_order_of_the_layers() -> None:
    root = PACKAGE.parent
    contracts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    table = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\| `manual_backprop/(\w+)/` \|", table, flags=re.MULTILINE)
    assert rooms == contracts[0]["layers"][2:], "below __main__ and the commands"


def test_the_picture_is_what_its_script_draws() -> None:
    folder = PACKAGE.parent / "docs"
    drawn = runpy.run_path(str(folder / "architecture.py"))["picture"]()
    there = (folder / "architecture.svg").read_text(encoding="utf-8")
    assert there == drawn, "docs/architecture.svg is old: run `python docs/architecture.py`"


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


DOCUMENTS = [PACKAGE.parent / "README.md", PACKAGE.parent / "CONTRIBUTING.md"]
DOCUMENTS += sorted(path for folder in ("", "guide/**/") for path in (PACKAGE.parent / "docs").glob(f"{folder}*.md"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_each_path_in_the_documents_is_there(document: Path) -> None:
    """Checks paths in backticks: Python files, and paths that begin with a folder of the project or a room."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    root = PACKAGE.parent
    rooms = {room.name for room in ROOMS if room.parent == PACKAGE}
    folders = {"manual_backprop", "conf", "docs", "experiments", "tests", *rooms}
    of_a_run = {"checkpoints/step-NNNNNN/"}
    missing = []
    for word in {*re.findall(r"`([\w./*-]+)`", text)} - of_a_run:
        if word.endswith(".py") or ("/" in word and word.partition("/")[0] in folders):
            pattern = word.replace("NAME", "*")
            if not any(itertools.chain(root.glob(pattern), PACKAGE.rglob(pattern))):
                missing.append(word)
    assert missing == []


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_each_file_that_the_sources_name_is_there() -> None:
    """`NAME.py` in a comment, a docstring or a page is the end of the path of an existing file."""
    elsewhere = {"pydoc_data/topics.py"}  # Python's own
    there = [f"/{path.as_posix()}" for path in (*MODULES, *(PACKAGE.parent / "tests").rglob("*.py"))]
    stale = []
    for path in MODULES:
        for line in path.read_text(encoding="utf-8").splitlines():
            for name in set(re.findall(r"(?<![\w/.*}])(?:\w+/)*\w+\.py\b", line)) - elsewhere:
                if not any(path.endswith(f"/{name}") for path in there):
                    stale.append(f"{path.relative_to(PACKAGE)}: {name}")
    assert stale == []


def test_each_module_that_a_docstring_names_is_there() -> None:
    """`room.module` or `room.module.name`, unless it is a config key or a field of a network."""
    rooms = {room.name for room in ROOMS if room.parent == PACKAGE}
    keys = {f"{group}.{key}" for group, its in groups().items() for key in its.__dataclass_fields__} | {"config.yaml"}
    keys |= {f"config.{key}" for one in (RunConfig, CustomTransformerConfig) for key in one.__dataclass_fields__}
    keys |= {f"ops.{name}" for name in ops.__all__}
    stale = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            for name in re.findall(r"`([a-z_]+\.[a-z_.]+)`", ast.get_docstring(node) or ""):
                if name.partition(".")[0] in rooms and name not in keys and not name.endswith(".py"):
                    place = PACKAGE.joinpath(*name.split("."))
                    if not (place.is_dir() or place.with_suffix(".py").is_file() or _is_in_a_module(place)):
                        stale.append(f"{path.relative_to(PACKAGE)}: {name}")
    assert stale == []


def _is_in_a_module(place: Path) -> bool:
    module = place.parent.with_suffix(".py")
    return module.is_file() and re.search(rf"\b{place.name}\b", module.read_text(encoding="utf-8")) is not None
