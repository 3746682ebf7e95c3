"""Text is what was typed, and what was named last is what counts: on the command line and in experiments' files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command_tools import refused

from manual_backprop.config.composition import Composer, ExperimentsSearchPath, composer
from manual_backprop.training.command_line import Job, check_with
from manual_backprop.training.value_sources import value_sources

AS_TYPED = ["2024_01_15", "12e345", "1e0012", "0x10", "1_000", "on", "true", "007", "1:30", "2024-01-15", "nan", "a$b$"]
EXPERIMENT = """# @package _global_
run_name: {0}
tags: {{when: {0}}}
training: {{num_epochs: 2, sample_prompts: [{0}, two]}}
hydra: {{sweeper: {{params: {{run_name: {0}}}}}}}
"""


def job(hydra: Composer, given: list[str]) -> Job:
    (only,) = check_with(hydra, [*given, "tracking=none"]).jobs
    return only


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "experiments").mkdir()
    monkeypatch.setattr(ExperimentsSearchPath, "own_folder", str(tmp_path))
    return tmp_path / "experiments"


@pytest.fixture
def hydra() -> Iterator[Composer]:
    with composer() as opened:
        yield opened


def test_text_is_what_was_typed_wherever_it_was(hydra: Composer) -> None:
    for typed in AS_TYPED:
        config = job(hydra, [f"run_name={typed}", f"tags.a={typed}", f"training.sample_prompts=[{typed},b]"]).config
        assert (config.run_name, config.tags, config.training.sample_prompts) == (typed, {"a": typed}, (typed, "b"))
        assert refused(hydra, [f"resume={typed}"])[0].startswith(f"resume={typed}: there is no run {typed!r}")
    assert job(hydra, ["run_name=null"]).config.run_name is None
    assert job(hydra, ["run_name='null'"]).config.run_name == "null"
    for swept, names in (("1e3,on,null", ["1e3", "on", None]), ("choice(1e3,on)", ["1e3", "on"])):
        jobs = check_with(hydra, [f"run_name={swept}", "tracking=none"], multirun=True).jobs
        assert [one.config.run_name for one in jobs] == names


def test_text_is_what_an_experiment_says(own_folder: Path) -> None:
    for number, typed in enumerate(("2024_01_15", "1e0012", "on")):
        (own_folder / f"own_{number}.yaml").write_text(EXPERIMENT.format(typed))
    with composer() as hydra:
        for number, typed in enumerate(("2024_01_15", "1e0012", "on")):
            given = [f"experiments=own_{number}"]
            found = job(hydra, given).config
            assert (found.run_name, found.tags, found.training.sample_prompts) == (
                typed,
                {"when": typed},
                (typed, "two"),
            )
            (swept,) = check_with(hydra, [*given, "tracking=none"], multirun=True).jobs
            assert swept.config.run_name == typed


def test_one_length_sets_the_other_aside(own_folder: Path) -> None:
    (own_folder / "epochs.yaml").write_text("# @package _global_\ntraining: {num_epochs: 2}\n")
    (own_folder / "both.yaml").write_text("# @package _global_\ntraining: {num_epochs: 2, max_steps: 3}\n")
    with composer() as hydra:
        for given, lengths, where in (
            (["training.num_epochs=20"], (None, 20), "command line"),
            (["experiments=epochs"], (None, 2), "experiments=epochs"),
            (["experiments=epochs", "training.max_steps=7"], (7, None), "command line"),
            (["training.max_steps=null", "training.num_epochs=4"], (None, 4), "command line"),
        ):
            one = job(hydra, given)
            training = one.config.training
            assert (training.max_steps, training.num_epochs) == lengths, given
            sources = value_sources(one.config, one.overrides, one.runtime)
            named = [sources[f"training.{key}"] for key in ("max_steps", "num_epochs")]
            assert all(source.endswith(where) for source in named), named
        jobs = check_with(hydra, ["training.num_epochs=1,2", "tracking=none"], multirun=True).jobs
        assert [(one.config.training.max_steps, one.config.training.num_epochs) for one in jobs] == [
            (None, 1),
            (None, 2),
        ]
        for given in (["training.num_epochs=2", "training.max_steps=3"], ["experiments=both"]):
            assert refused(hydra, given) == [
                "training.num_epochs=2: only one of it and training.max_steps=3 may be given; leave one out"
            ]
