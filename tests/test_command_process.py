"""The command as a process: wrong input ends fast and writes nothing, options do what their help says."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_tools import ROOT, TO_KNOW_IMPORTS, command, environment, imported
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig

from manual_backprop import __version__
from manual_backprop.__main__ import COMMANDS
from manual_backprop.common.errors import ConfigError
from manual_backprop.common.origin import Origin
from manual_backprop.config.composition import ExperimentsSearchPath
from manual_backprop.config.schema import RunConfig, shipped_folder
from manual_backprop.run import main
from manual_backprop.training.command_line import check


def test_a_wrong_command_ends_fast_with_2_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command("-m", "model=tiny,smal", "optimizer.lerning_rate=1", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "2 places" in done.stderr
    assert "did you mean small?" in done.stderr
    assert "did you mean optimizer.learning_rate?" in done.stderr
    assert list(tmp_path.iterdir()) == []
    # Of the processor, since others may use it as well: what it takes on a machine that does nothing else.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


@pytest.mark.parametrize("arguments", [["model=smal"], ["--help"], ["--cfg", "job"]], ids=" ".join)
def test_nothing_slow_is_imported_before_a_run(tmp_path: Path, arguments: list[str]) -> None:
    modules = imported(command(*arguments, cwd=tmp_path, flags=TO_KNOW_IMPORTS))
    assert "hydra" in modules
    assert not modules & {"torch", "mlflow", "numpy", "datasets", "transformers", "tokenizers", "matplotlib"}
    assert list(tmp_path.iterdir()) == []


ASK = """\
import contextlib, importlib, io, sys
from manual_backprop.common.exit_codes import exit_code_of
for line in sys.argv[1:]:
    name, *words = line.split()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = exit_code_of(lambda: importlib.import_module(f"manual_backprop.{name}").main(words))
        except SystemExit as end:
            code = end.code
    print(line, code, *sorted({"torch", "mlflow", "datasets", "transformers"} & set(sys.modules)), sep=": ")
"""


def test_no_command_imports_something_slow_to_help_or_to_refuse(tmp_path: Path) -> None:
    """All commands in one interpreter."""
    files = sorted((ROOT / "manual_backprop/tools").glob("*.py"))
    tools = [f"tools.{path.stem}" for path in files if "\ndef main(" in path.read_text(encoding="utf-8")]
    assert len(tools) > 4
    answers = {"--help": 0, "--nonsense": 2}
    asked = {f"{name} {word}": code for name in (*COMMANDS, *tools) for word, code in answers.items()}
    done = subprocess.run(
        [sys.executable, "-c", ASK, *asked], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"{line}: {code}" for line, code in asked.items()], done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["model=smal"], ["--help"]], ids=" ".join)
def test_an_answer_without_a_run_comes_at_once(tmp_path: Path, arguments: list[str]) -> None:
    """It takes half a second on an idle machine. The limit is processor time, with a margin for slower machines."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(*arguments, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == (0 if arguments == ["--help"] else 2)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.2


@pytest.mark.parametrize("settings", [[], ["hydra.verbose=a.library", "+hydra.job.env_set.A_NAME=a value"]], ids=str)
def test_one_job_is_composed_once_and_run_as_it_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str]
) -> None:
    compositions, jobs = [], []
    composed = ConfigLoaderImpl.load_configuration

    def counted(self: ConfigLoaderImpl, *given: Any, **named: Any) -> DictConfig:
        compositions.append(given)
        return composed(self, *given, **named)

    def run_job(config: RunConfig, root: Path, origin: Origin) -> None:
        seen = sys.argv[1:], os.environ.get("A_NAME"), logging.getLogger("a.library").level
        jobs.append((config, root, origin, *seen))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counted)
    monkeypatch.setattr("manual_backprop.training.runner.run_job", run_job)
    monkeypatch.setattr(sys, "argv", ["run.py", "something else"])
    given = ["model=tiny", "++model.n_heads=4", "tags.note=x", *settings]
    try:
        assert main(given) is None
    finally:
        logging.getLogger("a.library").setLevel(logging.NOTSET)
    to_know_hydras_keys = [[]] if settings else []
    assert [choices for _, choices, _ in compositions] == [*to_know_hydras_keys, [*settings, "model=tiny"]]
    ((config, root, origin, arguments, variable, level),) = jobs
    assert config == check(given).jobs[0].config
    assert (config.model.d_model, config.model.n_heads, config.tags) == (64, 4, {"note": "x"})
    assert root == tmp_path
    assert origin.overrides == ("model=tiny", "model.n_heads=4", "tags.note=x")
    assert origin.sources["model.n_heads"] == "command line"
    assert origin.sources["model.d_model"] == "model=tiny"
    assert arguments == given
    assert (variable, level) == (("a value", logging.DEBUG) if settings else (None, logging.NOTSET))
    assert "A_NAME" not in os.environ
    assert sys.argv == ["run.py", "something else"]
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_option_and_says_what_it_is(tmp_path: Path) -> None:
    page = command("--help", cwd=tmp_path).stdout
    paths = [*shipped_folder("conf").glob("*/*.yaml"), *shipped_folder("experiments").glob("*.yaml")]
    assert len(paths) > 30
    for path in paths:
        assert any(path.stem in line.split() for line in page.splitlines()), path
    assert "training.max_steps" in page
    assert page.count("python -m manual_backprop.run") >= 6
    assert max(map(len, page.splitlines())) <= 120


