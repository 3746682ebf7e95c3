"""The last thing a run prints: what was learned, where it lies, what to type next."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from .tracking import RunDirectory

if TYPE_CHECKING:
    from .runner import Runner


def print_summary(runner: Runner, directory: RunDirectory) -> None:
    assert runner.evaluation is not None
    evaluation = runner.evaluation[1]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    gain = runner.bigram_loss - evaluation.loss
    side = "below" if gain >= 0 else "above"
    table.add_row(
        "validation loss",
        f"{evaluation.loss:.4f} nats a token, {abs(gain):.2f} {side} the bigram model's {runner.bigram_loss:.3f} "
        f"(unigram {runner.unigram_loss:.3f})",
    )
    table.add_row(
        "",
        f"perplexity {evaluation.perplexity:.1f}, {evaluation.bits_per_byte:.3f} bits a byte, "
        f"accuracy {evaluation.accuracy:.1%} of {evaluation.tokens:,} tokens",
    )
    steps = runner.step - runner.first_step
    seconds = time.monotonic() - runner.started
    table.add_row(
        "trained", f"{steps} steps, {runner.order.tokens_before(runner.step):,} tokens; {seconds:.0f} s in all"
    )
    skipped = int(runner.optimizer.nonfinite_steps)
    if skipped:
        table.add_row("not finite", f"{skipped} steps were skipped")
    table.add_row("run directory", os.path.relpath(directory.path))
    console = Console(soft_wrap=True)
    console.print()
    for text in runner.samples[:1]:
        console.print(Panel(escape(text.strip()), title="a sample", title_align="left"), soft_wrap=False)
    console.print(table)
    console.print("\nNext:", style="bold")
    commands = [
        f"python -m manual_backprop.run resume={directory.path.name} training.max_steps={2 * runner.max_steps}",
    ]
    if runner.config.tracking.name == "mlflow":
        commands.insert(0, "mlflow ui                # compare runs: http://127.0.0.1:5000")
    for command in commands:
        console.print(f"  {command}", highlight=False)
