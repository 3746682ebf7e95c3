"""How long a run will take on this machine: a few of its own steps are made and timed, on random tokens.

Where a step is too much for that, the arithmetic is divided by the rate of matrix products alone, which no real step
reaches; `how` says which of the two it was.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

from .config import CustomTransformerConfig, RunConfig
from .memory_estimate import parameter_count

LONGEST = 1.0  # [s] that may be spent on timing steps; as much again on the rest
MOST_STEPS = 5
LARGEST = 60_000_000  # parameters: a larger network takes seconds to build


@dataclass(frozen=True)
class Speed:
    """Of a network on this machine [s]."""

    step: float  # a whole optimizer step
    evaluated_token: float
    sampled_token: float
    how: str


def measure_speed(config: RunConfig, network_config: CustomTransformerConfig, fits: bool) -> Speed:
    """`fits`: the run has enough memory here. Changes the number of threads as the run would."""
    import torch

    from .flops import flops_per_token, matrix_product_rate
    from .memory import keep_freed_memory

    if config.device.threads is not None:
        torch.set_num_threads(config.device.threads)
    keep_freed_memory()
    device = network_config.get_device()
    dtype = torch.bfloat16 if network_config.precision == "bf16_mixed" else network_config.get_dtype()
    T = network_config.max_seq_len
    token = flops_per_token(network_config, T) / matrix_product_rate(dtype, device)  # [s] at best
    rows = min(config.training.batch_size, int(LONGEST / (MOST_STEPS * token * T)))
    if not fits or rows < 1 or parameter_count(network_config) > LARGEST:
        sequences = config.training.batch_size * config.training.gradient_accumulation_steps
        return Speed(
            step=token * T * sequences,
            evaluated_token=token / 3,
            sampled_token=token / 3,
            how="at least: at the rate of matrix products alone, since its steps are too large to be tried here",
        )
    return _time_steps(config, network_config, rows)


def _time_steps(config: RunConfig, network_config: CustomTransformerConfig, rows: int) -> Speed:
    """With `rows` sequences at a time; a larger batch takes proportionally longer."""
    import torch

    from .batch import Batch
    from .build import build_optimizer
    from .models import build_network
    from .models.decoding import IncrementalDecoder

    network = build_network(config.implementation.name, replace(network_config, seed=0))
    optimizer = build_optimizer(config, network)
    T = network_config.max_seq_len
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(network_config.vocab_size, (rows, T), generator=generator).to(network.device)

    def now() -> float:
        if network.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    passes: list[float] = []
    updates: list[float] = []
    begin = now()
    while len(passes) <= MOST_STEPS and (len(passes) < 2 or now() - begin < LONGEST):
        network.zero_gradients()
        start = now()
        loss = network.loss_and_gradients(Batch(tokens, tokens), denominator=rows * T, step=1)
        middle = now()
        optimizer.step(loss, 1e-5, config.training.max_grad_norm)
        passes.append(middle - start)
        updates.append(now() - middle)
    timed = len(passes) - 1  # the first warms up
    start = now()
    network.predict(tokens)
    evaluation = now() - start
    decoder = IncrementalDecoder(network)
    decoder.read(tokens[:1, : max(1, T // 2)])
    start = now()
    decoder.read(tokens[:1, :1])
    sample = now() - start
    sequences = config.training.batch_size * config.training.gradient_accumulation_steps
    one_pass = statistics.median(passes[1:]) / rows
    return Speed(
        step=one_pass * sequences + statistics.median(updates[1:]),
        evaluated_token=evaluation / (rows * T),
        sampled_token=sample,
        how=f"{timed} steps of this network with {rows} of its {sequences} sequences were timed just now"
        if rows < sequences
        else f"{timed} steps of this network were timed just now",
    )
