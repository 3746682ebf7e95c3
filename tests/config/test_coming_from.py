"""docs/guide/coming_from.md tells the truth: what stands on the right composes to what it says, and whoever types what
stands on the left is told the right.

The page is what is read: each row is a case. Its commands are run by test_documents_for_people.py, as those of every
document.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from command_tools import ROOT, refused

from manual_backprop import generate
from manual_backprop.common.errors import ConfigError, InputError
from manual_backprop.config.composition import Composer, ExperimentsSearchPath, composer, is_choice
from manual_backprop.config.rules import shown
from manual_backprop.config.validation import keys
from manual_backprop.tracking import flatten
from manual_backprop.training.command_line import Checked, check_with

PAGE = (ROOT / "docs" / "guide" / "coming_from.md").read_text(encoding="utf-8")
NEEDS_A_GPU = "NVIDIA GPU"
SECTIONS = ("nanoGPT", "transformers' Trainer", "Lightning with Hydra", "Tutorials")


class Row(NamedTuple):
    there: str
    here: str  # empty: nothing is typed here
    note: str


def rows(kind: str, page: str = PAGE) -> list[Row]:
    """The rows of all tables whose first column is called so (setting, command, name, option)."""
    tables = re.findall(rf"^\| {kind}\b[^|\n]* \| here \| \|\n\|---\|---\|---\|\n((?:\|.*\|\n)+)", page, flags=re.M)
    lines = [line for table in tables for line in table.splitlines()]
    return [Row(*(cell.strip() for cell in line.removesuffix("|").split("|")[1:])) for line in lines]


def in_code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def typed(setting: str) -> str:
    """NAME = 'VALUE', as a program's file has it, on a command line of ours."""
    name, _, value = setting.partition(" = ")
    return f"{name}={value.strip(chr(39))}"


SETTINGS = rows("setting")
YAML = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


WRONG = "# @package _global_\nn_layer: 4\ntraining: {bf16: true}\n"


@pytest.fixture(scope="module")
def hydra(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composer]:
    """With a folder of experiments: the page's, and one whose names are of other programs."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "experiments").mkdir()
    for number, content in enumerate([*YAML, WRONG]):
        (folder / "experiments" / f"own_{number}.yaml").write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExperimentsSearchPath, "own_folder", str(folder))
        with composer() as opened:
            yield opened


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page calls FILE, PAIRS and FOLDER."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("some text")
    (tmp_path / "PAIRS").write_text("one\tuno\n")
    (tmp_path / "FOLDER").mkdir()
    return tmp_path


def checked(hydra: Composer, overrides: list[str]) -> Checked | None:
    """None where only a GPU is missing."""
    try:
        return check_with(hydra, overrides)
    except ConfigError as error:
        if all(NEEDS_A_GPU in violation for violation in error.violations):
            return None
        raise


def same(value: Any, written: str) -> bool:
    """Whether a value of a flattened config is what is written on the page."""
    if written.startswith("["):
        return json.loads(value) == json.loads(written)
    if isinstance(value, float):
        return value == float(written)
    return shown(value) == written


def test_the_page_has_tables_of_all_programs() -> None:
    for name in SECTIONS:
        section = PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert len(rows("setting", section)) > 20, name
        assert len(rows("command", section)) > 5, name
    assert len(rows("name")) > 20
    assert len(rows("option")) > 5
    n_rows = len(re.findall(r"^\|(?!---)(?!.* \| here \|)", PAGE, flags=re.M))
    assert n_rows == sum(len(rows(kind)) for kind in ("setting", "command", "name", "option")), "none is left out"


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.there.strip("`"))
def test_what_stands_on_the_right_is_what_a_run_is_made_of(hydra: Composer, row: Row, place: Path) -> None:
    for text in in_code(row.here):
        if text.startswith("python -m "):
            continue
        overrides = text.split()
        if text.startswith("init_from="):  # of a model, which is not here
            assert refused(hydra, overrides)[0].startswith(f"{text}: there is no run")
            continue
        if (found := checked(hydra, overrides)) is None:
            continue
        (job,) = found.jobs
        config = flatten(job.config.to_dict())
        for override in overrides:
            key, _, value = override.partition("=")
            assert job.runtime.choices[key] == value if is_choice(key) else same(config[key], value), override


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.there.strip("`"))
def test_what_stands_on_the_left_is_answered_with_the_right(hydra: Composer, row: Row, place: Path) -> None:
    (setting,) = in_code(row.there)
    given = typed(setting)
    name = given.partition("=")[0]
    if (name in keys() or is_choice(name)) and name != "init_from":  # it is called so here as well
        assert name in [text.partition("=")[0] for text in in_code(row.here)[0].split()]
        return
    found = refused(hydra, [given, f"--{given}"])  # as a key and as an option
    for violation in (next(one for one in found if one.startswith(start)) for start in (given, f"--{given}")):
        _, _, meant = violation.rpartition("did you mean ")
        if not row.here:
            assert violation.endswith(f"; {row.note.replace('`', '')}")
        elif meant.startswith("python -m "):
            assert in_code(row.here)[0].startswith(meant.removesuffix("?"))
        else:
            key = meant.removesuffix("?").partition("=")[0]
            assert key in [override.partition("=")[0] for override in in_code(row.here)[0].split()], violation
    if row.here and "=" in meant and not meant.endswith("VALUE?"):
        assert meant.removesuffix("?").split()[0] in in_code(row.here)[0].split(), "the value is the page's, too"


@pytest.mark.parametrize("number", range(len(YAML)))
def test_a_file_of_the_page_is_an_experiment(hydra: Composer, number: int, place: Path) -> None:
    (job,) = check_with(hydra, [f"experiments=own_{number}"]).jobs
    config = flatten(job.config.to_dict())
    values = {key: value for key, value in flatten(yaml.safe_load(YAML[number])).items() if key != "defaults"}
    assert len(values) > 5
    for key, value in values.items():
        assert config[key] == (float(value) if isinstance(config[key], float) else value), key  # 1e-3 is text in YAML


def test_names_in_a_file_get_the_same_answers(hydra: Composer) -> None:
    assert sorted(refused(hydra, [f"experiments=own_{len(YAML)}"])) == [
        "n_layer=4: there is no such key; did you mean model.n_blocks?",
        "training.bf16=true: there is no such key; did you mean precision=bf16_mixed?",
    ]


@pytest.mark.parametrize("row", rows("name"), ids=lambda row: row.here.strip("`"))
def test_names_in_the_code_are_there(row: Row) -> None:
    names = [name for name in in_code(row.here + row.note) if name.startswith("manual_backprop.")]
    assert names
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert callable(getattr(import_module(module), attribute)), name


@pytest.mark.parametrize("row", rows("option"), ids=lambda row: row.there.strip("`"))
def test_options_of_generate(row: Row, place: Path) -> None:
    (option,), (here,) = in_code(row.there), in_code(row.here)
    name, value = typed(option).split("=")
    words = shlex.split(here)
    with pytest.raises(InputError, match="there is no run"):
        generate.main(["last", "--prompt", "Return the", *words])
    if f"--{name}" == words[0]:
        return
    with pytest.raises(InputError, match=f"did you mean {words[0]}\\?"):
        generate.main(["last", f"--{name}={value}"])
