"""Compares the three levels of one network: lines of code, errors of the gradients, time and memory of a step.

Lines are counted in the sources, time and memory measured in pairs (`study.benchmark`), errors measured against
float64. `page` is docs/three-levels.md, which `python -m manual_backprop.tools.levels` writes.
"""

import ast
import io
import math
import statistics
import textwrap
import tokenize
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..common.errors import CheckFailedError
from ..config.network import CPU_PRECISIONS
from ..config.schema import CustomTransformerConfig, model_sizes
from .benchmark.cases import ONEDNN, SUBJECT, Case
from .benchmark.measurement import MeasuredRow, Measurement, measure
from .benchmark.page import processor_and_instructions, products_of

PACKAGE = Path(__file__).resolve().parent.parent
OPTIMIZER = "optim/optimizers.py"
LEVELS = {  # a level, and for custom its kernels: a description, and the files of its code
    "custom, kernels=reference": (
        "gradients by hand, by the textbook pairs",
        ("models/custom.py", "models/step.py", "ops/*.py", OPTIMIZER),
    ),
    "custom, kernels=fused": (
        "gradients by hand, by fast pairs with the same names: what a run uses",
        ("models/custom.py", "models/step.py", "kernels/**/*.py", OPTIMIZER),
    ),
    "torch": (
        "the textbook's lines, gradients by autograd",
        ("models/mirror.py", "models/mirror_step.py", "models/autograd.py", OPTIMIZER),
    ),
    "baseline": (
        "as PyTorch users write it",
        ("models/baseline.py", "models/autograd.py", "optim/torch_optimizers.py"),
    ),
}
COMPILED = "baseline-compiled"
MEASURED = {  # row of the bench: its name here
    SUBJECT: "custom, kernels=fused",
    "custom-reference": "custom, kernels=reference",
    "torch-eager": "torch",
    "baseline-eager": "baseline",
    COMPILED: "baseline, compiled",
    "torch-eager-onednn": "torch, products by oneDNN",
    "baseline-eager-onednn": "baseline, products by oneDNN",
    "baseline-compiled-onednn": "baseline, compiled, products by oneDNN",
}
WIDTH = 120
SEEDS = range(4)  # a single draw of rounding errors would be random
SMALLEST = 2.0**-53  # half of the distance between 1 and the next float64: no smaller error is reported

PAGE = Path(__file__).with_suffix(".md")  # the page, with a {name} for each generated part


def code_lines(source: str) -> int:
    """The number of lines of code: not empty, no comment, no docstring."""
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
    """The number of lines of code in the files of the package that match. Raises LookupError if a pattern matches
    none."""
    files: set[Path] = set()
    for pattern in patterns:
        matched = set(PACKAGE.glob(pattern))
        if not matched:
            raise LookupError(f"{pattern}: matches no file in {PACKAGE}")
        files |= matched
    return sum(code_lines(path.read_text(encoding="utf-8")) for path in files)


def small(architecture: str) -> CustomTransformerConfig:
    return CustomTransformerConfig(
        vocab_size=257, d_model=64, n_blocks=2, n_heads=4, d_ffn=160, max_seq_len=32, architecture=architecture
    )


def gradient_errors(architecture: str) -> dict[str, dict[str, float]]:
    """Level -> precision -> error, against the mirror in float64."""
    import torch

    from ..models.implementations import IMPLEMENTATIONS
    from .gradient_check import draw_batch
    from .gradient_check.network_check import networks, step_of

    logarithms: dict[tuple[str, str], list[float]] = {}
    for seed in SEEDS:
        config = replace(small(architecture), seed=seed)
        batch = draw_batch(config, 4, 32, seed)
        for precision in CPU_PRECISIONS:
            # weights are rounded to the precision first: the error is that of the step, not of the weights
            by_hand, _ = networks(replace(config, precision=precision))
            exact = IMPLEMENTATIONS["torch"](replace(config, precision="fp64"))
            exact.load_parameters(by_hand.parameters)
            want = torch.cat([gradient.flatten() for gradient in step_of(exact, batch)[1].values()])
            for level in LEVELS:
                implementation, _, kernels = level.partition(", kernels=")
                network = IMPLEMENTATIONS[implementation](
                    replace(config, precision=precision, kernels=kernels or "reference")
                )
                network.load_parameters(by_hand.parameters)
                got = torch.cat([gradient.double().flatten() for gradient in step_of(network, batch)[1].values()])
                error = float((got - want).norm() / want.norm())
                logarithms.setdefault((level, precision), []).append(math.log(max(error, SMALLEST)))
    return {
        level: {precision: math.exp(statistics.mean(logarithms[level, precision])) for precision in CPU_PRECISIONS}
        for level in LEVELS
    }


