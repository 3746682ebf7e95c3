"""Estimates the time of a run on this machine: it times some of the run's own steps, with random tokens.

Steps are timed after warm-up, often enough to know their spread. If other processes use the processors, a step may take
forty times as long: its threads wait for each other, and each of them for a processor. If the system reports how long
they waited, this is noticed. Then a single thread does the work, and its processor time counts, which other processes
do not lengthen. On an idle machine a step takes between this time and this time divided by the number of threads.

If a step is too large to be timed, its FLOPs are divided by the rate of matrix products alone, which no real step
reaches. `how` says which of the two was done.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...config.schema import CustomTransformerConfig, RunConfig
from ..paired_timing import quartiles, seconds_of, wait_for
from .memory import parameter_count

if TYPE_CHECKING:
    from torch import Tensor

TASKS = Path("/proc/self/task")
LONGEST = 2.0  # [s] for timing steps; a quarter of it for warming up, and for each other measurement
WARM_UP = 4  # steps at most: the first compiles, and one of the next is recorded to be replayed (kernels/replay.py)
FEWEST, MOST = 3, 50  # steps that are timed
BUSY = 0.05  # largest share of the time that threads wait for a processor on an otherwise idle machine
LARGEST = 60_000_000  # parameters: a larger network takes seconds to build


@dataclass(frozen=True)
class Speed:
    """The speed of a network on this machine [s].

    least, most: bounds of `step`, as explained in `how`; None if no step was timed.
    busy: the share of the time in which a step waited for a processor that other processes used; None if the system
    does not report it.
    """

    step: float  # a whole optimizer step
    evaluated_token: float
    sampled_token: float
    how: str
    least: float | None = None
    most: float | None = None
    busy: float | None = None


def measure_speed(config: RunConfig, network_config: CustomTransformerConfig, fits: bool) -> Speed:
    """Measures the speed. `fits`: the run has enough memory here. Sets the number of threads like the run."""
    import torch

    from ...common.allocator import keep_freed_memory
    from ...models.flops import flops_per_token, matrix_product_rate

    if config.device.threads is not None:
        torch.set_num_threads(config.device.threads)
    keep_freed_memory()
    device = network_config.get_device()
    dtype = network_config.get_compute_dtype()
    T = network_config.max_seq_len
    token = flops_per_token(network_config, T) / matrix_product_rate(dtype, device)  # [s] at best
    rows = min(config.training.batch_size, int(LONGEST / (2 * (WARM_UP + FEWEST) * token * T)))
    if not fits or rows < 1 or parameter_count(network_config) > LARGEST:
        sequences = config.training.batch_size * config.training.gradient_accumulation_steps
        return Speed(
            step=token * T * sequences,
            evaluated_token=token / 3,
            sampled_token=token / 3,
            how="a lower bound, from the rate of matrix products alone, since its steps are too large to be tried here",
        )
    return _time_steps(config, network_config, rows)


def _time_steps(config: RunConfig, network_config: CustomTransformerConfig, rows: int) -> Speed:
    """Times steps with `rows` sequences; a larger batch takes proportionally longer."""
    import torch

    from ...models.implementations import build_network
    from ...models.training_step import build_optimizer
    from .full_batch import full_batch, next_token

    network = build_network(config.implementation.name, replace(network_config, seed=0))
    optimizer = build_optimizer(config, network)
    T = network_config.max_seq_len
    batch = full_batch(network_config, rows, network.device)
    read = next_token(network, batch)

    def one_pass() -> Tensor:
        network.zero_gradients()
        return network.loss_and_gradients(batch, denominator=rows * T, step=1)

    def update() -> None:
        optimizer.step(loss, 1e-5, config.training.max_grad_norm)

    for _ in repeated(WARM_UP, 2, LONGEST / 4):
        loss = one_pass()
        update()
        wait_for(network.device)

    def measured(clock: Callable[[], float], typical: Callable[[list[float]], float]) -> tuple[list[float], Speed]:
        """The seconds of whole steps, and the speed from their typical value."""

        def seconds(work: Callable[[], object]) -> float:
            return seconds_of(work, network.device, clock)

        steps = [seconds(one_pass) * sequences / rows + seconds(update) for _ in repeated(MOST, FEWEST, LONGEST)]
        predictions = [seconds(lambda: network.predict(batch)) for _ in repeated(1 + FEWEST, 2, LONGEST / 4)]
        samples = [seconds(read) for _ in repeated(MOST, 2, LONGEST / 4)]
        return steps, Speed(typical(steps), typical(predictions[1:]) / (rows * T), typical(samples[1:]), "")

    sequences = config.training.batch_size * config.training.gradient_accumulation_steps
    threads = torch.get_num_threads()
    waited, begin = waited_for_processor(), time.perf_counter()
    steps, speed = measured(time.perf_counter, statistics.median)
    busy = share_waited(waited, waited_for_processor(), time.perf_counter() - begin, threads)
    how = f"{len(steps)} steps of this network"
    how += f" with {rows} of its {sequences} sequences" if rows < sequences else ""
    how += " were timed just now"
    if busy is None or busy <= BUSY or network.device.type != "cpu":
        how += "; in brackets by the fastest of them and by their upper quartile"
        return replace(speed, how=how, least=min(steps), most=quartiles(steps)[2], busy=busy)
    torch.set_num_threads(1)  # then no thread waits, and the processor time is that of the work
    try:
        by_one, alone = measured(time.process_time, min)
    finally:
        torch.set_num_threads(threads)
    how += (
        f"; the machine was busy, {busy:.0%} of that time other processes had the processor, so this is the processor "
        "time of one thread, in brackets divided by all threads: a run takes longer while the others continue"
    )
    step, least = min(alone.step, *steps), min(min(by_one) / threads, *steps)
    evaluated_token = min(alone.evaluated_token, speed.evaluated_token)
    sampled_token = min(alone.sampled_token, speed.sampled_token)
    return Speed(step, evaluated_token, sampled_token, how, least, most=step, busy=busy)


def repeated(most: int, fewest: int, seconds: float) -> Iterator[int]:
    """0, 1, 2 ...: at least `fewest` numbers and at most `most`; after the fewest it stops when `seconds` are over."""
    end = time.perf_counter() + seconds
    for number in range(most):
        if number >= fewest and time.perf_counter() > end:
            return
        yield number


def waited_for_processor() -> float | None:
    """The total time that threads of this process have waited for a processor [s] (proc(5), /proc/pid/schedstat); None
    if the system does not report it."""
    try:
        accounts = [path.read_text(encoding="ascii").split() for path in TASKS.glob("*/schedstat")]
    except OSError:  # a thread ended meanwhile
        return None
    return sum(int(account[1]) for account in accounts) / 1e9 if accounts else None


def share_waited(before: float | None, after: float | None, seconds: float, threads: int) -> float | None:
    """The share of the time of all threads that they waited."""
    return None if before is None or after is None else max(0.0, after - before) / (seconds * threads)
