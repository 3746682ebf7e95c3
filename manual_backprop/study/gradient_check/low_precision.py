"""How much a low precision costs by hand, measured against what it costs PyTorch's autograd.

Both networks get the same parameters, rounded to the precision first, and float64 has the last word on them. One draw
of rounding errors is luck: a ratio of single draws swings by a factor of two between two right implementations, now and
then a draw is ten times worse for both, and where rounding carries one number over the kink of a ReLU, a thousand times
for one of them. So the ratio of a tensor is the median over several networks and batches: a bug is in all of them.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...config.schema import CustomTransformerConfig
from .measure import LOW_PRECISION_BAR, Finding, error_of, floor_of
from .network_case import draw_batch, wholly_zero
from .network_check import networks, step_in_place
from .op_case import Case, Draw
from .op_check import autograd, call, gradients_of, upstream_of
from .op_table import Row

SEEDS = range(8)
ENOUGH_TO_ROUND = CustomTransformerConfig(  # large enough that errors are averages, not accidents
    vocab_size=61, d_model=48, n_blocks=2, n_heads=4, d_ffn=96, max_seq_len=24, precision="fp64"
)
# Half of the distance between 1 and the next number: how near a format comes to anything.
UNIT = {"fp32": 2.0**-24, "bf16": 2.0**-9, "bf16_mixed": 2.0**-9}


Errors = dict[str, tuple[float, float]]  # of each tensor, against float64: by hand, and autograd's


def median_ratios(draws: Iterable[Errors], smallest: Callable[[str], float]) -> dict[str, float]:
    """The error by hand over autograd's, by name. Errors below `smallest(name)` count as that much."""
    logarithms: dict[str, list[float]] = {}
    for draw in draws:
        for name, (by_hand, autograd_) in draw.items():
            least = smallest(name)
            logarithms.setdefault(name, []).append(math.log(max(by_hand, least) / max(autograd_, least)))
    return {name: math.exp(statistics.median(several)) for name, several in logarithms.items()}


def check_network_precision(
    config: CustomTransformerConfig,
    scale: str,
    seeds: Iterable[int] = SEEDS,
    B: int = 4,
    T: int | None = None,
    peer: str = "torch",
) -> list[Finding]:
    """The ratio for the loss and for every parameter whose gradient is more than rounding."""
    draws = (draw_errors(replace(config, seed=seed), scale, B, T or config.max_seq_len, peer) for seed in seeds)
    # The loss is one number, in which the errors of single tokens happen to cancel or not: less than the format can
    # express is no difference. Gradients have no such allowance.
    ratios = median_ratios(draws, lambda name: UNIT[config.precision] if name == "loss" else 1e-30)
    subject = f"{config.architecture} {config.network} {config.precision}, {scale} scale"
    return [Finding(subject, name, ratio, LOW_PRECISION_BAR) for name, ratio in ratios.items()]


def draw_errors(config: CustomTransformerConfig, scale: str, B: int, T: int, peer: str) -> Errors:
    """Of the loss and of every gradient that is more than rounding, at weights and tokens drawn from `config.seed`."""
    batch = draw_batch(config, B, T, config.seed)
    by_hand, mirror = networks(config, scale, peer)
    exact = type(by_hand)(replace(config, precision="fp64"))
    with torch.no_grad():
        exact.flat_parameters.buffer.copy_(by_hand.flat_parameters.buffer)
    (loss, got), (mirror_loss, mirrored), (want_loss, want) = (
        step_in_place(network, batch) for network in (by_hand, mirror, exact)
    )
    floor, apart = floor_of(want), wholly_zero(config, batch)
    errors = {"loss": (error_of(loss, want_loss), error_of(mirror_loss, want_loss))}
    for name in [name for name in want if name not in apart]:
        errors[f"d {name}"] = error_of(got[name], want[name], floor), error_of(mirrored[name], want[name], floor)
    return errors


def check_op_precision(row: Row, dtype: torch.dtype, pairs: ModuleType = ops) -> list[Finding]:
    """The ratio for every output and gradient of an op's typical case, in larger sizes."""

    def draw(seed: int) -> Errors:
        generator = torch.Generator().manual_seed(seed)
        sizes = {"B": 4, "T": 24, "D": 48, "F": 96, "V": 61, "H": 4}
        case = next(row.cases(Draw(generator, dtype, **sizes)))
        outputs, cache = call(row, case, pairs)
        upstream = upstream_of(row, case, outputs, generator)
        buffers = {f"d{name}": torch.zeros_like(parameter) for name, parameter in case.parameters.items()}
        returned = getattr(pairs, f"{row.name}_backward")(**upstream, cache=cache, **buffers)
        gradients = gradients_of(row, returned)
        got = outputs | buffers | {f"d{name}": gradients[name] for name in row.returns if name in case.inputs}
        mirrored = _together(autograd(row, case, upstream))
        want = _together(autograd(row, _widened(case), {n: _wide(value) for n, value in upstream.items()}))
        return {name: (error_of(got[name], want[name]), error_of(mirrored[name], want[name])) for name in want}

    # An output that is stored exactly as it should be has the error of its format; a few draws have none at all.
    unit = torch.finfo(dtype).eps / 2
    subject = f"{row.name} {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
    ratios = median_ratios(map(draw, SEEDS), lambda name: unit / 8)
    return [Finding(subject, name, ratio, LOW_PRECISION_BAR) for name, ratio in ratios.items()]


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
