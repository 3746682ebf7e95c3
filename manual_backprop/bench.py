"""`python -m manual_backprop.bench`: time and memory of a training step, beside other implementations of the network.

`--help` describes what it measures and how; the code is in `study/benchmark/`.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common.durable_files import storage_errors
from .common.errors import InputError
from .common.exit_codes import exit_code_of
from .common.machine import compute_capabilities
from .common.startup.output import endure_output
from .config.arguments import Parser, number, whole
from .study.benchmark.cases import ONEDNN, ROWS, SUBJECT, Case
from .study.benchmark.choices import about_cases, add_choices, cases_of
from .study.benchmark.gpu.session import PARTS, run
from .study.benchmark.gpu.tables import Setting
from .study.benchmark.measurement import Measurement, measure
from .study.paired_timing import check_output

DESCRIPTION = """\
Times a training step (forward, loss, backward, clipping, AdamW) of the hand-written network, beside the same network
under autograd and that of transformers, and measures the memory of each.

How: each row is a process; all have the same weights, tokens, optimizer, threads and allocator, and every peer gets
every setting of PyTorch that ours gets. Before the timing, the rows' losses and gradients must agree: with each other,
in bf16 with autograd's in fp32. Rows take turns, A B C, C B A, and ratios are computed in each turn, so that a machine
that slows down slows all of them; the result is the median with the quartiles. Ours runs twice: its ratio to itself is
the noise floor, and smaller differences are not significant.
Run it on an otherwise idle machine."""

COLUMNS = """\
Columns
  time / ours  time over the first row's, median and quartiles of the turns
  peak MB      the process's peak size after warm-up minus its size after the imports: includes parameters and moments.
               On a GPU the peak sum of its tensors. Compiled rows have a warm cache: with a cold one a row is started
               twice, and the time of the first start is under "cold, s"
  of the limit the time of the step's matrix products alone, in these shapes and this format, over the row's time
  first, s     the first forward and backward pass, including the time of torch.compile to load its cache"""

EXAMPLES = """\
Examples
  python -m manual_backprop.bench --case C1                     # fp32, bf16 and bf16_mixed, all rows; minutes
  python -m manual_backprop.bench --case C2 C3 --json b.json --picture b.png
  python -m manual_backprop.bench --model small --architecture llama --precision bf16 --rows torch-eager
  python -m manual_backprop.bench --case C1 --precision bf16 --breakdown
  python -m manual_backprop.bench --model small --grow --picture growth.png
  python -m manual_backprop.bench --markdown c1.json c2.json    # a table of what --json wrote
  python -m manual_backprop.bench --gpu --text input.txt --output gpu      # on a machine with one: ten minutes
  python -m manual_backprop.bench --gpu --device cpu --output tried        # tries that, at small sizes

