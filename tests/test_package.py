"""`import manual_backprop` is fast; public names are imported from their modules on first use."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import manual_backprop
from manual_backprop.__main__ import COMMANDS, GROUPS, main

ROOT = Path(__file__).parent.parent


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys, manual_backprop; from manual_backprop import CustomTransformerConfig, __version__; "
        "print(sorted({'torch', 'mlflow', 'hydra', 'numpy', 'omegaconf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_networks_need_only_torch() -> None:
    script = (
        "import sys; from manual_backprop import CustomTransformer, CustomTransformerWrapper, TorchTransformer; "
        "print(sorted({'mlflow', 'hydra', 'omegaconf', 'datasets', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_services_need_no_hydra() -> None:
    script = (
        "import sys; from manual_backprop import CheckpointManager, Evaluator, TrainingLogger, load_training_log; "
        "print(sorted({'mlflow', 'hydra', 'omegaconf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    assert set(manual_backprop.__all__) <= set(dir(manual_backprop))
    for name in manual_backprop.__all__:
        assert getattr(manual_backprop, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'CustomTransfomer'"):
        manual_backprop.CustomTransfomer  # noqa: B018


def test_the_commands_are_listed_at_once() -> None:
    """Half a second of the processor at most: nothing of a library is imported."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "manual_backprop"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.startswith("A laboratory for backpropagation")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_every_command_is_listed_in_one_group() -> None:
    tools = [path for path in (ROOT / "manual_backprop" / "tools").glob("*.py") if "\ndef main(" in path.read_text()]
    there = [*COMMANDS, *(f"tools.{path.stem}" for path in tools)]
    assert sorted(name for group in GROUPS.values() for name in group) == sorted(there)


@pytest.mark.parametrize(
    ("typed", "meant"), [("evalute", "evaluate"), ("chat", "chat"), ("tools.inspct", "tools.inspect")]
)
def test_what_is_no_option_is_told_the_command(capsys: pytest.CaptureFixture[str], typed: str, meant: str) -> None:
    assert main([typed]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{typed}: there is no such option; did you mean python -m manual_backprop.{meant}?\n")
    assert "\nTrain\n" in said


def test_the_version_is_that_of_the_checkout() -> None:
    assert f"version = {manual_backprop.__version__}\n" in (ROOT / "setup.cfg").read_text()
