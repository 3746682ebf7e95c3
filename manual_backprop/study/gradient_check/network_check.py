"""What is measured on a whole network: the hand-written step against its mirror, and against its own loss.

Rule 1 of DESIGN.md at two scales: the proof scale, at which every tensor matters to the loss, and the initial one.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...common.batch import Batch
from ...config.schema import CustomTransformerConfig
from ...models.custom import CustomTransformer
from ...models.mirror import TorchTransformer
from ...models.network import Network
from ...models.recorder import Recorder
from ...ops import IGNORED
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

STEP = 5  # which dropout masks
ODD = CustomTransformerConfig(  # all dimensions different, none a power of two
    vocab_size=17, d_model=18, n_blocks=2, n_heads=3, d_ffn=22, max_seq_len=9, precision="fp64", seed=3
)


def set_proof_scale(network: Network, seed: int = 0) -> None:
    """Matrices with std 2 / sqrt(d_in), gains 1 + 0.3 e, biases 0.3 e. (With std 0.5 everywhere a large network is so
    sharp that two right implementations part by 1e-11; at the initial scale bugs in attention hide in the noise.)"""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.parameters.items():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.3 * noise)
        elif parameter.dim() == 1:
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(noise * (2 / math.sqrt(parameter.shape[1])))


def draw_batch(config: CustomTransformerConfig, B: int, T: int, seed: int = 0, *, segments: bool = False) -> Batch:
    """Random tokens, some of the vocabulary's never; some targets ignored where there are enough of them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(max(config.vocab_size - 3, 1), (B, T), generator=generator)
    targets = torch.randint(config.vocab_size, (B, T), generator=generator)
    if B * T > 2:
        targets[torch.rand((B, T), generator=generator) < 0.25] = IGNORED
        targets[0, 0] = 0
    device = config.get_device()
    if not segments:
        return Batch(tokens.to(device), targets.to(device), first_row=2)
    place = torch.arange(T)
    first = torch.randint(1, max(T, 2), (B, 1), generator=generator)  # where the second document starts
    documents = torch.where(place > T - 2, -1, (place >= first).long())
    return Batch(tokens.to(device), targets.to(device), documents.to(device), first_row=2)


def wholly_zero(config: CustomTransformerConfig, batch: Batch) -> set[str]:
    """Parameters whose gradient is nothing but rounding: two right implementations differ by all of it, so that they
    are compared with zero and not with each other."""
    return {
        name for name, _, rows in zero_by_structure(config, batch) if isinstance(rows, slice) and rows.start is None
    }


def counted(batch: Batch) -> int:
    return int((batch.targets != IGNORED).sum())


def networks(
    config: CustomTransformerConfig, scale: str = "proof", peer: type[Network] = TorchTransformer
) -> tuple[CustomTransformer, Network]:
    """The hand-written network and its mirror, or another peer, with the same parameters."""
    by_hand, other = CustomTransformer(config), peer(config)
    if scale == "proof":
        set_proof_scale(by_hand, config.seed)
    other.load_parameters(by_hand.parameters)
    return by_hand, other


