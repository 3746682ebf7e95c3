"""Find out why a loss does not fall: seven checks of a config and its data, and a learning-rate range test."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manual_backprop.common.columns import table_console
from manual_backprop.common.errors import EXIT_DONE, EXIT_FAILED, InputError, StorageError
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.config.arguments import Parser

if TYPE_CHECKING:
    from rich.console import Console

    from manual_backprop.config.schema import RunConfig

DESCRIPTION = """\
Finds out why a loss does not fall. It makes seven checks of a run, given by the arguments of manual_backprop.run; each
passes, or fails with a reason:

  1  targets are inputs shifted by one: each is the next token of the text; for tasks with one target per row: targets
     that the network can output, and not all the same
  2  the initial loss is near ln V, that of a model that has not learned anything about V tokens or labels; for numbers,
     near that of a model that outputs 0
  3  every parameter gets a gradient that is finite, not zero, and of a reasonable size
  4  every parameter changes in a step at the given learning rate, by a reasonable ratio to its own size
  5  the model overfits one batch, a single row of at most 32 tokens (4 rows for tasks with one target per row): more
     than 80 % of the loss is gone within 10 steps (sgd: 40), more than 95 % at the end
  6  the losses of several batches, trained in turn, fall together: one does not undo what was learned from another
  7  batching, shuffling and masking: every token once in an epoch, in a new order, documents separated if
     batching.mask_documents is set, padding ignored; for other tasks, the same rows for the same step

Between 4 and 5, a learning-rate range test trains with a learning rate that grows from step to step, chooses the one
for 5 and 6, and draws its curve as a picture. It warns if the given learning rate is outside the useful range.

A check that fails because an earlier one did says "follows". Checks 2 to 6 start from initial weights (init_from is
ignored), without dropout and label smoothing, which keep a loss above 0. To check that each gradient is correct, use
python -m manual_backprop.verify."""

EPILOG = """\
Examples

  python -m manual_backprop.diagnose
  python -m manual_backprop.diagnose model=tiny optimizer.learning_rate=1
  python -m manual_backprop.diagnose dataset=text dataset.path=FILE tokenizer=char batching=padded

Pictures go to outputs/diagnose; no run directory is created and nothing is tracked. Exit codes: 0 all checks passed,
1 one failed, 2 wrong input."""

FOLDER = "diagnose"  # below outputs/, for the pictures
STYLES = {"passed": "green", "FAILED": "bold red", "follows": "yellow"}


def config_described(overrides: Sequence[str]) -> RunConfig:
    """The config of a command line. Raises InputError."""
    from manual_backprop.training.command_line import described_job

    config = described_job(overrides, "diagnose").config
    if config.resume is not None:
        raise InputError("resume: a diagnosis starts from initial weights; give the overrides of the run instead")
    return config


def diagnose(config: RunConfig, outputs: Path, console: Console) -> int:
    """Print each finding as it comes, and return the number of failed checks."""
    import torch

    from manual_backprop.common.allocator import keep_freed_memory
    from manual_backprop.config.written_config import default_run_name
    from manual_backprop.study.diagnosis import FAILED, PASSED, Diagnosis
    from manual_backprop.study.diagnosis.rates import draw_range_test
    from manual_backprop.tasks import open_task

    start = time.monotonic()
    if config.device.threads is not None:
        torch.set_num_threads(config.device.threads)
    keep_freed_memory()
    task = open_task(config, outputs / "datasets")
    diagnosis = Diagnosis(task)
    name = config.run_name or default_run_name(config)
    console.print(
        f"{name}: {config.implementation.name}, {config.precision.name} on {diagnosis.network_config.get_device()}, "
        f"{task.about}\n",
        soft_wrap=True,
    )
    if config.init_from is not None:
        console.print("init_from is ignored: the checks need a network with initial weights\n", style="yellow")
    found = []
    for finding in diagnosis.findings():
        if finding.check == 5 and diagnosis.range_test is not None:
            path = outputs / FOLDER / f"{name}-learning-rate.png"
            style = None if diagnosis.range_test.suits(diagnosis.rate) else "yellow"
            try:
                drawn = draw_range_test(diagnosis.range_test, diagnosis.rate, path, name)
                curve = f"\n   its curve: {path}" if drawn else ""
            except StorageError as error:  # the checks matter more than the picture
                curve = f"\n   {error}"
            console.print(f"   {diagnosis.range_test.about(diagnosis.rate)}{curve}", style=style, soft_wrap=True)
        style = STYLES[finding.status]
        console.print(f"{finding.check}  [{style}]{finding.status:<8}[/]{finding.title}", soft_wrap=True)
        console.print(f"   {finding.reason}", style="dim", markup=False, soft_wrap=True)
        found.append(finding)
    wrong = [finding for finding in found if finding.status != PASSED]
    seconds = f"({time.monotonic() - start:.0f} s)"
    if not wrong:
        console.print(f"\nok: all {len(found)} checks passed {seconds}", style="bold green")
    else:
        roots = ", ".join(f"{finding.check} ({finding.title})" for finding in wrong if finding.status == FAILED)
        console.print(f"\nFAILED: {roots} {seconds}", style="bold red", soft_wrap=True)
    return len(wrong)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("diagnose", DESCRIPTION, EPILOG)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the arguments of manual_backprop.run")
    config = config_described(parser.parse(arguments).overrides)
    from manual_backprop.trained_models.saved_model import OUTPUTS

    return EXIT_FAILED if diagnose(config, OUTPUTS, table_console()) else EXIT_DONE


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
