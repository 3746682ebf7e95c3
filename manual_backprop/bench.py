"""`python -m manual_backprop.bench`: how fast and how small a training step is, beside what others make of the network.

What it measures and how is said by `--help`; `benchmark/` does it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Parser, whole
from .benchmark.cases import CASES, ROWS, SUBJECT, Case
from .config import ARCHITECTURES, PRECISIONS, CustomTransformerConfig, model_sizes
from .errors import InputError
from .exit_codes import exit_code_of
from .machine import compute_capabilities
from .paired import check_output

if TYPE_CHECKING:
    import argparse

    from .benchmark.measurement import Measurement

DESCRIPTION = """\
Times a training step (forward, loss, backward, clipping, AdamW) of this network by hand, beside the same network under
autograd and beside transformers', and measures the memory that each of them takes.

How: one process a row; the same weights, tokens, optimizer, threads and allocator in each. Before anything is timed
the rows' losses and gradients must agree. Rows take turns, A B C, C B A, and ratios are taken turn by turn, so that a
machine that slows down slows all of them; the median is quoted with the quartiles. Ours runs twice: its ratio to itself
is the noise floor, and no smaller difference counts. Run it on a machine that does nothing else."""

COLUMNS = """\
Columns
  time / ours  over the first row's, median and quartiles of the turns
  peak MB      the process's largest size after warm-up, less its size after the imports: parameters and moments count.
               On a GPU the largest sum of its tensors. Compiled rows have a warm cache: with a cold one a row is
               started twice, and what the first start took stands under "cold, s"
  of the limit the time of the step's own matrix products alone, in these shapes and this format, over the row's
  first, s     the first forward and backward pass, what torch.compile does to load its cache included"""

EXAMPLES = """\
Examples
  python -m manual_backprop.bench --case C1                     # fp32 and bf16, all rows; minutes
  python -m manual_backprop.bench --case C2 C3 --json b.json --picture b.png
  python -m manual_backprop.bench --model small --architecture llama --precision bf16 --rows torch-eager
  python -m manual_backprop.bench --case C1 --precision bf16 --breakdown
  python -m manual_backprop.bench --model small --grow --picture growth.png

