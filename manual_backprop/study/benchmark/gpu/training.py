"""(e) The two settings of nanoGPT's README, trained by this library: the loss on held-out text, and the time.

Sizes, batches, learning rates and steps are those of nanoGPT's configuration for Shakespeare's characters, and of the
command for a CPU in its README. The loss is the mean over the last tenth of the text; nanoGPT samples 200 batches of
it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ....common.batch import Batch
from ....config.schema import CustomTransformerConfig
from ....models.implementations import build_network
from ....models.network import Network
from ....models.training_step import TrainingStep
from ....ops import cross_entropy_forward
from ....optim.schedule import learning_rate
from ...paired_timing import wait_for
from ..cases import MEDIUM, SMALL
from .processes import Failed, each
from .tables import Part, Setting, Table

PEAK, FLOOR, WARM_UP = 1e-3, 1e-4, 100
EVALUATIONS = 20


@dataclass(frozen=True)
class Training:
    name: str
    sizes: dict[str, int | float]
    batch_size: int
    steps: int
    readme: float  # the loss in nanoGPT's README


TRAININGS = (
    Training("README, CPU: 4 blocks of 128", SMALL | {"dropout": 0.0}, batch_size=12, steps=2000, readme=1.88),
    Training("README, GPU: 6 blocks of 384", MEDIUM | {"dropout": 0.2}, batch_size=64, steps=5000, readme=1.4697),
)
TINY_SIZES = {"n_blocks": 1, "n_heads": 2, "d_model": 16, "d_ffn": 32, "max_seq_len": 8, "dropout": 0.1}
TINY = Training("tiny", TINY_SIZES, batch_size=4, steps=40, readme=0.0)


def training(setting: Setting) -> Part:
    columns = (
        *("setting", "steps", "seconds", "ms a step", "tokens/s"),
        *("loss", "best loss", "at step", "nanoGPT's README"),
    )
    table = Table("Characters of the given text, bf16_mixed", columns)
    if not setting.text:
        table.remarks.append("no text was given: --text FILE (nanoGPT's is tiny Shakespeare)")
        yield table
        return
    for one, found in each(train, (TINY,) if setting.small else TRAININGS, setting):
        if isinstance(found, Failed):
            (table.remarks if found.late else table.failures).append(f"{one.name}: {found.message}")
            continue
        steps, seconds, losses = found
        best = min(losses, key=losses.__getitem__)
        tokens = one.batch_size * one.sizes["max_seq_len"]
        cells = one.name, steps, seconds, 1e3 * seconds / steps, tokens * steps / seconds
        table.rows.append((*cells, losses[steps], losses[best], best, one.readme))
        if steps < one.steps:
            table.remarks.append(f"{one.name}: the time was over after {steps} of {one.steps} steps")
    table.remarks.append("seconds: of all steps, without evaluations")
    yield table


def train(one: Training, setting: Setting) -> tuple[int, float, dict[int, float]]:
    """The number of steps made, their seconds, and the loss by step."""
    text = Path(setting.text).read_text(encoding="utf-8")
    characters = sorted(set(text))
    numbers = {character: number for number, character in enumerate(characters)}
    device = torch.device(setting.device)
    tokens = torch.tensor([numbers[character] for character in text]).to(device)
    learned, held_out = tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]
    settings = {"vocab_size": len(characters), "precision": "bf16_mixed", "device": str(device), "kernels": "fused"}
    compiles = {"compile": "never" if device.type == "cpu" else "auto"}
    config = CustomTransformerConfig.of({**one.sizes, **settings, **compiles})
    network = build_network("custom", config)
    step = TrainingStep(network, network.adamw(0.1, (0.9, 0.99), 1e-8), max_grad_norm=1.0)
    batches = random_batches(learned, one.batch_size, config.max_seq_len)
    counted, every = one.batch_size * config.max_seq_len, max(1, one.steps // EVALUATIONS)
    losses: dict[int, float] = {}
    warm_up = min(WARM_UP, one.steps // 10)
    number, seconds = 0, 0.0
    while number < one.steps and (not losses or time.monotonic() < setting.until - seconds / len(losses)):
        begin = time.perf_counter()
        for _ in range(min(every, one.steps - number)):
            number += 1
            rate = learning_rate("cosine", number, max_steps=one.steps, peak=PEAK, floor=FLOOR, warmup_steps=warm_up)
            step([next(batches)], counted, rate, number)
        wait_for(device)
        seconds += time.perf_counter() - begin
        losses[number] = held_out_loss(network, held_out, one.batch_size, config.max_seq_len)
    return number, seconds, losses


def random_batches(tokens: Tensor, B: int, T: int) -> Iterator[Batch]:
    generator = torch.Generator(tokens.device).manual_seed(0)
    places = torch.arange(T, device=tokens.device)
    while True:
        first = torch.randint(len(tokens) - T, (B, 1), generator=generator, device=tokens.device)
        yield Batch(tokens[first + places], tokens[first + 1 + places])


@torch.no_grad()
def held_out_loss(network: Network, tokens: Tensor, B: int, T: int) -> float:
    """The mean loss over all whole windows of T tokens, one after the other."""
    count = (len(tokens) - 1) // T
    read, targets = tokens[: count * T].view(count, T), tokens[1 : count * T + 1].view(count, T)
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for some, wanted in zip(read.split(B), targets.split(B), strict=True):
        loss, _ = cross_entropy_forward(network.predict(some), wanted, 1)
        total += loss
    return float(total) / (count * T)