def test_the_composed_configuration_can_be_shown(tmp_path: Path) -> None:
    done = command("--cfg", "job", "--resolve", "model=tiny", "tags.note=x", cwd=tmp_path)
    assert done.returncode == 0
    assert "d_model: 64" in done.stdout
    assert "note: x" in done.stdout
    assert "${" not in done.stdout
    done = command("--info", "defaults", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "experiments" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config-dir", "nowhere"], "nowhere"),
        (["--resolve"], "--cfg job"),
        (["--cfg", "job", "-m"], "--multirun and --cfg"),
        (["--cfg", "nothing"], "invalid choice"),
        (["--experimental-rerun", "file"], "no such option"),
    ],
)
def test_options_that_make_no_sense_end_with_2(tmp_path: Path, arguments: list[str], says: str) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_the_package_lists_its_commands(tmp_path: Path) -> None:
    listed = command(cwd=tmp_path, module="manual_backprop")
    assert listed.returncode == 0
    assert "python -m manual_backprop.run" in listed.stdout
    version = command("--version", cwd=tmp_path, module="manual_backprop")
    assert version.stdout.split() == ["manual_backprop", __version__]
    wrong = command("rn", cwd=tmp_path, module="manual_backprop")
    assert wrong.returncode == 2
    assert "did you mean python -m manual_backprop.run?" in wrong.stderr


def test_an_experiment_can_be_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "experiments"
    folder.mkdir()
    text = (
        "# @package _global_\n# mine\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        "      seed: 1,2\n      tags.note: a,b\n      {key}: tiny,small\n"
    )
    (folder / "mine.yaml").write_text(text.replace("{key}", "model"))
    (folder / "wrong.yaml").write_text(text.replace("{key}", "modle"))
    done = command("--config-dir", str(tmp_path), "experiments=wrong", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean model?" in done.stderr
    monkeypatch.setattr(ExperimentsSearchPath, "own_folder", str(tmp_path))
    assert len(check(["experiments=mine"]).jobs) == 8
    assert len(check(["experiments=mine", "seed=3"]).jobs) == 4, "the command line's values are taken instead"


@pytest.mark.parametrize(
    "arguments", [["model=smal"], ["-m", "seed=1,x"], ["seed=${oc.env:HOME}"], ["--wrong"]], ids=" ".join
)
def test_the_command_itself_reports_and_writes_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="The configuration is wrong in 1 place; nothing was started"):
        main(arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("run: {dir: elsewhere}", "hydra.run.dir=elsewhere: is fixed"),
        ("job: {chdir: true}", "hydra.job.chdir=true: is fixed"),
        ("output_subdir: .hydra", "hydra.output_subdir=.hydra: is fixed"),
        ("callbacks: {one: {_target_: a.b}}", "hydra.callbacks"),
        ("verbose: 3", "hydra.verbose=3"),
    ],
)
def test_what_an_experiment_asks_of_hydra_is_refused_where_one_job_would_not_obey(
    content: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExperimentsSearchPath, "own_folder", str(tmp_path))
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/mine.yaml").write_text(f"# @package _global_\nhydra:\n  {content}\n")
    with pytest.raises(ConfigError) as caught:
        check(["experiments=mine"])
    (violation,) = caught.value.violations
    assert violation.startswith(says)
    assert check(["experiments=mine"], displayed=True).jobs


def test_an_experiments_launcher_is_for_when_it_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExperimentsSearchPath, "own_folder", str(tmp_path))
    (tmp_path / "experiments").mkdir()
    written = "# @package _global_\ndefaults:\n  - override /hydra/launcher: basic\nhydra:\n  sweep: {subdir: x}\n"
    (tmp_path / "experiments/mine.yaml").write_text(written)
    assert len(check(["experiments=mine"]).jobs) == 1
