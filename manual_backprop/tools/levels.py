"""`python -m manual_backprop.tools.levels` writes docs/three-levels.md: the three levels of one network, side by side.

Lines of code are counted in the sources, step time and memory are measured in pairs (`benchmark/`), the gradients'
errors against float64. Nothing on the page is typed in. Takes minutes; run it on a machine that does nothing else.
"""

from __future__ import annotations

import ast
import io
import math
import os
import statistics
import sys
import textwrap
import tokenize
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..arguments import Parser, whole
from ..benchmark.cases import Case
from ..benchmark.measurement import MeasuredRow, measure
from ..config import ARCHITECTURES, CustomTransformerConfig, model_sizes
from ..durable import storage_errors
from ..errors import CheckFailedError
from ..exit_codes import exit_code_of
from ..paired import ratios

PACKAGE = Path(__file__).resolve().parent.parent
DEFAULT_OUTPUT = "docs/three-levels.md"
LEVELS = {  # implementation: what it is, and the files that a reader of this level reads
    "custom": ("gradients by hand", ("models/custom.py", "ops/*.py", "optim.py")),
    "torch": ("the same lines, gradients by autograd", ("models/mirror.py", "models/autograd.py", "optim.py")),
    "baseline": ("as PyTorch users write it", ("models/baseline.py", "models/autograd.py", "optim_torch.py")),
}
SUBJECT, COMPILED = "custom-reference", "baseline-compiled"  # rows of the bench
MEASURED = {"custom": (SUBJECT,), "torch": ("torch-eager",), "baseline": ("baseline-eager", COMPILED)}  # of each level
WIDTH = 120
PRECISIONS = ("fp64", "fp32", "bf16", "bf16_mixed")
SEEDS = range(4)  # one draw of rounding errors is luck
SMALLEST = 2.0**-53  # half of the distance between 1 and the next number of float64: no error is said to be smaller

PAGE = """\
# Three levels of one network

This page is written by `{command}`; every number on it was counted or measured by that command.

`implementation=custom` is the subject of this project: the backward pass is written by hand, on raw tensors.
`implementation=torch` is its mirror, the same functions under the same names with gradients by autograd: the proof.
`implementation=baseline` is what one would write instead: `torch.nn`, one product for query, key and value, PyTorch's
fused attention and fused AdamW, and `torch.compile`. All three have the same weights under the same names.

{table}

**Code** counts lines that are neither empty, nor a comment, nor a docstring, in {files}. What all levels share (shapes,
names, initial values, the training loop) is counted in none.

**Step** is forward, loss, backward, clipping and AdamW: {case}; {threads} threads of a CPU, torch {torch}. One process
a row, in turns; the ratio is to `custom` in the same turn, median and quartiles of {turns} turns. `custom` measured
against itself: {noise}. No smaller difference is claimed.

**Memory** is the process's peak after warm-up, less its size after the imports, parameters and moments included.

**Error** is |gradient - exact| / |exact| over all parameters, where exact is the mirror's gradient in float64; the
geometric mean of {draws} networks and batches ({small}).
"""


