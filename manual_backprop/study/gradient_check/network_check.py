"""Checks a whole network: the hand-written step against its mirror, and against differences of its own loss.

It does so at two scales of the parameters: the proof scale, at which every tensor matters to the loss, and the initial
scale.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ...common.batch import AnyBatch
from ...config.schema import CustomTransformerConfig
from ...models.implementations import build_network
from ...models.network import Network
from ...models.recorder import Recorder
from ...models.step import HandWrittenNetwork
from ...ops.numerics import no_record
from .measure import (
    AUTOGRAD_BAR,
    DIRECTION_BAR,
    DIRECTION_STEP,
    EXACT,
    ZERO_BAR,
    Finding,
    differing,
    error_of,
    errors_of,
    norm_of,
)
from .network_case import counted, rows_of, tensors_of, wholly_zero, zero_by_structure

STEP = 5  # chooses the dropout masks

Step = tuple[Tensor, Mapping[str, Tensor]]  # the loss and the gradients of a step
Measured = Iterator[tuple[str, float, float]]  # quantities, their errors, and their bars


def set_proof_scale(network: Network, seed: int = 0) -> None:
    """Sets matrices with std 2 / sqrt(d_in), gains 1 + 0.3 e, biases 0.3 e. (With std 0.5 everywhere the loss of a
    large network is so sharp that two correct implementations differ by 1e-11; at the initial scale rounding hides bugs
    in attention.)"""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.parameters.items():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.3 * noise)
        elif parameter.dim() == 1:
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(noise * (2 / math.sqrt(parameter.shape[1])))


def networks(
    config: CustomTransformerConfig, scale: str = "proof", peer: str = "torch"
) -> tuple[HandWrittenNetwork, Network]:
    """The hand-written network and its mirror, or another implementation of it, with the same parameters."""
    by_hand, other = build_network("custom", config), build_network(peer, config)
    assert isinstance(by_hand, HandWrittenNetwork)
    if scale == "proof":
        set_proof_scale(by_hand, config.seed)
    other.load_parameters(by_hand.parameters)
    return by_hand, other


def step_in_place(network: Network, batch: AnyBatch, denominator: int | None = None) -> Step:
    """Loss and gradients of one step from zeroed gradients, not copied: the network's next step overwrites them."""
    network.zero_gradients()
    loss = network.loss_and_gradients(batch, denominator=denominator or counted(batch), step=STEP)
    return loss, network.gradients


def step_of(network: Network, batch: AnyBatch, denominator: int | None = None) -> Step:
    """Loss and gradients of one step, as copies."""
    loss, gradients = step_in_place(network, batch, denominator)
    return loss.clone(), {name: gradient.clone() for name, gradient in gradients.items()}


@torch.no_grad()
def check_direction(
    subject: str, network: HandWrittenNetwork, batch: AnyBatch, gradients: Mapping[str, Tensor]
) -> Finding:
    """The error of the slope of the loss along one random direction, against central differences.

    The error is relative to |gradient| |direction| / sqrt(P), the typical slope in a random direction, since the slope
    itself may happen to be near 0. The padding between parameters has no effect. `gradients` may be the network's own,
    which are overwritten; its parameters are restored.
    """
    generator = torch.Generator().manual_seed(network.config.seed)
    direction = torch.randn(network.layout.size, generator=generator, dtype=torch.float64).to(network.device)
    direction /= norm_of([direction])
    slope = 0.0
    for name, gradient in gradients.items():
        offset = network.layout.offsets[name]
        slope += float(direction[offset : offset + gradient.numel()] @ gradient.flatten())
    norm = norm_of(gradients.values())
    parameters = network.flat_parameters.buffer
    before = parameters.clone()

    def loss_at(distance: float) -> float:
        torch.add(before, direction, alpha=distance, out=parameters)
        return float(step_in_place(network, batch)[0])

    difference = abs((loss_at(DIRECTION_STEP) - loss_at(-DIRECTION_STEP)) / (2 * DIRECTION_STEP) - slope)
    parameters.copy_(before)
    error = difference / (norm / math.sqrt(network.layout.size)) if norm else difference
    return Finding(subject, "slope along a random direction", error, DIRECTION_BAR)


def compare_step(
    subject: str, config: CustomTransformerConfig, batch: AnyBatch, step: Step, mirrored: Step
) -> list[Finding]:
    """Compares loss and gradients of a step by hand with those of its mirror. Of every gradient that is zero by
    structure, the error is its share of the whole gradient."""
    (loss, gradients), (want_loss, want) = step, mirrored
    errors = errors_of(gradients, want, wholly_zero(config, batch))
    whole = norm_of(gradients.values())
    return [
        Finding(subject, "loss", error_of(loss, want_loss), AUTOGRAD_BAR),
        *(Finding(subject, f"d {name}", error, AUTOGRAD_BAR) for name, error in errors.items()),
        *(
            Finding(subject, f"d {name} is 0: {reason}", norm_of([gradients[name][rows]]) / (whole or 1), ZERO_BAR)
            for name, reason, rows in zero_by_structure(config, batch)
        ),
    ]


