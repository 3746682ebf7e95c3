"""The rounding errors of a low precision by hand, relative to those of PyTorch's autograd.

Both networks get the same parameters, rounded to the precision first; float64 gives the reference. A single draw of
rounding errors is random. The ratio of single draws varies by a factor of two between two correct implementations.
Sometimes a draw is ten times worse for both, and if rounding moves a number across the kink of a ReLU, a thousand times
for one of them. So the ratio of a tensor is the median over several networks and batches: a bug shows in all of them.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...common.batch import AnyBatch
from ...config.schema import CustomTransformerConfig
from ...models.network import Network
from .measure import AUTOGRAD_BAR, LOW_PRECISION_BAR, Finding, error_of, floor_of
from .network_case import draw_batch, on_device, wholly_zero
from .network_check import networks, step_in_place
from .op_case import Draw
from .op_check import autograd, call, gradients_of, upstream_of
from .op_table import Row

SEEDS = range(8)
CPU = torch.device("cpu")
ENOUGH_TO_ROUND = CustomTransformerConfig(  # large enough for errors to average out
    vocab_size=61, d_model=48, n_blocks=2, n_heads=4, d_ffn=96, max_seq_len=24, precision="fp64"
)
SIZES = {"B": 4, "T": 24, "D": 48, "F": 96, "V": 61, "H": 4}  # of an op's case, likewise
# Half of the distance between 1 and the next number: how near a format comes to anything.
UNIT = {"fp32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-9, "bf16_mixed": 2.0**-9, "fp16_mixed": 2.0**-11}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


Errors = dict[str, tuple[float, float]]  # by tensor, against float64: the error by hand, and autograd's


def median_ratios(draws: Iterable[Errors], smallest: Callable[[str], float]) -> dict[str, float]:
    """The median of error by hand / autograd's error, by name. Errors below `smallest(name)` count as that value."""
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
    # The loss is one number, in which the errors of single tokens may or may not cancel: a difference below the
    # rounding error of the dtype does not count. For gradients there is no such allowance.
    ratios = median_ratios(draws, lambda name: UNIT[config.precision] if name == "loss" else 1e-30)
    subject = f"{config.architecture} {config.network} {config.precision}, {scale} scale"
    return [Finding(subject, name, ratio, LOW_PRECISION_BAR) for name, ratio in ratios.items()]


def draw_errors(config: CustomTransformerConfig, scale: str, B: int, T: int, peer: str) -> Errors:
    """The errors of the loss and of every gradient that is more than rounding, for weights and tokens of
    `config.seed`."""
    batch = draw_batch(config, B, T, config.seed)
    by_hand, mirror = networks(config, scale, peer)
    exact = type(by_hand)(replace(config, precision="fp64", device="cpu"))
    with torch.no_grad():
        exact.flat_parameters.buffer.copy_(by_hand.flat_parameters.buffer)
    (loss, got), (mirror_loss, mirrored), (want_loss, want) = (
        step_on_cpu(network, one)
        for network, one in ((by_hand, batch), (mirror, batch), (exact, on_device(batch, "cpu")))
    )
    floor, apart = floor_of(want), wholly_zero(config, batch)
    errors = {"loss": (error_of(loss, want_loss), error_of(mirror_loss, want_loss))}
    for name in [name for name in want if name not in apart]:
        errors[f"d {name}"] = error_of(got[name], want[name], floor), error_of(mirrored[name], want[name], floor)
    return errors


def step_on_cpu(network: Network, batch: AnyBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step, copied to the CPU."""
    loss, gradients = step_in_place(network, batch)
    return loss.cpu(), {name: gradient.cpu() for name, gradient in gradients.items()}


def check_op_precision(
    row: Row,
    dtype: torch.dtype,
    seeds: Iterable[int] = SEEDS,
    pairs: Any = ops,
    device: torch.device = CPU,
    sizes: Mapping[str, int] = SIZES,
) -> list[Finding]:
    """The ratio for every output and gradient of an op's typical case, in larger `sizes`; autograd runs on this device,
    float64 on the CPU. In fp64 it is the error itself."""

    def draw(seed: int) -> Errors:
        generator = torch.Generator().manual_seed(seed)
        case = next(row.cases(Draw(generator, dtype, **sizes)))
        there = case.on(device)
        outputs, cache = call(row, there, pairs)
        upstream = upstream_of(row, there, outputs, generator)
        buffers = {f"d{name}": torch.zeros_like(parameter) for name, parameter in there.parameters.items()}
        returned = getattr(pairs, f"{row.name}_backward")(**upstream, cache=cache, **buffers)
        gradients = gradients_of(row, returned)
        got = outputs | buffers | {f"d{name}": gradients[name] for name in row.returns if name in case.inputs}
        exact = autograd(row, case.mapped(_wide), {name: _wide(value) for name, value in upstream.items()})
        mirrored, want = (outputs | gradients for outputs, gradients in (autograd(row, there, upstream), exact))
        return {name: (error_of(got[name].cpu(), x), error_of(mirrored[name].cpu(), x)) for name, x in want.items()}

    # A correctly rounded output has the rounding error of its dtype; in a few draws it has none at all.
    unit = torch.finfo(dtype).eps / 2
    subject = f"{row.name} {NAMES[dtype]}"
    if dtype == torch.float64:
        errors = [(name, by_hand) for seed in seeds for name, (by_hand, _) in draw(seed).items()]
        return [Finding(subject, name, error, AUTOGRAD_BAR) for name, error in errors]
    ratios = median_ratios(map(draw, seeds), lambda name: unit / 8)
    return [Finding(subject, name, ratio, LOW_PRECISION_BAR) for name, ratio in ratios.items()]


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double().cpu() if value.is_floating_point() else value.cpu()
    return torch.float64 if value in NAMES else value
