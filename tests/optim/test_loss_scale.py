"""Dynamic loss scaling (precision=fp16_mixed): what it changes, what it leaves, and when."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from manual_backprop.common.errors import ConfigError
from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.models import network as networks
from manual_backprop.models.implementations import build_network
from manual_backprop.models.network import Network
from manual_backprop.optim import loss_scale
from manual_backprop.optim.loss_scale import FIRST, LARGEST, LossScale
from manual_backprop.study.gradient_check import ENOUGH_TO_ROUND, check_network_precision, draw_batch

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = CustomTransformerConfig(
    vocab_size=19, d_model=16, n_blocks=1, n_heads=2, d_ffn=24, max_seq_len=6, precision="fp16_mixed"
)
YES, NO, ONE, INFINITE = torch.tensor(True), torch.tensor(False), torch.tensor(1.0), torch.tensor(torch.inf)


def test_the_factor_falls_with_an_overflow_and_rises_after_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "STEPS", 3)
    scale = LossScale(torch.device("cpu"))
    factors = []
    for finite in (YES, NO, NO, YES, YES, YES, YES):
        assert not scale.update(finite, ONE)  # it was the factor: the step has not failed
        factors.append(float(scale.factor))
    assert factors == [FIRST, *[FIRST / 2], *[FIRST / 4] * 3, *[FIRST / 2] * 2]
    scale.factor.fill_(LARGEST)
    for _ in range(3):
        scale.update(YES, ONE)
    assert scale.factor == LARGEST
    assert scale.update(NO, INFINITE)  # the loss itself
    scale.factor.fill_(1)
    assert scale.update(NO, ONE)  # and no smaller factor is left
    assert scale.factor == 1


def gradients_of(network: Network, denominator: int) -> dict[str, torch.Tensor]:
    batch = draw_batch(network.config, 2, 6)
    network.zero_gradients()
    for _ in range(2):
        network.loss_and_gradients(batch, denominator=denominator, step=1)
    return {name: gradient.clone() for name, gradient in network.gradients.items()}


@pytest.mark.parametrize("implementation", ["custom", "torch", "baseline"])
def test_gradients_are_as_they_are_and_small_ones_are_not_lost(implementation: str) -> None:
    """Gradients are summed over two batches. The loss is divided by so large a number that float16 gradients would be
    0."""
    network = build_network(implementation, HALF)
    wide = build_network(implementation, replace(HALF, precision="fp32"))
    got, want = gradients_of(network, 10**8), gradients_of(wide, 10**8)
    error = sum((got[name] - want[name]).square().sum() for name in want).sqrt()
    assert error < 3e-3 * sum(gradient.square().sum() for gradient in want.values()).sqrt()
    assert network.loss_scale is not None
    network.loss_scale.factor.fill_(1)
    lost = gradients_of(network, 10**8)
    assert sum(gradient.square().sum() for gradient in lost.values()) == 0


@pytest.mark.gradients
def test_the_gradient_of_logits_is_scaled_too() -> None:
    """A gradient of logits that would be 0 in float16, with `forward` and `backward`."""
    batch = draw_batch(HALF, 2, 6)
    dlogits = 1e-9 * torch.randn(2, 6, HALF.vocab_size)
    network, wide = (build_network("custom", replace(HALF, precision=name)) for name in ("fp16_mixed", "fp32"))
    for one in (network, wide):
        one.zero_gradients()
        one.forward(batch.tokens)
        one.backward(dlogits)
    error = sum((network.gradients[name] - want).square().sum() for name, want in wide.gradients.items()).sqrt()
    assert 0 < error < 3e-3 * sum(want.square().sum() for want in wide.gradients.values()).sqrt()


@pytest.mark.parametrize("implementation", ["custom", "baseline"])
def test_an_overflow_changes_nothing_but_the_factor(implementation: str) -> None:
    network = build_network(implementation, HALF)
    optimizer = network.adamw(0.1, (0.9, 0.95), 1e-8)
    assert network.loss_scale is not None
    network.loss_scale.factor.fill_(2.0**40)
    before = network.export_parameters()
    batch = draw_batch(HALF, 2, 6)
    for number in range(1, 40):
        network.zero_gradients()
        loss = network.loss_and_gradients(batch, denominator=12, step=number)
        norm = optimizer.step(loss, 1e-3, 1.0)
        if norm.isfinite():
            break
        assert all(torch.equal(parameter, before[name]) for name, parameter in network.parameters.items())
    assert 10 < number < 35
    assert optimizer.counts.tolist() == [1, 0, 0, 0]  # one update, and no step that has failed
    assert float(network.loss_scale.factor) == 2.0 ** (40 - number + 1)
    assert torch.equal(optimizer.state()["loss_scale"], network.loss_scale.state)


def test_gradients_are_as_near_as_autocasts() -> None:
    findings = check_network_precision(replace(ENOUGH_TO_ROUND, precision="fp16_mixed"), "proof", range(3))
    assert [f"{f.quantity} {f.error:.2f}" for f in findings if not f.ok] == []


def test_precisions_that_a_cpu_does_not_have_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^precision=tf32: only an NVIDIA GPU has it, and this is device=cpu"):
        build_network("custom", replace(HALF, precision="tf32"))
    monkeypatch.setattr(networks, "has_float16_products", lambda: False)
    with pytest.raises(ConfigError, match=r"^precision=fp16_mixed: this PyTorch multiplies no float16 matrices"):
        build_network("custom", HALF)
