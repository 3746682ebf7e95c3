"""What can be proved of a step on a GPU without one: fake tensors on the device cuda (fake_cuda.py)."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_cuda import Calls, fake_gpu

from manual_backprop.common.batch import AnyBatch, Batch, EncoderBatch, PairBatch
from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.models.implementations import build_network
from manual_backprop.models.training_step import OfTensors, TrainingStep

TINY: dict[str, Any] = {
    "vocab_size": 65,
    "d_model": 32,
    "n_blocks": 1,
    "n_heads": 4,
    "d_ffn": 48,
    "max_seq_len": 16,
    "device": "cuda",
    "kernels": "fused",
}


def batch_of(config: CustomTransformerConfig, rows: int = 2, segments: bool = False, first_row: int = 0) -> AnyBatch:
    tokens = torch.zeros(rows, config.max_seq_len, dtype=torch.int64, device="cuda")
    lengths = torch.zeros(rows, dtype=torch.int64, device="cuda")
    if config.network == "encoder":
        numbers = config.head_loss == "squared_error"
        targets = torch.zeros(rows, config.n_outputs, device="cuda") if numbers else lengths
        inputs = tokens if config.n_inputs is None else torch.zeros(rows, 16, config.n_inputs, device="cuda")
        return EncoderBatch(inputs, lengths, targets, first_row)
    if config.network == "encoder_decoder":
        return PairBatch(tokens, lengths, tokens, tokens, first_row=first_row)
    return Batch(tokens, tokens, torch.zeros_like(tokens) if segments else None, first_row)


def calls_of_a_step(config: CustomTransformerConfig, segments: bool = False, optimizer: str = "adamw") -> list[Calls]:
    """Of two steps with two batches each, as a graph makes them."""
    found = []
    with fake_gpu():
        network = build_network("custom", config)
        made = network.adamw(0.1, (0.9, 0.95), 1e-8) if optimizer == "adamw" else network.sgd(0.1, 0.9)
        step = TrainingStep(network, made, 1.0)
        batches = [batch_of(config, 2, segments, first_row) for first_row in (0, 2)]
        made.step(torch.zeros((), device="cuda"), 1e-3, 1.0)  # what an optimizer allocates once
        for number, count in ((1, 64), (2, 63)):
            recorded = OfTensors.of(step, batches, network)
            inputs = recorded.inputs(network.on_device(count), 1e-3 / number, number)
            with Calls() as calls:
                loss, norm = recorded(*inputs)
            assert loss.device.type == norm.device.type == "cuda"
            found.append(calls)
    return found


def assert_capturable(calls: list[Calls]) -> None:
    first, second = calls
    assert first.waits == []
    assert first.elsewhere == []
    assert len(first.made) > 100
    assert first.made == second.made  # no number that a graph would keep, while it changes


PRECISIONS = ("fp64", "fp32", "tf32", "bf16", "bf16_mixed", "fp16_mixed")
PAIRS: dict[
    str, dict[str, Any]
] = {  # of everything that a network can be, each with another architecture and precision
    "gpt2": {},
    "vaswani": {"architecture": "vaswani", "precision": "bf16"},
    "llama": {"architecture": "llama", "n_kv_heads": 2, "precision": "fp16_mixed"},
    "llama-fp32": {"architecture": "llama", "n_kv_heads": 2, "precision": "fp32"},
    "dropout": {"dropout": 0.1, "label_smoothing": 0.1, "precision": "bf16_mixed"},
    "recompute": {"recompute": "block", "architecture": "llama", "dropout": 0.1, "precision": "tf32"},
    "relu": {"activation": "relu", "positions": "none", "precision": "fp16_mixed"},
    "gelu": {"activation": "gelu", "positions": "sinusoidal", "precision": "fp64"},
    "odd-heads": {"d_model": 20, "precision": "bf16"},
    "pair": {"network": "encoder_decoder", "dropout": 0.1, "precision": "bf16_mixed"},
    "pair-vaswani": {
        "network": "encoder_decoder",
        "architecture": "vaswani",
        "padding_token_id": 3,
        "label_smoothing": 0.1,
    },
    "pair-llama": {"network": "encoder_decoder", "architecture": "llama", "n_kv_heads": 2, "precision": "bf16"},
    "classes": {"network": "encoder", "n_outputs": 3, "pooling": "first", "precision": "fp16_mixed"},
    "numbers": {"network": "encoder", "n_outputs": 3, "n_inputs": 2, "head_loss": "squared_error", "precision": "bf16"},
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_step_can_be_captured(name: str) -> None:
    """Every tensor is on the device, nothing waits, no shape depends on a number, no number is frozen."""
    assert_capturable(calls_of_a_step(CustomTransformerConfig(TINY | PAIRS[name])))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_in_every_precision(precision: str) -> None:
    assert_capturable(calls_of_a_step(CustomTransformerConfig(TINY | {"precision": precision})))


def test_documents_and_another_optimizer() -> None:
    config = CustomTransformerConfig(TINY | {"precision": "bf16_mixed"})
    assert_capturable(calls_of_a_step(config, segments=True, optimizer="sgd"))
    assert_capturable(calls_of_a_step(replace(config, kernels="reference")))


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda network: torch.as_tensor(3, device="cuda"), "elsewhere"),
        (lambda network: network.flat_parameters.buffer.cpu(), "elsewhere"),
        (lambda network: network.flat_parameters.buffer.nonzero(), "waits"),
        (lambda network: bool(network.flat_parameters.buffer.sum() > 0), "waits"),
    ],
    ids=["from the host", "to the host", "size", "number"],
)
def test_what_cannot_be_captured_is_seen(fault: Any, found: str) -> None:
    with fake_gpu():
        network = build_network("custom", CustomTransformerConfig(TINY))
        with Calls() as calls, contextlib.suppress(RuntimeError):
            fault(network)
    assert getattr(calls, found)
