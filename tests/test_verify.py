"""`python -m manual_backprop.verify`: its tables, its verdict and its exit codes. The complete check takes long; the
test of the documents runs it once (documented_commands.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.models.custom import CustomTransformer
from manual_backprop.study.gradient_check import check_network_precision
from manual_backprop.study.gradient_check.low_precision import median_ratios

TESTS = Path(__file__).resolve().parent


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, cwd=TESTS.parent)


def verify(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "manual_backprop.verify", *arguments)


@pytest.mark.slow
def test_a_network_of_ones_own() -> None:
    done = verify(
        "model=tiny",
        "model.d_model=12",
        "model.n_heads=3",
        "architecture=vaswani",
        "precision=bf16",
        "dataset=python_docs",
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "V=1024 D=12 L=2 H=3 F=256 relu" in done.stdout
    assert "vaswani, bf16, initial scale" in done.stdout


@pytest.mark.parametrize(
    ("argument", "said"),
    [("model=tinny", "did you mean"), ("model.n_heads=7", "must be divisible"), ("--all", "--all")],
)
def test_wrong_input_is_one_line_and_exit_2(argument: str, said: str) -> None:
    done = verify(argument)
    assert done.returncode == 2
    assert said in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 or lines[1:] == ["See python -m manual_backprop.verify --help"]
    assert not done.stdout


def test_help_says_what_is_measured() -> None:
    done = verify("--help")
    assert done.returncode == 0
    for word in ("1e-12", "central differences", "Exit codes"):
        assert word in done.stdout


@pytest.mark.slow
def test_a_planted_bug_is_exit_1() -> None:
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import mutate\n"
        "mutate.plant(next(m for m in mutate.named_mutants() if m.name == 'named: positions averaged'))\n"
        "from manual_backprop.verify import main\n"
        "sys.exit(main(['model=tiny', 'kernels=reference', 'dataset=python_docs']))\n"
    )
    done = python("-c", script)
    assert done.returncode == 1, done.stderr
    assert "learned_positions" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("FAILED: ")


RELU = CustomTransformerConfig(
    vocab_size=61, d_model=16, n_blocks=2, n_heads=2, d_ffn=32, max_seq_len=12, architecture="vaswani"
)


def test_one_bad_draw_of_rounding_errors_is_luck_and_a_bug_is_in_all() -> None:
    """A number that rounding moves across the kink of a ReLU is a much larger error, and only for one side."""
    fair = [{"dx": (1e-7, 1.1e-7)}] * 6
    assert median_ratios([*fair, {"dx": (1e-3, 1e-7)}, {"dx": (1e-3, 1e-7)}], lambda _: 0)["dx"] < 1
    assert median_ratios([{"dx": (3 * mine, its)} for mine, its in (draw["dx"] for draw in fair)], lambda _: 0)[
        "dx"
    ] == pytest.approx(3 / 1.1)


def test_a_gradient_that_is_less_exact_than_autograds_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "blocks.1.feed_forward.hidden.weight"
    right = CustomTransformer.loss_and_gradients

    def rounded(self: CustomTransformer, *given: Any, **named: Any) -> torch.Tensor:
        loss = right(self, *given, **named)
        if self.config.precision == "fp32":
            self.gradients[name].copy_(self.gradients[name].bfloat16())
        return loss

    assert all(finding.ok for finding in check_network_precision(RELU, "proof"))
    monkeypatch.setattr(CustomTransformer, "loss_and_gradients", rounded)
    assert [f.quantity for f in check_network_precision(RELU, "proof") if not f.ok] == [f"d {name}"]


def test_what_says_how_a_network_is_trained_is_named_as_without_effect() -> None:
    from manual_backprop.training.command_line import keys_without_effect

    given = ["model=tiny", "training.max_steps=3", "optimizer=sgd", "training.label_smoothing=0.1", "tracking=none"]
    assert keys_without_effect(given) == ["training.max_steps", "optimizer"]
