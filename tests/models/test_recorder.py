"""The recorder gets every activation and gradient by name, and changes no bit of the step."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manual_backprop import CustomTransformer, CustomTransformerConfig, TorchTransformer
from manual_backprop.common.batch import Batch
from manual_backprop.models.recorder import Recorder, gradient_name, scoped
from manual_backprop.ops.numerics import no_record
from manual_backprop.training.inspection.inspector import Inspector

ATTENTION = ("qkv", "scores", "probabilities", "context", "output")
FEED_FORWARD = ("hidden", "activated", "output")


def names(architecture: str) -> set[str]:
    """The activations that both implementations record; each has a gradient as well."""
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


class Operations(TorchDispatchMode):
    """The names of all operations, and the most bytes of tensors that were made and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in self.sizes.keys() | given:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return made


NETWORKS = [(CustomTransformer, "reference"), (CustomTransformer, "fused"), (TorchTransformer, "reference")]


def network_of(kind: Any, kernels: str, architecture: str = "gpt2", **more: Any) -> Any:
    sizes = {"vocab_size": 11, "d_model": 8, "n_blocks": 2, "n_heads": 2, "d_ffn": 14, "max_seq_len": 5}
    config = CustomTransformerConfig(**(sizes | more), architecture=architecture, kernels=kernels, compile="never")
    return kind(config)


@pytest.mark.parametrize("architecture", ["gpt2", "vaswani", "llama"])
@pytest.mark.parametrize(("kind", "kernels"), NETWORKS)
def test_what_nobody_wants_is_neither_computed_nor_copied(kind: Any, kernels: str, architecture: str) -> None:
    """A recorder that wants nothing changes no operation of a step, and one that wants a tensor adds copies of it."""
    network = network_of(kind, kernels, architecture)
    for _ in range(3):  # until memory has its size
        step(network)
    operations: list[list[str]] = []
    for recorder in (None, Recorder("nothing"), Recorder("blocks.1.feed_forward.dactivated")):
        with Operations() as watched:
            step(network, recorder)
        operations.append(watched.names)
    plain, nothing, one = operations
    assert nothing == plain
    more = len(one) - len(plain)
    assert 1 <= more <= 8, "memory, views, the copy, and the copy of the recorder"


def test_scopes_are_asked_as_they_are_told() -> None:
    recorder = Recorder("blocks.1.attention.*")
    attention = scoped(scoped(recorder, "blocks.1."), "attention.")
    assert attention.wants("context")
    assert not scoped(recorder, "blocks.0.attention.").wants("context")
    attention("context", torch.ones(2))
    assert set(recorder.tensors) == {"blocks.1.attention.context"}
    assert scoped(no_record, "blocks.1.") is no_record
    assert not no_record.wants("blocks.1.attention.context")


@pytest.mark.parametrize(("kind", "kernels"), NETWORKS[:2])
def test_an_inspected_step_needs_little_more_memory(kind: Any, kernels: str) -> None:
    """It needs the inspected tensors of one block at a time, and a copy of the parameters, but no logits or scores."""
    B, T, V, D, F = 16, 64, 500, 32, 48
    network = network_of(kind, kernels, vocab_size=V, d_model=D, d_ffn=F, max_seq_len=T)
    tokens = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    optimizer, peaks = network.sgd(0.0, 0.9), []
    for every in (None, None, 1):  # in the first the arena gets its size
        watch = Inspector(network, every, 9).watch(3)
        with Operations() as watched:
            watch.batch(Batch(tokens, tokens))
            loss = network.loss_and_gradients(Batch(tokens, tokens), denominator=B * T, step=3)
            watch.gradients()
            optimizer.step(loss, 1e-3)
            watch.update()
        peaks.append(watched.peak)
    probabilities, activated, logits = (4 * B * n for n in (network.config.n_heads * T * T, T * F, T * V))
    parameters = 4 * network.flat_parameters.buffer.numel()
    assert probabilities < logits, "or this shows nothing"
    assert peaks[2] - peaks[1] <= 2 * probabilities + 2 * activated + parameters < 2 * logits
