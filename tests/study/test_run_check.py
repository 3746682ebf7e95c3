"""The gradient check at the end of a run: it passes for right gradients and fails for wrong ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.models.custom import CustomTransformer
from manual_backprop.study.gradient_check import run_check

SMALL = {"vocab_size": 61, "d_model": 16, "n_blocks": 2, "n_heads": 2, "d_ffn": 24, "max_seq_len": 8}


def checked(implementation: str = "custom", room: int | None = None, **changes: Any) -> run_check.RunCheck:
    run: Any = SimpleNamespace(implementation=SimpleNamespace(name=implementation))
    return run_check.check_of_run(run, CustomTransformerConfig(**(SMALL | changes)), room)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "bf16_mixed"])
@pytest.mark.parametrize("architecture", ["gpt2", "vaswani"])
def test_right_gradients_pass(architecture: str, precision: str) -> None:
    check = checked(architecture=architecture, precision=precision, dropout=0.1, label_smoothing=0.1)
    assert check.status == "passed", check.page
    assert check.line.startswith("gradient check: passed (")
    assert "d blocks.1.attention.query.weight" in check.page
    assert "key.bias is 0" in check.page
    assert ("relative to autograd's" in check.page) == (precision != "fp64")


def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CustomTransformer.loss_and_gradients

    def wrong(self: CustomTransformer, *given: Any, **named: Any) -> torch.Tensor:
        loss = right(self, *given, **named)
        self.gradients["blocks.0.attention_norm.weight"].mul_(1.0001)
        return loss

    monkeypatch.setattr(CustomTransformer, "loss_and_gradients", wrong)
    check = checked()
    assert check.status == "failed"
    assert check.line.startswith("GRADIENT CHECK FAILED")
    assert "d blocks.0.attention_norm.weight in float64" in check.line
    assert check.page.count("FAILED") >= 2


def test_what_is_not_checked_says_why() -> None:
    check = checked("torch")
    assert check.status == "skipped"
    assert check.line == "gradient check: skipped (implementation=torch: none of its gradients is written by hand)"
    check = checked(vocab_size=50257, d_model=1024, n_blocks=2, n_heads=16, d_ffn=64, max_seq_len=8)
    assert check.status == "skipped"
    assert "above 50,000,000" in check.line


def test_a_network_that_would_take_too_long_is_checked_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_check, "SMALL", 1000)
    monkeypatch.setattr(run_check, "MOST_SECONDS", 0.0)
    check = checked(n_blocks=4)
    assert check.status == "passed"
    assert "with one block and 61 tokens only" in check.line
    assert "d blocks.0." in check.page
    assert "d blocks.1." not in check.page


def test_a_network_that_would_take_more_memory_than_there_is_is_checked_in_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_check, "SMALL", 1000)
    check = checked(room=100_000, n_blocks=4)  # of some 300 kB
    assert check.status == "passed"
    assert (
        "with one block and 61 tokens only: the whole network would take more memory than the training took"
        in check.line
    )
    assert "d blocks.3." in checked(room=1_000_000, n_blocks=4).page


def test_no_memory_for_it_is_no_failure_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory:\n 99 bytes.")

    monkeypatch.setattr(run_check, "_measure", full)
    assert checked().line == (
        "gradient check: skipped (RuntimeError: DefaultCPUAllocator: not enough memory: 99 bytes.)"
    )
