"""plan=true: what a run would be, without making it. Prints, and writes nothing."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from .config import RunConfig
from .flops import flops_per_token
from .models.network import parameter_shapes

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "bf16_mixed": 4}
MOMENT_BYTES = {"fp64": 8}  # elsewhere 4
MOMENTS = {"adamw": 2, "sgd": 1}


def print_plan(config: RunConfig) -> None:
    """What follows from a config. A char tokenizer's vocabulary is known only from its text."""
    console = Console(soft_wrap=True)
    tokens = {"byte": 257, "bpe": config.tokenizer.vocab_size}.get(config.tokenizer.name)
    if config.model.vocab_size is None and tokens is None:
        console.print("The vocabulary is that of the text; sizes below count 128 tokens.", style="bold")
    model, training, network = config.model, config.training, config.network(tokens or 128)
    parameters = sum(math.prod(shape) for shape in parameter_shapes(network).values())
    tokens_per_step = training.batch_size * training.gradient_accumulation_steps * model.max_seq_len
    flops = flops_per_token(network, model.max_seq_len)
    precision = config.precision.name
    moments = MOMENTS[config.optimizer.name] * MOMENT_BYTES.get(precision, 4)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    table.add_row("parameters", f"{parameters:,}")
    table.add_row("tokens a step", f"{tokens_per_step:,}")
    table.add_row("FLOPs", f"{flops:,} a token, {flops * tokens_per_step:.3g} a step")
    if training.max_steps is not None:
        table.add_row("in all", f"{training.max_steps} steps, {training.max_steps * tokens_per_step:,} tokens")
    table.add_row(
        "state", f"{parameters * (2 * BYTES[precision] + moments) / 1e6:,.1f} MB: parameters, gradients, moments"
    )
    table.add_row("checkpoint", f"{parameters * (BYTES[precision] + moments) / 1e6:,.1f} MB")
    console.print(table, highlight=False)
    console.print("\nNothing was started; leave out plan=true to run it.")
