"""`python -m manual_backprop.tools.kernel_gains` writes docs/kernels.md: what each optimization of the kernels gains.

A whole training step with `kernels=fused` is compared with the same step without one optimization at a time
(`study/benchmark/ablations.py`). The processes of the bench measure it: in turns, with the noise floor and the peak
memory, after a check that the gradients agree. All numbers on the page are measured.
"""

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ..common.durable_files import write_page
from ..common.exit_codes import exit_code_of
from ..config.arguments import Parser, whole
from ..study.benchmark.ablations import OPTIMIZATIONS
from ..study.benchmark.cases import CASES
from ..study.benchmark.choices import about_cases, add_choices, cases_of
from ..study.kernel_gains import measure_gains, page, section
from ..study.paired_timing import check_output

COMMAND = "python -m manual_backprop.tools.kernel_gains"
DEFAULT_OUTPUT = Path("docs/kernels.md")
ROUNDS = 5

DESCRIPTION = f"""\
Measures what each optimization of the kernels gains: an ablation. A whole training step with kernels=fused is compared
with the same step without one optimization at a time. Writes {DEFAULT_OUTPUT}: time and memory with and without it, the
noise floor, and what each optimization saves and why. Rows are measured as in `python -m manual_backprop.bench`; see
its --help. Takes minutes for each case and precision; run it on an idle machine."""

EXAMPLES = f"""\
Examples
  {COMMAND}                               # all CPU cases, the whole page
  {COMMAND} --case C1 --precision fp32 --output c1.md
  {COMMAND} --model tiny --means arena compiled --output tiny.md

Exit codes: 0 written, 1 gradients disagree or a process failed, 2 wrong input, 4 the page cannot be written."""


def command_of(options: Namespace) -> str:
    """The command line without --output."""
    words = [COMMAND]
    for name in ("case", "model", "architecture", "vocab_size", "batch_size", "precision", "device", "means"):
        value = getattr(options, name)
        if value is not None:
            given = value if isinstance(value, list) else [value]
            words.append(f"--{name.replace('_', '-')} {shlex.join(map(str, given))}")
    usual = parser().parse([])
    words += [
        f"--{name} {getattr(options, name)}"
        for name in ("threads", "rounds")
        if getattr(options, name) != getattr(usual, name)
    ]
    return " ".join(words)


def parser() -> Parser:
    def named(title: str, names: dict[str, str]) -> str:
        return "\n".join((title, *(f"  {name:<26}{about}" for name, about in names.items())))

    about = named("Optimizations", {name: one.place for name, one in OPTIMIZATIONS.items()})
    it = Parser("tools.kernel_gains", "\n\n".join((DESCRIPTION, about, named("Cases", about_cases()))), EXAMPLES)
    add_choices(it, usual="all of a CPU")
    it.add_argument(
        "--means", nargs="+", choices=tuple(OPTIMIZATIONS), metavar="NAME", help="optimizations to ablate (all)"
    )
    it.add_argument(
        "--rounds",
        type=whole(1),
        default=ROUNDS,
        metavar="N",
        help="rounds of turns, forwards and backwards (%(default)s)",
    )
    it.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="FILE", help="the page (%(default)s)")
    return it


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse(arguments)
    command = command_of(options)
    if options.case is None and options.model is None:
        options.case = [name for name, case in CASES.items() if case.device == "cpu"]
    cases = cases_of(options)
    check_output("--output", options.output)
    optimizations = [name for name in OPTIMIZATIONS if options.means is None or name in options.means]
    sections = []
    for case in cases:
        sections.append(section(measure_gains(case, optimizations, options.rounds)))
        print(f"{sections[-1]}\n", flush=True)
    write_page(options.output, page(sections, optimizations, command, 2 * options.rounds))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
