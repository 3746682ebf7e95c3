"""How much a low precision costs by hand, measured against what it costs PyTorch's autograd.

Both networks get the same parameters, rounded to the precision first, and float64 has the last word on them. One draw
of rounding errors is luck: a ratio of single draws swings by a factor of two between two right implementations, and
now and then a draw is ten times worse for both. So the ratio of a tensor is the geometric mean over several networks
and batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..config import CustomTransformerConfig
from ..models.custom import CustomTransformer
from ..models.mirror import TorchTransformer
from ..models.network import Network
from .measure import LOW_PRECISION_BAR, Finding, error_of, floor_of
from .network_check import draw_batch, networks, step_of, wholly_zero
from .op_check import autograd, call, upstream_of
from .op_table import Case, Draw, Row

SEEDS = range(8)
ENOUGH_TO_ROUND = CustomTransformerConfig(  # large enough that errors are averages, not accidents
    vocab_size=61, d_model=48, n_blocks=2, n_heads=4, d_ffn=96, max_seq_len=24, precision="fp64"
)
# Half of the distance between 1 and the next number: how near a format comes to anything.
UNIT = {"fp32": 2.0**-24, "bf16": 2.0**-9, "bf16_mixed": 2.0**-9}


@dataclass(frozen=True)
class Comparison:
    """The error by hand and that of autograd, geometric means over the draws."""

    by_hand: float
    autograd: float

    @property
    def ratio(self) -> float:
        return self.by_hand / self.autograd


def compare(draws: Iterable[dict[str, tuple[float, float]]], smallest: Callable[[str], float]) -> dict[str, Comparison]:
    """Errors (by hand, autograd) of every draw, by name. Errors below `smallest(name)` count as that much."""
    logarithms: dict[str, list[tuple[float, float]]] = {}
    for draw in draws:
        for name, (by_hand, autograd_) in draw.items():
            least = smallest(name)
            logarithms.setdefault(name, []).append((math.log(max(by_hand, least)), math.log(max(autograd_, least))))
    return {
        name: Comparison(*(math.exp(sum(side) / len(side)) for side in zip(*pairs, strict=True)))
        for name, pairs in logarithms.items()
    }


def check_network_precision(
    config: CustomTransformerConfig,
    scale: str,
    seeds: Iterable[int] = SEEDS,
    B: int = 4,
    T: int | None = None,
    peer: type[Network] = TorchTransformer,
) -> list[Finding]:
    """The ratio for the loss and for every parameter whose gradient is more than rounding."""
    found = compare_networks(config, scale, seeds, B, T or config.max_seq_len, peer)
    subject = f"{config.architecture} {config.precision}, {scale} scale"
    return [Finding(subject, name, comparison.ratio, LOW_PRECISION_BAR) for name, comparison in found.items()]


def compare_networks(
    config: CustomTransformerConfig, scale: str, seeds: Iterable[int], B: int, T: int, peer: type[Network]
) -> dict[str, Comparison]:
    def draw(seed: int) -> dict[str, tuple[float, float]]:
        seeded = replace(config, seed=seed)
        batch = draw_batch(seeded, B, T, seed)
        by_hand, mirror = networks(seeded, scale, peer)
        exact = CustomTransformer(replace(seeded, precision="fp64"))
        with torch.no_grad():
            exact.flat_parameters.buffer.copy_(by_hand.flat_parameters.buffer)
        (loss, got), (mirror_loss, mirrored), (want_loss, want) = (step_of(n, batch) for n in (by_hand, mirror, exact))
        floor, apart = floor_of(want), wholly_zero(config, batch)
        errors = {"loss": (error_of(loss, want_loss), error_of(mirror_loss, want_loss))}
        for name in [name for name in want if name not in apart]:
            errors[f"d {name}"] = error_of(got[name], want[name], floor), error_of(mirrored[name], want[name], floor)
        return errors

    # The loss is one number, in which the errors of single tokens happen to cancel or not: less than the format can
    # express is no difference. Gradients have no such allowance.
    return compare(map(draw, seeds), lambda name: UNIT[config.precision] if name == "loss" else 1e-30)


def check_op_precision(
    row: Row, dtype: torch.dtype, seeds: Iterable[int] = SEEDS, pairs: ModuleType = ops
) -> list[Finding]:
    """The ratio for every output and gradient of an op's typical case, in larger sizes."""

    def draw(seed: int) -> dict[str, tuple[float, float]]:
        generator = torch.Generator().manual_seed(seed)
        sizes = {"B": 4, "T": 24, "D": 48, "F": 96, "V": 61, "H": 4}
        case = next(row.cases(Draw(generator, dtype, **sizes)))
        outputs, cache = call(row, case, pairs)
        upstream = upstream_of(row, case, outputs, generator)
        buffers = {f"d{name}": torch.zeros_like(parameter) for name, parameter in case.parameters.items()}
        returned = getattr(pairs, f"{row.name}_backward")(**upstream, cache=cache, **buffers)
        got = outputs | buffers | {f"d{name}": returned for name in row.returns if name in case.inputs}
        mirrored = _together(autograd(row, case, upstream))
        want = _together(autograd(row, _widened(case), {n: _wide(value) for n, value in upstream.items()}))
        return {name: (error_of(got[name], want[name]), error_of(mirrored[name], want[name])) for name in want}

    # An output that is stored exactly as it should be has the error of its format; a few draws have none at all.
    unit = torch.finfo(dtype).eps / 2
    subject = f"{row.name} {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
    found = compare(map(draw, seeds), lambda name: unit / 8)
    return [Finding(subject, name, comparison.ratio, LOW_PRECISION_BAR) for name, comparison in found.items()]


def _together(pair: tuple[dict[str, Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    return pair[0] | pair[1]


def _wide(value: Any) -> Any:
    if value is torch.float32 or value is torch.bfloat16:
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _widened(case: Case) -> Case:
    inputs, parameters, settings = (
        {name: _wide(value) for name, value in group.items()} for group in (case.inputs, case.parameters, case.settings)
    )
    return Case(case.name, inputs, parameters, settings, case.unused, case.upstream)