def levels_table(errors: dict[str, dict[str, float]]) -> str:
    lines = [
        "| level | | code | " + " | ".join(f"error {name}" for name in CPU_PRECISIONS) + " |",
        "|---|---|--:|" + "--:|" * len(CPU_PRECISIONS),
    ]
    for level, (about, files) in LEVELS.items():
        found = [
            "exact" if (level, precision) == ("torch", "fp64") else f"{error:.1e}"
            for precision, error in errors[level].items()
        ]
        lines.append("| " + " | ".join([f"`{level}`", about, f"{code_of(files)} lines", *found]) + " |")
    return "\n".join(lines)


def steps_table(measurements: dict[str, Measurement]) -> str:
    """The table of steps, with a column for each precision. A row that is left out has an empty cell; if it is left out
    in all of them, it has no line."""
    lines = ["| step | " + " | ".join(measurements) + " |", "|---|" + "--:|" * len(measurements)]
    for name, words in MEASURED.items():
        cells = [_cell(measured, measured.rows.get(name)) for measured in measurements.values()]
        if any(cells):
            lines.append("| " + " | ".join([f"`{words}`", *cells]) + " |")
    return "\n".join(lines)


def _cell(measured: Measurement, row: MeasuredRow | None) -> str:
    if row is None:
        return ""
    low, middle, high = measured.time_ratio(row)
    ratio = "1" if row is measured.subject else f"{middle:.2f} ({low:.2f} to {high:.2f})"
    memory = "" if row.peak_bytes is None else f"; {row.peak_bytes / 1e6:.0f} MB"
    return f"{1e3 * row.median:.1f} ms; {ratio}{memory}"


def page(
    architecture: str,
    model: str,
    batch_size: int,
    rounds: int,
    threads: int,
    precisions: Sequence[str] = CPU_PRECISIONS,
) -> str:
    """Counts and measures; returns the page. Raises CheckFailedError if a row cannot run, or its gradients disagree."""
    import torch

    size = {name: value for name, value in model_sizes()[model].items() if name != "learning_rate"}
    size["vocab_size"] = size["vocab_size"] or 1024
    config = CustomTransformerConfig(**size, architecture=architecture)  # type: ignore[arg-type]
    measurements: dict[str, Measurement] = {}
    for precision in precisions:
        case = Case(replace(config, precision=precision), batch_size, threads)
        measured = measurements[precision] = measure(case, list(MEASURED), rounds)
        missing = {name: reason for name, reason in measured.left_out.items() if not name.endswith(ONEDNN)}
        if missing:
            raise CheckFailedError("; ".join(f"{name}: {reason}" for name, reason in missing.items()))
    torch.set_num_threads(1)
    few = small(architecture)
    files = "; ".join(f"{', '.join(f'`{name}`' for name in files)} ({level})" for level, (_, files) in LEVELS.items())
    command = "python -m manual_backprop.tools.levels"
    chosen = {"architecture": (architecture, "gpt2"), "model": (model, "small")}
    command += "".join(f" --{name} {value}" for name, (value, usual) in chosen.items() if value != usual)
    command += "" if tuple(precisions) == CPU_PRECISIONS else f" --precision {' '.join(precisions)}"
    first = next(iter(measurements.values()))
    compiling = max(measured.rows[COMPILED].cold_seconds or 0.0 for measured in measurements.values())
    shown = measurements.get("fp32", first)
    written = PAGE.read_text(encoding="utf-8").format(
        command=command,
        levels=levels_table(gradient_errors(architecture)),
        steps=steps_table(measurements),
        files=files,
        case=f"`architecture={architecture} model={model}`, V={config.vocab_size} T={config.max_seq_len} "
        f"L={config.n_blocks} D={config.d_model} B={batch_size}",
        threads=threads,
        processor=processor_and_instructions(),
        torch=torch.__version__.partition("+")[0],
        turns=len(first.subject.seconds),
        noise=", ".join(
            f"{precision} {middle:.2f} ({low:.2f} to {high:.2f})"
            for precision, measured in measurements.items()
            for low, middle, high in [measured.time_ratio(measured.again)]
        ),
        compiling=f" Compiling the baseline took up to {compiling:.0f} s." if compiling else "",
        precision=shown.case.config.precision,
        products=products_of(shown),
        onednn=next(
            (f"Rows with oneDNN are left out: {reason}." for reason in shown.left_out.values()),
            "MKL is PyTorch's default, and leaves speed unused on processors that are not from Intel: in fp32 "
            "compare `kernels=fused` with the rows by oneDNN.",
        ),
        draws=len(SEEDS),
        small=f"V={few.vocab_size} T={few.max_seq_len} L={few.n_blocks} D={few.d_model}",
    )
    return (
        "\n\n".join(part if part.startswith("|") else textwrap.fill(part, WIDTH) for part in written.split("\n\n"))
        + "\n"
    )
