"""The progress of a run on the terminal: one live line, or plain lines if the output is not a terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL = 5.0  # [s] between two plain lines


class ProgressLine:
    """Shows completed steps, loss, learning rate, gradient norm, tokens per second, and remaining time."""

    def __init__(self, first_step: int, max_steps: int):
        self.first_step, self.max_steps = first_step, max_steps
        self.console = Console(soft_wrap=True)
        self._last_plain = 0.0
        self._start = time.monotonic()
        self._progress: Progress | None = None
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[values]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=self.console,
            )
            self._task = self._progress.add_task("train", total=max_steps, completed=first_step, values="")
            self._progress.start()

    def update(
        self, step: int, loss: float, learning_rate: float, gradient_norm: float, tokens_per_second: float
    ) -> None:
        values = f"loss {loss:.4f}  rate {learning_rate:.2e}  gradient {gradient_norm:.3f}"
        values += f"  {tokens_per_second:,.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, values=values)
            return
        now = time.monotonic()
        if now - self._last_plain < PLAIN_INTERVAL and step < self.max_steps:
            return
        self._last_plain = now
        left = (now - self._start) / max(1, step - self.first_step) * (self.max_steps - step)
        self.console.print(f"step {step}/{self.max_steps}  {values}  {left:.0f} s left", highlight=False)

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        self.console.print(escape(text), highlight=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
