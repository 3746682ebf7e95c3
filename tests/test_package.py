"""`import manual_backprop` is fast; public names are imported from their modules on first use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import manual_backprop

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


def test_the_version_is_that_of_the_checkout() -> None:
    assert f"version = {manual_backprop.__version__}\n" in (ROOT / "setup.cfg").read_text()
