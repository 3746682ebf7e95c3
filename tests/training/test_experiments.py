"""Every experiment of the ledger, run for two steps by the command itself; and what a sweep's file promises."""

from __future__ import annotations

import re
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from manual_backprop.config.schema import HUB, shipped_folder
from manual_backprop.run import main
from manual_backprop.tracking import FINISHED, flatten, load_training_log
from manual_backprop.tracking.run_directory import list_runs
from manual_backprop.training.command_line import check

FOLDER = shipped_folder("experiments")
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SHORT = ("training.max_steps=2", "model.max_seq_len=16", "training.sample_length=2", "device=cpu", "device.threads=1")


def content_of(name: str) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


FROM_THE_HUB = {
    name for name in EXPERIMENTS for option in content_of(name).get("defaults", []) if {*option.values()} & {*HUB}
}


def swept_by(name: str) -> dict[str, list[str]]:
    """The values of each key that the file sweeps."""
    parameters = content_of(name).get("hydra", {}).get("sweeper", {}).get("params", {})
    return {str(key): str(values).split(",") for key, values in parameters.items()}


@pytest.fixture
def root(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    text = " ".join(f"the {('cat', 'dog', 'owl')[n * n % 3]} saw {n % 7} mice." for n in range(300))
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.setattr(sys, "argv", ["run"])
    return tmp_path


def arguments(name: str) -> list[str]:
    """The experiment on a text of some kilobytes; one that names its dataset and tokenizer keeps them."""
    options = content_of(name).get("defaults", [])
    chosen = {str(key) for option in options for key in option}
    if {"override /task": "translation"} in options:  # of dates and expressions
        return [f"experiments={name}", "tracking=none", "dataset.subset_size=300"]
    if {"override /task": "classification"} in options:
        return [f"experiments={name}", "tracking=none"]
    if {"override /task": "forecasting"} in options:
        return [f"experiments={name}", "tracking=none", "dataset.validation=0.1"]
    if "override /task" in chosen:  # which makes its own examples
        return [f"experiments={name}", "tracking=none", "task.validation_rows=20", "task.test_rows=20"]
    data = ["dataset.path=text.txt"] * (name not in FROM_THE_HUB)
    data += ["dataset=text"] * ("override /dataset" not in chosen)
    data += ["tokenizer=byte"] * ("override /tokenizer" not in chosen)
    return [f"experiments={name}", *data, "tracking=none"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_job_is_valid(name: str, root: Path) -> None:
    checked = check(arguments(name))
    swept = swept_by(name)
    assert checked.multirun == bool(swept)
    assert len(checked.jobs) == prod(map(len, swept.values()))
    seen = [{**flatten(job.config.to_dict()), **job.runtime.choices} for job in checked.jobs]
    for key, values in swept.items():
        assert {as_said(settings[key]) for settings in seen} == {as_said(value) for value in values}


def as_said(value: Any) -> str:
    """1e-3 and 0.001 are one number, however it is written."""
    return value if isinstance(value, str) and not value[0].isdigit() else f"{float(value):g}"


MANY_JOBS = ("learning_rate_by_size", "learning_rate_by_size_sgd", "precision_by_learning_rate")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in MANY_JOBS else [])
        for name in sorted({*EXPERIMENTS} - FROM_THE_HUB)  # those: test_hub_experiments.py
    ],
)
def test_two_steps(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep: every value of its first key, with the last value of the others, which the command line may say."""
    swept = swept_by(name)
    fewer = [f"{key}={values[-1]}" for number, (key, values) in enumerate(swept.items()) if number > 0]
    # which want their max_seq_len
    has_rows = {"task.test_rows=20", "dataset.subset_size=300", "dataset.validation=0.1"} & {*arguments(name)}
    short = [one for one in SHORT if not (has_rows and one.startswith("model.max_seq_len"))]
    assert main([*arguments(name), *short, *fewer]) in (None, 0)
    runs = list_runs(root / "outputs")
    assert len(runs) == len(next(iter(swept.values()), ["one"]))
    for path in runs:
        log = load_training_log(path)
        assert log.run["status"] == FINISHED
        assert log.validation["validation/loss"].steps == [2]
    for key, values in list(swept.items())[:1]:
        configs = [load_training_log(path).config for path in runs]
        found = {str(config[key] if key in config else flatten(config)[key]) for config in configs}
        assert len(found) == len(values)
    if name == "manual_vs_autograd":  # says how far the curves part, and draws it
        (difference,) = re.findall(r"largest difference of train/loss: (\S+) nats", capsys.readouterr().out)
        assert float(difference) < 1e-5
        assert len(list(root.glob("outputs/sweeps/*/comparison.png"))) == 1


def test_an_experiment_s_values_can_be_replaced_by_the_command_line(root: Path) -> None:
    """Also the swept ones: fewer, more, or others."""
    name = "learning_rate_by_size"
    checked = check([*arguments(name), "model=tiny", "optimizer.learning_rate=1,2,3,4,5,6,7", "seed=1,2"])
    assert len(checked.jobs) == 1 * 2 * 7 * 2
    assert {job.runtime.choices["model"] for job in checked.jobs} == {"tiny"}
    assert {job.config.optimizer.learning_rate for job in checked.jobs} == {1, 2, 3, 4, 5, 6, 7}
