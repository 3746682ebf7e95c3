"""Looking inside a step: every activation and gradient by name, and no bit of the step changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from manual_backprop import CustomTransformer, CustomTransformerConfig, TorchTransformer
from manual_backprop.models.network import Batch
from manual_backprop.models.recorder import Recorder, gradient_name

ATTENTION = ("qkv", "scores", "probabilities", "context", "output")
FEED_FORWARD = ("hidden", "activated", "output")


def names(architecture: str) -> set[str]:
    """What both implementations record, forward; each has a gradient as well."""
    found = {"embedding.output", "logits"}
    for block in range(2):
        found |= {f"blocks.{block}.{name}" for name in ("input", "attention_norm.output", "feed_forward_norm.output")}
        found |= {f"blocks.{block}.attention.{name}" for name in ATTENTION}
        hidden = {"hidden"} if architecture != "llama" else {"gated"}
        found |= {f"blocks.{block}.feed_forward.{name}" for name in ({"activated", "output"} | hidden)}
        if architecture != "vaswani":
            found.add(f"blocks.{block}.residual")
        if architecture == "llama":
            found.add(f"blocks.{block}.attention.turned")
    return found | ({"final_norm.output"} if architecture != "vaswani" else set())


def step(network: Any, recorder: Recorder | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(0, 11, (2, 2, 5), generator=generator)
    if recorder is not None:
        network.recorder = recorder
    network.zero_gradients()
    return network.loss_and_gradients(Batch(tokens, targets), denominator=10, step=1)


def config(architecture: str, precision: str = "fp64") -> CustomTransformerConfig:
    sizes = {"vocab_size": 11, "d_model": 8, "n_blocks": 2, "n_heads": 2, "d_ffn": 14, "max_seq_len": 5}
    return CustomTransformerConfig(**sizes, architecture=architecture, precision=precision, dropout=0.1)


@pytest.mark.parametrize("architecture", ["gpt2", "vaswani", "llama"])
def test_every_activation_and_gradient_by_name(architecture: str) -> None:
    recorder = Recorder()
    step(CustomTransformer(config(architecture)), recorder)
    forward = names(architecture)
    assert set(recorder.tensors) == forward | {gradient_name(name) for name in forward}
    for name in forward:
        activation, gradient = recorder.tensors[name], recorder.tensors[gradient_name(name)]
        assert activation.shape == gradient.shape, name
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
    assert recorder.tensors["logits"].shape == (2, 5, 11)
    assert recorder.tensors["blocks.1.attention.probabilities"].shape == (2, 2, 5, 5)
    assert recorder.tensors["blocks.1.attention.qkv"].shape == (2, 5, 24)
    assert recorder.tensors["blocks.1.feed_forward.activated"].shape == (2, 5, 14)


@pytest.mark.parametrize("architecture", ["gpt2", "vaswani", "llama"])
def test_by_hand_and_by_autograd(architecture: str) -> None:
    """Not only the parameters' gradients agree: every tensor on the way does."""
    by_hand, by_autograd = Recorder(), Recorder()
    step(CustomTransformer(config(architecture)), by_hand)
    step(TorchTransformer(config(architecture)), by_autograd)
    assert set(by_hand.tensors) == set(by_autograd.tensors)
    for name, got in by_hand.tensors.items():
        want = by_autograd.tensors[name]
        assert (got - want).norm() <= 1e-12 * want.norm(), name


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "bf16_mixed"])
@pytest.mark.parametrize("architecture", ["gpt2", "vaswani", "llama"])
def test_recording_changes_no_bit(architecture: str, precision: str) -> None:
    network, watched = (CustomTransformer(config(architecture, precision)) for _ in range(2))
    losses = [step(network), step(watched, Recorder())]
    assert torch.equal(*losses)
    assert torch.equal(network.flat_gradients.buffer, watched.flat_gradients.buffer)


def test_patterns() -> None:
    network = CustomTransformer(config("gpt2"))
    for patterns, want in (
        (("blocks.1.attention.probabilities",), {"blocks.1.attention.probabilities"}),
        (("blocks.*.residual", "logits"), {"blocks.0.residual", "blocks.1.residual", "logits"}),
        (("blocks.0.feed_forward.d*",), {f"blocks.0.feed_forward.d{name}" for name in FEED_FORWARD}),
        (("nothing",), set()),
    ):
        recorder = Recorder(*patterns)
        step(network, recorder)
        assert set(recorder.tensors) == want


def test_a_later_step_overwrites_and_copies_are_kept() -> None:
    network, recorder = CustomTransformer(config("gpt2")), Recorder("logits")
    step(network, recorder)
    first = recorder.tensors["logits"]
    kept = first.clone()
    network.flat_gradients.buffer.fill_(1)
    network.update_parameters(0.1)
    step(network, recorder)
    assert not torch.equal(recorder.tensors["logits"], first)
    assert torch.equal(first, kept)
