"""Compare every hand-written gradient with autograd's, with central differences, and with zero where it must be zero.

`python -m manual_backprop.verify` takes seconds and prints every error beside its limit. This module prints the
results; `study/gradient_check/` computes them and explains why in this way.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from manual_backprop.common.columns import table_console
from manual_backprop.common.errors import EXIT_DONE, EXIT_FAILED
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.config.arguments import Parser

if TYPE_CHECKING:
    from rich.console import Console

    from manual_backprop.study.gradient_check.verification import Section

COMMAND = "python -m manual_backprop.verify"
DESCRIPTION = """\
Compares every hand-written gradient with autograd's, in float64, at random weights and with random upstream gradients.
The error of a tensor is

    |got - want| / max(|want|, 1e-3 |all gradients| / sqrt(number of tensors))

in Euclidean norms, so that neither a small tensor nor one that is zero can hide a bug. The limits are:

    1e-12    against autograd: every op, every parameter, every activation and gradient inside a step
    1e-06    the loss along one random direction, against central differences
    1e-13    gradients that are zero for all weights, relative to all gradients
    exact    inputs, weights and upstream gradients keep every bit; backward twice gives the same twice
    2 x      in fp32, bf16 and bf16_mixed: the error against float64, relative to autograd's in that precision; the
             median over several draws of weights and tokens, since rounding errors vary, while a bug is in all of them

Without arguments: all ops, and small decoders, encoder-decoders and encoders of every architecture in unusual shapes
(B=1, T=1, S=1, segments, padding, empty sources, dropout), each with the reference pairs and with the fused kernels.
With arguments, those of manual_backprop.run: the network that they describe, with short sequences, and all ops with its
kernels; a precision other than fp64 is measured too."""
EPILOG = f"""\
Examples

  {COMMAND}
  {COMMAND} model=tiny
  {COMMAND} model=small architecture=vaswani precision=bf16
  {COMMAND} model.d_model=48 model.n_heads=3 architecture.activation=gelu
  {COMMAND} task=reversal network=encoder_decoder

Exit codes: 0 all errors are below their limits, 1 some are not, 2 wrong arguments."""


def show(sections: Sequence[Section], console: Console) -> None:
    from rich.table import Table

    from manual_backprop.study.gradient_check.verification import bar_in_words, lines_of

    for section in sections:
        table = Table(
            title=section.title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False
        )
        lines = lines_of(section)
        several = len({group for group, _ in lines}) > 1  # a table of one network need not name it in every line
        for column in (
            ("of", "what", "error", "bar", "", "worst in") if several else ("what", "error", "bar", "", "worst in")
        ):
            table.add_column(column, justify="right" if column in ("error", "bar") else "left", no_wrap=True)
        shown = ""
        for (group, quantity), worst in lines.items():
            case = worst.subject.partition(": ")[2] if worst.error > 0 else ""
            verdict = "[green]ok[/]" if worst.ok else "[bold red]FAILED[/]"
            named = [group if group != shown else ""] if several else []
            table.add_row(*named, quantity, _number(worst.error), bar_in_words(worst.bar), verdict, case)
            shown = group
        console.print(table)
        console.print()


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2f} x" if 0.01 < value < 100 else f"{value:.1e}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("verify", DESCRIPTION, EPILOG)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="the settings of a network, as for manual_backprop.run"
    )
    overrides = parser.parse(arguments).overrides
    start = time.monotonic()
    config = None
    if overrides:
        from manual_backprop.training.command_line import described_network

        config, unused = described_network(overrides, "verify")
        if unused:
            print(f"without effect, since only the network is verified: {', '.join(unused)}", file=sys.stderr)
    from manual_backprop.study.gradient_check.verification import check_everything, check_one, one_thread, verdict_of

    console = table_console()
    with one_thread():
        sections = check_one(config) if config else check_everything()
    show(sections, console)
    verdict = verdict_of(sections, time.monotonic() - start)
    console.print(verdict, soft_wrap=True, style="bold red" if verdict.startswith("FAILED") else "bold green")
    return EXIT_FAILED if verdict.startswith("FAILED") else EXIT_DONE


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