Exit codes: 0 measured, 1 the rows disagree or one of them failed, 2 wrong input, 4 a file cannot be written."""


GPU_OPTIONS = ("minutes", "parts", "text", "output")
minutes = number("more than 0", lambda value: value > 0)


def _parts() -> str:
    return ", ".join(f"{name} {part.about.partition(':')[0]}" for name, part in PARTS.items())


def _named(names: dict[str, str]) -> str:
    width = max(map(len, names)) + 2
    return "\n".join(f"  {name:<{width}}{about}" for name, about in names.items())


def parser() -> Parser:
    about_rows = {
        "custom-reference": "by hand, with the pairs of ops/",
        "custom-fused": "by hand, with the kernels",
        "custom-recompute": "the same, storing only each block's input (training.recompute=block)",
        "torch-eager": "the same network under autograd; also torch-compiled",
        "baseline-eager": "torch.nn, SDPA, fused AdamW; also baseline-compiled",
        "huggingface-eager": "transformers' network, SDPA, fused AdamW; also huggingface-compiled",
        f"...{ONEDNN}": "each of these six with float32 products by oneDNN instead of MKL\n"
        "                     where that is exact; left out if it changes nothing",
    }
    rows = "Rows\n" + _named(about_rows)
    cases = "Cases\n" + _named(about_cases())
    it = Parser("bench", "\n\n".join((DESCRIPTION, rows, cases, COLUMNS)), EXAMPLES)
    add = it.add_argument
    add_choices(it, usual="--model medium")
    add("--rows", nargs="+", choices=tuple(ROWS), metavar="ROW", help=f"rows beside {SUBJECT} (all)")
    add("--rounds", type=whole(1), metavar="N", help="turns forth and back (5, more if steps are short)")
    add("--breakdown", action="store_true", help="also: time and memory by kind of work, ours and a peer's")
    add("--grow", action="store_true", help="instead: step time over T from 64 to 2048, and memory over the batch size")
    add("--json", type=Path, metavar="FILE", help="write all measurements there")
    add(
        "--markdown",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="instead: a table of what --json wrote, as in README.md",
    )
    add("--picture", type=Path, metavar="FILE", help="draw a picture there (PNG)")
    add(
        "--gpu",
        action="store_true",
        help="instead: all measurements that need a GPU, the most important first; each part is saved when it ends",
    )
    add("--minutes", type=minutes, metavar="M", help="of --gpu: time limit in minutes (10)")
    add("--parts", nargs="+", choices=tuple(PARTS), metavar="P", help=f"of --gpu: {_parts()} (all)")
    add("--text", type=Path, metavar="FILE", help="of --gpu: training text of nanoGPT's networks in part e")
    add("--output", type=Path, metavar="DIRECTORY", help="of --gpu: for results.md and results.json")
    return it


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse(arguments)
    if options.gpu:
        gpu(options)
        return
    for name in GPU_OPTIONS:
        if getattr(options, name) is not None:
            raise InputError(f"--{name} belongs to --gpu: give both, or neither")
    if options.markdown:
        from .study.benchmark import markdown

        print(markdown.page(options.markdown))
        return
    cases = cases_of(options)
    check_output("--json", options.json)
    check_output("--picture", options.picture)
    if options.picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--picture: matplotlib is not installed; leave it out, or pip install matplotlib")
    names = [SUBJECT, *(name for name in options.rows or ROWS if name != SUBJECT)]
    from .study.benchmark import page

    if options.grow:
        from .study.benchmark.growth import grow

        content = grow(cases, names, options.rounds, options.picture)
    else:
        measurements = _measure(cases, names, options)
        if options.picture is not None:
            page.draw([measured for measured, _ in measurements], options.picture)
        content = {"cases": [page.as_json(measured) | more for measured, more in measurements]}
    if options.json is not None:
        content = {"version": page.VERSION, "machine": page.machine(), **content}
        with storage_errors(f"write {options.json}"):
            options.json.write_text(json.dumps(content, indent=1) + "\n")


def gpu(options: argparse.Namespace) -> None:
    """The measurements on a GPU (--gpu)."""
    others = ("case", "model", "architecture", "vocab_size", "batch_size", "precision", "rows", "rounds", "json")
    for name in (*others, "markdown", "picture", "breakdown", "grow"):
        if getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')} cannot be combined with --gpu, whose cases are fixed")
    if options.output is None:
        raise InputError("--gpu needs --output DIRECTORY, for results.md and results.json")
    device = options.device or "cuda"
    if device == "cuda" and not compute_capabilities():
        raise InputError("--gpu: no NVIDIA GPU can be used on this machine; --device cpu tries the same at small sizes")
    if options.text is not None and not options.text.is_file():
        raise InputError(f"--text {options.text}: expected a file that exists")
    if (options.output / "results.json").exists():
        raise InputError(f"--output {options.output}: holds results already; name another folder")
    with storage_errors(f"make the folder {options.output}"):
        options.output.mkdir(parents=True, exist_ok=True)
    endure_output()
    text = "" if options.text is None else str(options.text.absolute())
    run(Setting(device, text, until=0.0), options.minutes or 10.0, options.parts or list(PARTS), options.output)


def _measure(
    cases: Sequence[Case], names: Sequence[str], options: argparse.Namespace
) -> list[tuple[Measurement, dict[str, Any]]]:
    """Measure and print each case; with --breakdown also that."""
    from .study.benchmark.page import table

    found = []
    for case in cases:
        measured = measure(case, names, options.rounds)
        print(table(measured), flush=True)
        more: dict[str, Any] = {}
        if options.breakdown:
            from .study.benchmark.breakdown import breakdown

            more["breakdown"] = breakdown(measured)
        print()
        found.append((measured, more))
    return found


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