def check_network(config: CustomTransformerConfig, batch: AnyBatch, scale: str = "proof") -> list[Finding]:
    """Checks everything that holds for a correct step, in float64: a finding for every parameter and other property."""
    subject = f"{config.architecture} {config.network}, {scale} scale"
    by_hand, mirror = networks(config, scale)
    given = {"parameters": by_hand.flat_parameters.buffer, **tensors_of(batch)}
    before = {name: tensor.clone() for name, tensor in given.items()}
    mirrored, step = step_of(mirror, batch), step_of(by_hand, batch)

    findings = compare_step(subject, config, batch, step, mirrored)
    findings.append(check_direction(subject, by_hand, batch, step[1]))
    for check in (_check_recorded, _check_classic, _check_accumulation):
        findings += [Finding(subject, *measured) for measured in check(by_hand, mirror, batch, step)]
    made = [step[0], *by_hand.gradients.values(), *by_hand.parameters.values(), by_hand.forward(batch)]
    findings += [
        Finding(subject, "tensors changed that are not gradients", differing(before, given), EXACT),
        Finding(subject, "tensors that require grad", float(sum(tensor.requires_grad for tensor in made)), EXACT),
    ]
    return findings


def _check_recorded(by_hand: HandWrittenNetwork, mirror: Network, batch: AnyBatch, step: Step) -> Measured:
    """Checks every recorded activation and gradient by name, and that recording changes no bit."""
    recorders = Recorder(), Recorder()
    by_hand.recorder, mirror.recorder = recorders
    try:
        loss, gradients = step_of(by_hand, batch)
        step_of(mirror, batch)
    finally:
        by_hand.recorder = mirror.recorder = no_record
    for what in ("activations", "gradients"):  # which are small compared with activations, so each has its own floor
        got, want = (
            {name: x for name, x in recorder.tensors.items() if _is_gradient(name) == (what == "gradients")}
            for recorder in recorders
        )
        errors = errors_of(got, want)
        name = max(errors, key=errors.__getitem__)
        yield f"{len(errors)} {what} by name, worst {name}", errors[name], AUTOGRAD_BAR
    changed = differing({**step[1], "loss": step[0]}, {**gradients, "loss": loss})
    yield "tensors changed by recording", changed, EXACT


def _is_gradient(name: str) -> bool:
    return name.rpartition(".")[2].startswith("d")


def _check_classic(by_hand: HandWrittenNetwork, mirror: Network, batch: AnyBatch, step: Step) -> Measured:
    """Checks forward(batch) -> logits and backward(dlogits), with another prediction in between."""
    generator = torch.Generator().manual_seed(1)
    logits, want_logits = (network.forward(batch, step=STEP) for network in (by_hand, mirror))
    dlogits = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits)
    given = {"logits": logits, "dlogits": dlogits}
    kept = {name: tensor.clone() for name, tensor in given.items()}
    by_hand.predict(rows_of(batch, torch.arange(len(batch.targets) - 1, -1, -1)))
    for network in (by_hand, mirror):
        network.zero_gradients()
        network.backward(dlogits)
    errors = errors_of(by_hand.gradients, mirror.gradients, wholly_zero(by_hand.config, batch))
    yield "logits of forward", error_of(logits, want_logits), AUTOGRAD_BAR
    yield "gradients of backward, the worst", max(errors.values()), AUTOGRAD_BAR
    yield "logits and dlogits unchanged", differing(kept, given), EXACT


def _check_accumulation(by_hand: HandWrittenNetwork, mirror: Network, batch: AnyBatch, step: Step) -> Measured:
    """Checks accumulation: a batch row by row equals the batch at once; a step twice without zeroing is twice the
    step."""
    (loss, gradients), denominator, apart = step, counted(batch), wholly_zero(by_hand.config, batch)
    by_hand.zero_gradients()
    total = torch.zeros_like(loss)
    for row in range(len(batch.targets)):
        part = rows_of(batch, slice(row, row + 1), batch.first_row + row)
        total += by_hand.loss_and_gradients(part, denominator=denominator, step=STEP)
    in_pieces = errors_of(by_hand.gradients, gradients, apart)
    step_of(by_hand, batch)
    by_hand.loss_and_gradients(batch, denominator=denominator, step=STEP)
    twice = errors_of(by_hand.gradients, {name: 2 * gradient for name, gradient in gradients.items()}, apart)
    yield "loss row by row", error_of(total, loss), AUTOGRAD_BAR
    yield "gradients row by row, the worst", max(in_pieces.values()), AUTOGRAD_BAR
    yield "gradients twice, the worst", max(twice.values()), AUTOGRAD_BAR