def code_lines(source: str) -> int:
    """Lines that hold code: not empty, no comment, no docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            text = node.body[0]
            docstrings.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


def code_of(patterns: Sequence[str]) -> int:
    files = sorted(path for pattern in patterns for path in PACKAGE.glob(pattern))
    return sum(code_lines(path.read_text(encoding="utf-8")) for path in files)


def small(architecture: str) -> CustomTransformerConfig:
    return CustomTransformerConfig(
        vocab_size=257, d_model=64, n_blocks=2, n_heads=4, d_ffn=160, max_seq_len=32, architecture=architecture
    )


def gradient_errors(architecture: str) -> dict[str, dict[str, float]]:
    """Implementation -> precision -> error, against the mirror in float64."""
    import torch

    from ..gradient_check import draw_batch
    from ..gradient_check.network_check import networks, step_of
    from ..models import IMPLEMENTATIONS

    logarithms: dict[tuple[str, str], list[float]] = {}
    for seed in SEEDS:
        config = replace(small(architecture), seed=seed)
        batch = draw_batch(config, 4, 32, seed)
        for precision in PRECISIONS:
            # rounded to the precision first: the error is that of the step, not of the weights
            by_hand, _ = networks(replace(config, precision=precision))
            exact = IMPLEMENTATIONS["torch"](replace(config, precision="fp64"))
            exact.load_parameters(by_hand.parameters)
            want = torch.cat([gradient.flatten() for gradient in step_of(exact, batch)[1].values()])
            for name, kind in IMPLEMENTATIONS.items():
                network = kind(replace(config, precision=precision))
                network.load_parameters(by_hand.parameters)
                got = torch.cat([gradient.double().flatten() for gradient in step_of(network, batch)[1].values()])
                error = float((got - want).norm() / want.norm())
                logarithms.setdefault((name, precision), []).append(math.log(max(error, SMALLEST)))
    return {
        name: {precision: math.exp(statistics.mean(logarithms[name, precision])) for precision in PRECISIONS}
        for name in IMPLEMENTATIONS
    }


def table(rows: dict[str, MeasuredRow], errors: dict[str, dict[str, float]]) -> str:
    lines = [
        "| level | | code | step | step / custom | memory | "
        + " | ".join(f"error {name}" for name in PRECISIONS)
        + " |",
        "|---|---|--:|--:|--:|--:|" + "--:|" * len(PRECISIONS),
    ]
    for level, (about, files) in LEVELS.items():
        for name in MEASURED[level]:
            row, compiled = rows[name], name == COMPILED
            low, middle, high = ratios(row.seconds, rows[SUBJECT].seconds)
            ratio = "1" if name == SUBJECT else f"{middle:.2f} ({low:.2f} to {high:.2f})"
            cells = [
                f"`{level}`" + (", compiled" if compiled else ""),
                about if not compiled else f"and compiled, which took {row.cold_seconds or row.first_seconds:.0f} s",
                "the same" if compiled else f"{code_of(files)} lines",
                f"{1e3 * row.median:.1f} ms",
                ratio,
                "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f} MB",
                *(
                    "" if compiled else "exact" if (level, precision) == ("torch", "fp64") else f"{error:.1e}"
                    for precision, error in errors[level].items()
                ),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(architecture: str, model: str, batch_size: int, rounds: int, threads: int) -> str:
    import torch

    size = {name: value for name, value in model_sizes()[model].items() if name != "learning_rate"}
    size["vocab_size"] = size["vocab_size"] or 1024
    config = CustomTransformerConfig(**size, architecture=architecture)  # type: ignore[arg-type]
    names = [name for names in MEASURED.values() for name in names]
    measured = measure(Case(config, batch_size, threads), names, rounds)
    if measured.left_out:
        raise CheckFailedError("; ".join(f"{name}: {reason}" for name, reason in measured.left_out.items()))
    rows = measured.rows
    torch.set_num_threads(1)
    low, middle, high = measured.time_ratio(measured.again)
    few = small(architecture)
    files = "; ".join(f"{', '.join(f'`{name}`' for name in files)} ({level})" for level, (_, files) in LEVELS.items())
    command = "python -m manual_backprop.tools.levels"
    chosen = {"architecture": (architecture, "gpt2"), "model": (model, "small")}
    command += "".join(f" --{name} {value}" for name, (value, usual) in chosen.items() if value != usual)
    written = PAGE.format(
        command=command,
        table=table(rows, gradient_errors(architecture)),
        files=files,
        case=f"`architecture={architecture} model={model}`, V={config.vocab_size} T={config.max_seq_len} "
        f"L={config.n_blocks} D={config.d_model} B={batch_size}, fp32",
        threads=threads,
        torch=torch.__version__.partition("+")[0],
        turns=len(rows[SUBJECT].seconds),
        noise=f"{middle:.2f} ({low:.2f} to {high:.2f})",
        draws=len(SEEDS),
        small=f"V={few.vocab_size} T={few.max_seq_len} L={few.n_blocks} D={few.d_model}",
    )
    return (
        "\n\n".join(part if part.startswith("|") else textwrap.fill(part, WIDTH) for part in written.split("\n\n"))
        + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    epilog = (
        "Exit codes: 0 done, 1 the levels disagree or a measuring process failed, 2 a wrong option, 4 the page cannot "
        "be written."
    )
    parser = Parser("tools.levels", __doc__ or "", epilog)
    parser.add_argument("--architecture", choices=tuple(ARCHITECTURES), default="gpt2", help="(%(default)s)")
    parser.add_argument("--model", choices=tuple(model_sizes()), default="small", help="(%(default)s)")
    parser.add_argument("--batch-size", type=whole(1), default=16, metavar="B", help="sequences (%(default)s)")
    parser.add_argument("--rounds", type=whole(1), default=5, metavar="R", help="turns there and back (%(default)s)")
    parser.add_argument("--threads", type=whole(1), default=os.cpu_count(), metavar="N", help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(DEFAULT_OUTPUT), metavar="FILE", help="(%(default)s)")
    chosen = parser.parse(arguments)
    written = page(chosen.architecture, chosen.model, chosen.batch_size, chosen.rounds, chosen.threads)
    with storage_errors(f"write {chosen.output}"):
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(written, encoding="utf-8")
    print(f"wrote {chosen.output}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
