"""The summary at the end of a run: results, where they are stored, and the next commands."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ..config.plugins import given_plugins
from ..tasks import Evaluated, Final
from ..tracking import RunDirectory
from ..tracking.late_delivery import next_in_mlflow
from .run_facts import RunFacts


def print_summary(
    facts: RunFacts,
    directory: RunDirectory,
    evaluated: Evaluated,
    final: Final,
    predictions: Sequence[str],
    skipped: int,
    seconds: float,
) -> None:
    """Prints the summary. `skipped`: steps that were not finite; `seconds`: since the run was built in this process."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for title, text in (*evaluated.summary, *final.summary):
        table.add_row(title, text)
    steps = facts.model.step - facts.first_step
    early = f" of {facts.max_steps - facts.first_step}, stopped early" if facts.model.step < facts.max_steps else ""
    tokens = facts.order.tokens_before(facts.model.step)
    table.add_row("trained", f"{steps} steps{early}, {tokens:,} tokens; {seconds:.0f} s in all")
    if skipped:
        table.add_row("not finite", f"{skipped} steps were skipped")
    table.add_row("run directory", os.path.relpath(directory.path))
    console = Console(soft_wrap=True)
    console.print()
    for text in predictions[:1]:
        console.print(
            Panel(escape(text.strip()), title=facts.task.predictions_title, title_align="left"), soft_wrap=False
        )
    console.print(table)
    console.print("\nNext:", style="bold")
    further = "training.patience=null" if early else f"training.max_steps={2 * facts.max_steps}"
    plugins = "".join(f"--plugin {given} " for given in given_plugins())
    commands = [
        f"python -m manual_backprop.run {plugins}resume={directory.path.name} {further}",
    ]
    if facts.config.tracking.name == "mlflow":
        commands.insert(0, next_in_mlflow(directory.path, "compare runs"))
    for command in commands:
        console.print(f"  {command}", highlight=False)