Exit codes: 0 measured, 1 the rows disagree or one of them failed, 2 wrong input, 4 a file cannot be written."""

FOR_MODELS = ("architecture", "vocab_size", "device")  # what a case has by itself
DEFAULTS: dict[str, Any] = {"model": "medium", "architecture": "gpt2", "vocab_size": 1024, "device": "cpu"}
BATCH_SIZE = 16


def _named(names: dict[str, str]) -> str:
    width = max(map(len, names)) + 2
    return "\n".join(f"  {name:<{width}}{about}" for name, about in names.items())


def parser() -> Parser:
    about_rows = {
        "custom-reference": "by hand, with the pairs of ops/",
        "custom-fused": "by hand, with the kernels",
        "torch-eager": "the same lines under autograd; torch-compiled",
        "baseline-eager": "torch.nn, SDPA, fused AdamW; baseline-compiled",
        "huggingface-eager": "transformers' network, SDPA, fused AdamW; huggingface-compiled",
    }
    rows = "Rows\n" + _named({name: about for name, about in about_rows.items() if name in ROWS})
    cases = "Cases\n" + _named({name: f"{case.about}: {', '.join(case.bars)}" for name, case in CASES.items()})
    it = Parser("bench", "\n\n".join((DESCRIPTION, rows, cases, COLUMNS)), EXAMPLES)
    it.add_argument("--case", nargs="+", choices=tuple(CASES), metavar="NAME", help="one or more of the cases")
    it.add_argument("--model", choices=tuple(model_sizes()), help="in place of a case: a size of conf/model (medium)")
    it.add_argument("--architecture", choices=tuple(ARCHITECTURES), help="of --model (gpt2)")
    it.add_argument("--vocab-size", type=whole(1), metavar="V", help="of a --model that names none (1024)")
    it.add_argument("--batch-size", type=whole(1), metavar="B", help="sequences (the case's; 16)")
    it.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, metavar="P", help=f"{', '.join(PRECISIONS)} (the case's; fp32)"
    )
    it.add_argument("--device", choices=("cpu", "cuda"), help="of --model (cpu)")
    it.add_argument("--threads", type=whole(1), default=os.cpu_count(), metavar="N", help="of the CPU (%(default)s)")
    it.add_argument("--rows", nargs="+", choices=tuple(ROWS), metavar="ROW", help=f"beside {SUBJECT} (all)")
    it.add_argument("--rounds", type=whole(1), metavar="N", help="turns there and back (5, more where steps are short)")
    it.add_argument("--breakdown", action="store_true", help="also: time and memory by kind of work, ours and a peer's")
    it.add_argument(
        "--grow", action="store_true", help="instead: step time over T from 64 to 2048, and memory over the batch size"
    )
    it.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there")
    it.add_argument("--picture", type=Path, metavar="FILE", help="draw it there (PNG)")
    return it


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Raises InputError for what cannot be measured."""
    if options.case:
        for name in ("model", *FOR_MODELS):
            if getattr(options, name) is not None:
                raise InputError(
                    f"--{name.replace('_', '-')} {getattr(options, name)}: a case has its own; give --case or --model"
                )
        found = [
            CASES[name].case(name, precision, options.threads, options.batch_size)
            for name in options.case
            for precision in options.precision or CASES[name].bars
        ]
    else:
        chosen = {name: getattr(options, name) or default for name, default in DEFAULTS.items()}
        size: dict[str, Any] = dict(model_sizes()[chosen["model"]])
        del size["learning_rate"]
        size["vocab_size"] = size["vocab_size"] or chosen["vocab_size"]
        found = [
            Case(
                CustomTransformerConfig(
                    **size, architecture=chosen["architecture"], precision=precision, device=chosen["device"]
                ),
                options.batch_size or BATCH_SIZE,
                options.threads,
            )
            for precision in options.precision or ["fp32"]
        ]
    for case in found:
        if violations := case.config.violations():
            raise InputError("; ".join(violations))
    if any(case.config.device == "cuda" for case in found) and not compute_capabilities():
        what = f"--case {' '.join(options.case)}" if options.case else "--device cuda"
        raise InputError(f"{what}: no NVIDIA GPU can be used on this machine; measure what runs on a CPU")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse(arguments)
    cases = cases_of(options)
    check_output("--json", options.json)
    check_output("--picture", options.picture)
    if options.picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--picture: matplotlib is not installed; leave it out, or pip install matplotlib")
    names = [SUBJECT, *(name for name in options.rows or ROWS if name != SUBJECT)]
    from .benchmark import page

    if options.grow:
        from .benchmark.growth import grow

        content = grow(cases, names, options.rounds, options.picture)
    else:
        measurements = _measure(cases, names, options)
        if options.picture is not None:
            page.draw([measured for measured, _ in measurements], options.picture)
        content = {"cases": [page.as_json(measured) | more for measured, more in measurements]}
    if options.json is not None:
        from .durable import storage_errors

        content = {"version": page.VERSION, "machine": page.machine(), **content}
        with storage_errors(f"write {options.json}"):
            options.json.write_text(json.dumps(content, indent=1) + "\n")


def _measure(
    cases: Sequence[Case], names: Sequence[str], options: argparse.Namespace
) -> list[tuple[Measurement, dict[str, Any]]]:
    """Each case, printed as soon as it is measured; and its breakdown, if it is asked for."""
    from .benchmark.measurement import measure
    from .benchmark.page import table

    found = []
    for case in cases:
        measured = measure(case, names, options.rounds)
        print(table(measured), flush=True)
        more: dict[str, Any] = {}
        if options.breakdown:
            from .benchmark.breakdown import breakdown

            more["breakdown"] = breakdown(measured)
        print()
        found.append((measured, more))
    return found


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