def step_in_place(
    network: Network, batch: Batch, denominator: int | None = None
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Loss and gradients of one step from zeroed gradients: the network's own, which its next step overwrites."""
    network.zero_gradients()
    loss = network.loss_and_gradients(batch, denominator=denominator or counted(batch), step=STEP)
    return loss, network.gradients


def step_of(network: Network, batch: Batch, denominator: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Likewise, as copies."""
    loss, gradients = step_in_place(network, batch, denominator)
    return loss.clone(), {name: gradient.clone() for name, gradient in gradients.items()}


def zero_by_structure(config: CustomTransformerConfig, batch: Batch) -> Iterator[tuple[str, str, Tensor | slice]]:
    """Gradients that are zero whatever the numbers: parameter, reason, which of its rows. The only list of them.

    A key's bias shifts all scores of a query alike, and softmax ignores that; at T = 1 the only probability is 1,
    whatever the score.
    """
    T = batch.tokens.shape[1]
    for block in range(config.n_blocks):
        place = f"blocks.{block}.attention."
        if config.traits.biases:
            yield f"{place}key.bias", "softmax ignores it", slice(None)
        if T == 1:
            for name in ("query.weight", "key.weight", *(["query.bias"] * config.traits.biases)):
                yield place + name, "T = 1", slice(None)
    if config.position_kind == "learned" and config.max_seq_len > T:
        yield "position_embedding.weight", "beyond T", slice(T, None)
    if not config.tied_head:
        unused = torch.ones(config.vocab_size, dtype=torch.bool)
        unused[batch.tokens.flatten().cpu()] = False
        if unused.any():
            yield "token_embedding.weight", "unused tokens", unused.nonzero()[:, 0]


@torch.no_grad()
def direction_error(network: CustomTransformer, batch: Batch, gradients: Mapping[str, Tensor], seed: int) -> float:
    """The slope of the loss along one random direction, against central differences.

    Relative to |gradient| |direction| / sqrt(P), the size that the slope of a random direction has: the direction may
    happen to be level. The padding between the parameters moves nothing. `gradients` may be the network's own, which
    are overwritten; its parameters are put back.
    """
    generator = torch.Generator().manual_seed(seed)
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
    return difference / (norm / math.sqrt(network.layout.size)) if norm else difference


def check_network(config: CustomTransformerConfig, batch: Batch, scale: str = "proof") -> list[Finding]:
    """All that is known about a right step, in float64: a finding for every parameter, and for what else holds."""
    subject = f"{config.architecture}, {scale} scale"
    by_hand, mirror = networks(config, scale)
    given = {"parameters": by_hand.flat_parameters.buffer, "tokens": batch.tokens, "targets": batch.targets}
    before = {name: tensor.clone() for name, tensor in given.items()}
    want_loss, want = step_of(mirror, batch)
    loss, gradients = step_of(by_hand, batch)
    apart = wholly_zero(config, batch)

    findings = [Finding(subject, "loss", error_of(loss, want_loss), AUTOGRAD_BAR)]
    errors = errors_of(gradients, want, apart)
    findings += [Finding(subject, f"d {name}", error, AUTOGRAD_BAR) for name, error in errors.items()]
    findings += _check_zeros(subject, config, batch, gradients)
    findings.append(
        Finding(
            subject,
            "slope along a random direction",
            direction_error(by_hand, batch, gradients, config.seed),
            DIRECTION_BAR,
        )
    )
    findings += _check_recorded(subject, by_hand, mirror, batch, loss, gradients)
    findings += _check_classic(subject, by_hand, mirror, batch, apart)
    findings += _check_accumulation(subject, by_hand, batch, loss, gradients, apart)
    made = [loss, *by_hand.gradients.values(), *by_hand.parameters.values(), by_hand.forward(batch.tokens)]
    findings += [
        Finding(subject, "tensors changed that are not gradients", differing(before, given), EXACT),
        Finding(subject, "tensors that require grad", float(sum(tensor.requires_grad for tensor in made)), EXACT),
    ]
    return findings


def _check_zeros(
    subject: str, config: CustomTransformerConfig, batch: Batch, gradients: dict[str, Tensor]
) -> list[Finding]:
    whole = norm_of(gradients.values())
    return [
        Finding(subject, f"d {name} is 0: {reason}", norm_of([gradients[name][rows]]) / (whole or 1), ZERO_BAR)
        for name, reason, rows in zero_by_structure(config, batch)
    ]


def _check_recorded(
    subject: str,
    by_hand: CustomTransformer,
    mirror: Network,
    batch: Batch,
    loss: Tensor,
    gradients: dict[str, Tensor],
) -> list[Finding]:
    """Every activation and every gradient by name; and that looking changes no bit."""
    recorders = Recorder(), Recorder()
    by_hand.recorder, mirror.recorder = recorders
    try:
        seen_loss, seen_gradients = step_of(by_hand, batch)
        step_of(mirror, batch)
    finally:
        by_hand.recorder = mirror.recorder = no_record
    got, want = (recorder.tensors for recorder in recorders)
    # gradients are small beside activations: each kind has a floor of its own
    kinds = {kind: [name for name in got.keys() | want.keys() if _is_gradient(name) == kind] for kind in (False, True)}
    findings = []
    for kind, names in kinds.items():
        errors = errors_of({n: got[n] for n in names if n in got}, {n: want[n] for n in names if n in want})
        name = max(errors, key=lambda name: errors[name])
        what = "gradients" if kind else "activations"
        findings.append(Finding(subject, f"{len(errors)} {what} by name, worst {name}", errors[name], AUTOGRAD_BAR))
    changed = differing(gradients | {"loss": loss}, seen_gradients | {"loss": seen_loss})
    return [*findings, Finding(subject, "tensors changed by looking at them", changed, EXACT)]


def _is_gradient(name: str) -> bool:
    return name.rpartition(".")[2].startswith("d")


def _check_classic(
    subject: str, by_hand: CustomTransformer, mirror: Network, batch: Batch, apart: set[str]
) -> list[Finding]:
    """forward(tokens) -> logits, backward(dlogits), with something else predicted in between."""
    generator = torch.Generator().manual_seed(1)
    logits, want_logits = (network.forward(batch.tokens, batch.segments, step=STEP) for network in (by_hand, mirror))
    dlogits = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits)
    kept = {"logits": logits.clone(), "dlogits": dlogits.clone()}
    by_hand.predict(batch.tokens.flip(0))
    for network in (by_hand, mirror):
        network.zero_gradients()
        network.backward(dlogits)
    errors = errors_of(by_hand.gradients, mirror.gradients, apart)
    return [
        Finding(subject, "logits of forward", error_of(logits, want_logits), AUTOGRAD_BAR),
        Finding(subject, "gradients of backward, the worst", max(errors.values()), AUTOGRAD_BAR),
        Finding(
            subject, "logits and dlogits unchanged", differing(kept, {"logits": logits, "dlogits": dlogits}), EXACT
        ),
    ]


def _check_accumulation(
    subject: str, by_hand: CustomTransformer, batch: Batch, loss: Tensor, gradients: dict[str, Tensor], apart: set[str]
) -> list[Finding]:
    """A batch row by row is the batch at once; a step twice without zeroing is twice the step."""
    denominator = counted(batch)
    by_hand.zero_gradients()
    total = torch.zeros_like(loss)
    for row in range(batch.tokens.shape[0]):
        piece = slice(row, row + 1)
        segments = None if batch.segments is None else batch.segments[piece]
        part = Batch(batch.tokens[piece], batch.targets[piece], segments, batch.first_row + row)
        total += by_hand.loss_and_gradients(part, denominator=denominator, step=STEP)
    in_pieces = errors_of(by_hand.gradients, gradients, apart)
    step_of(by_hand, batch)
    by_hand.loss_and_gradients(batch, denominator=denominator, step=STEP)
    twice = errors_of(by_hand.gradients, {name: 2 * gradient for name, gradient in gradients.items()}, apart)
    return [
        Finding(subject, "loss row by row", error_of(total, loss), AUTOGRAD_BAR),
        Finding(subject, "gradients row by row, the worst", max(in_pieces.values()), AUTOGRAD_BAR),
        Finding(subject, "gradients twice, the worst", max(twice.values()), AUTOGRAD_BAR),
    ]


def odd_cases(architecture: str) -> Iterator[tuple[str, CustomTransformerConfig, Batch, str]]:
    """Small networks of one architecture that together take every path: name, config, batch, scale."""
    plain = replace(ODD, architecture=architecture)
    rich = replace(plain, dropout=0.2, label_smoothing=0.1, norm_epsilon=0.3)
    if plain.traits.positions == "rotary":
        rich = replace(rich, rotary_base=30.0)
    yield "plain", plain, draw_batch(plain, 2, 7), "proof"
    yield "initial scale", plain, draw_batch(plain, 2, 7, seed=1), "initial"
    yield "segments, dropout", rich, draw_batch(rich, 3, 9, segments=True), "proof"
    if plain.traits.gated:
        for n_heads, n_kv_heads in ((3, 1), (9, 3)):
            config = replace(rich, n_heads=n_heads, n_kv_heads=n_kv_heads, n_blocks=1)
            batch = draw_batch(config, 2, 5, seed=2, segments=True)
            yield f"{n_heads} heads share {n_kv_heads}", config, batch, "proof"
    else:
        for activation in ("gelu_tanh", "gelu", "relu"):
            config = replace(plain, activation=activation, n_blocks=1)
            yield activation, config, draw_batch(config, 2, 5, seed=2), "proof"
    yield "T=1", plain, draw_batch(plain, 3, 1, seed=3), "proof"
    yield "B=1 T=1", rich, draw_batch(rich, 1, 1, seed=4), "proof"
    deep = replace(rich, n_blocks=3, n_heads=9)
    yield "8 rows", deep, draw_batch(deep, 8, 6, seed=5), "proof"
