"""What to do when a loss does not fall: seven checks on one's own config and text, and a learning rate that suits."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manual_backprop.common.errors import EXIT_DONE, EXIT_FAILED, InputError, StorageError
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.config.arguments import Parser

if TYPE_CHECKING:
    from rich.console import Console

    from manual_backprop.config.schema import RunConfig

DESCRIPTION = """\
What to look at when a loss does not fall. Gives the arguments of manual_backprop.run seven checks, each of which
passes or fails with the reason:

  1  labels are inputs shifted by one: each is the token that follows in the text; of rows with one answer each, answers
     that the network can give, and not all the same
  2  the initial loss is near ln V, that of a model that knows nothing of V tokens, or labels; of numbers, near that of
     a model that answers 0
  3  every parameter gets a gradient that is finite, not zero, and of sane size
  4  every parameter changes in a step at the given learning rate, by a sane ratio of its own size
  5  one batch, a single row of 32 tokens or fewer (of one answer each, 4 rows), is learned by heart: more than 80 % of
     the loss gone within 10 steps (sgd: 40), more than 95 % in the end
  6  several batches in turn go down together: what one teaches is not lost on the others
  7  batching, shuffling and masking in the loader: every token once an epoch, in a new order, documents apart where
     batching.mask_documents says so, padding not counted; of rows, the same ones for the same step

Between 4 and 5, a learning-rate range test trains with a rate that grows from step to step, picks the one at which 5
and 6 are made, and draws its curve as a picture. A given rate outside what suits the network is named.

A check that fails because an earlier one did says "follows". Checks 2 to 6 begin with initial weights (init_from is
left out), without dropout and label smoothing, which keep a loss from coming near 0. Whether each gradient points in
the right direction is the question of python -m manual_backprop.verify."""

EPILOG = """\
Examples

  python -m manual_backprop.diagnose
  python -m manual_backprop.diagnose model=tiny optimizer.learning_rate=1
  python -m manual_backprop.diagnose dataset=text dataset.path=FILE tokenizer=char batching=padded

What it draws goes to outputs/diagnose; no run is made and nothing is tracked. Exit codes: 0 all checks passed,
1 one failed, 2 wrong input."""

FOLDER = "diagnose"  # below outputs/, for the pictures
STYLES = {"passed": "green", "FAILED": "bold red", "follows": "yellow"}


def config_described(overrides: Sequence[str]) -> RunConfig:
    """Raises InputError in one line for whatever is wrong with the command line."""
    from manual_backprop.training.command_line import described_job

    config = described_job(overrides, "diagnose").config
    if config.resume is not None:
        raise InputError("resume: a diagnosis begins from new weights; give the overrides of the run in its place")
    return config


def diagnose(config: RunConfig, outputs: Path, console: Console) -> int:
    """Shows each finding as it comes, and returns how many checks have failed."""
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
        console.print("init_from is left out: the checks are about a network with initial weights\n", style="yellow")
    found = []
    for finding in diagnosis.findings():
        if finding.check == 5 and diagnosis.range_test is not None:
            path = outputs / FOLDER / f"{name}-learning-rate.png"
            style = None if diagnosis.range_test.suits(diagnosis.rate) else "yellow"
            try:
                drawn = draw_range_test(diagnosis.range_test, diagnosis.rate, path, name)
                curve = f"\n   its curve: {path}" if drawn else ""
            except StorageError as error:  # the checks are what it was called for
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
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="what manual_backprop.run would be given")
    config = config_described(parser.parse(arguments).overrides)

    from rich.console import Console

    from manual_backprop.trained_models.saved_model import OUTPUTS

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    return EXIT_FAILED if diagnose(config, OUTPUTS, console) else EXIT_DONE


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
