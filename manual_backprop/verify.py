"""Compare every hand-written gradient with autograd's, with central differences, and with zero where it must be zero.

`python -m manual_backprop.verify` takes seconds and prints every error beside its bar. What is measured, and why
in this way, is in `gradient_check/`; this file chooses what to measure and shows it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING

from manual_backprop.errors import EXIT_DONE, EXIT_FAILED, ConfigError, InputError

if TYPE_CHECKING:
    from types import ModuleType

    from rich.console import Console

    from manual_backprop.config import CustomTransformerConfig
    from manual_backprop.gradient_check import Finding

COMMAND = "python -m manual_backprop.verify"
HELP = f"""\
{COMMAND} [KEY=VALUE ...]

Is every hand-written gradient right? Each is compared with autograd's, in float64, at random weights and with random
upstream gradients. The error of a tensor is

    |got - want| / max(|want|, 1e-3 |all gradients| / sqrt(number of tensors))

in Euclidean norms, so that neither a small tensor nor one that is zero can hide a bug. What has to hold:

    1e-12    against autograd: every op, every parameter, every activation and gradient inside a step
    1e-06    the loss along one random direction, against central differences
    1e-13    gradients that are zero whatever the weights, relative to all gradients
    exact    inputs, weights and upstream gradients keep every bit; backward twice gives the same twice
    2 x      in fp32, bf16 and bf16_mixed: the error against float64, relative to autograd's in that precision; the
             median of several draws of weights and tokens, since rounding is luck, and a bug is in all of them

Without arguments: all ops, and small networks of every architecture in odd shapes (B=1, T=1, segments, dropout), each
with the textbook pairs and with the fused kernels.
With arguments, which are those of manual_backprop.run: the network that they describe, with short sequences, and all
ops with its kernels; a precision other than fp64 is measured as well.

Examples

  {COMMAND}
  {COMMAND} model=tiny
  {COMMAND} model=small architecture=vaswani precision=bf16
  {COMMAND} model.d_model=48 model.n_heads=3 architecture.activation=gelu

Options

  --help, -h

Exit codes: 0 all is right, 1 something is over its bar, 2 wrong arguments.
"""

MOST_TOKENS = 12  # T of a network that is given by arguments: a proof needs no long sequence
UNKNOWN_VOCABULARY = 257  # of a tokenizer that has not seen its corpus yet
WIDTH = 110  # columns, where there is no terminal to ask
LARGE = 2_000_000  # parameters: above, three draws of rounding errors, of one sequence each, in place of eight of four
MANNERS = "touches nothing else"  # inputs, upstream gradients and outputs; and backward again returns the same
DESCRIBE_A_NETWORK = ("model", "architecture", "tokenizer", "precision", "kernels", "device", "seed", "experiments")
NEVER_USED = ("tracking=none",)  # verifying a network needs no place to record it


@dataclass
class Section:
    """One table: findings, and which of their subjects share a line."""

    title: str
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """One quantity, and its worst finding."""

    group: str
    quantity: str
    worst: Finding


def lines_of(section: Section) -> list[Line]:
    """In the order in which the quantities were first measured. A subject is `op: case`, or a network."""
    from manual_backprop.gradient_check import worst

    together: dict[tuple[str, str], list[Finding]] = {}
    for finding in section.findings:
        together.setdefault((finding.subject.partition(": ")[0], finding.quantity), []).append(finding)
    return [Line(*key, worst(findings)) for key, findings in together.items()]


def check_everything() -> list[Section]:
    """All ops, and the odd networks of every architecture, with the textbook pairs and with the fused kernels."""
    from manual_backprop.config import ARCHITECTURES, KERNELS
    from manual_backprop.gradient_check import ODD, check_network, odd_cases

    sections = [_ops_section(kernels) for kernels in KERNELS]
    for architecture, kernels in product(ARCHITECTURES, KERNELS):
        section = Section(f"{architecture}, kernels={kernels}: {_sizes(ODD)}, and odd shapes")
        for name, config, batch, scale in odd_cases(architecture):
            findings = check_network(replace(config, kernels=kernels), batch, scale)
            section.findings += [
                replace(f, subject=f"{architecture}: {name}", quantity=_short(f.quantity)) for f in findings
            ]
        sections.append(section)
    return sections


def check_one(config: CustomTransformerConfig) -> list[Section]:
    """All ops, and one network: in float64, and in its own precision where that is another."""
    import torch

    from manual_backprop.gradient_check import (
        ROWS,
        check_network,
        check_network_precision,
        check_op_precision,
        draw_batch,
    )

    B, T = 2, min(MOST_TOKENS, config.max_seq_len)
    exact = replace(config, precision="fp64")
    sections = [_ops_section(config.kernels)]
    for scale in ("proof", "initial"):
        title = f"{config.architecture}, float64, {scale} scale: {_sizes(config)}, B={B} T={T}"
        findings = check_network(exact, draw_batch(exact, B, T, config.seed), scale)
        sections.append(Section(title, [replace(f, quantity=_short(f.quantity)) for f in findings]))
    if config.precision == "fp64":
        return sections
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    ops_title = f"every op in {'fp32' if dtype == torch.float32 else 'bf16'}: error relative to autograd's"
    pairs = _pairs_of(config.kernels)
    sections.append(
        Section(ops_title, [f for row in ROWS.values() for f in check_op_precision(row, dtype, pairs=pairs)])
    )
    draws, rows = (3, 1) if parameter_count(config) > LARGE else (8, 4)
    for scale in ("proof", "initial"):
        title = f"{config.architecture}, {config.precision}, {scale} scale: error relative to autograd's"
        found = check_network_precision(config, scale, range(draws), rows, min(2 * MOST_TOKENS, config.max_seq_len))
        sections.append(Section(title, found))
    return sections


def parameter_count(config: CustomTransformerConfig) -> int:
    from math import prod

    from manual_backprop.models.network import parameter_shapes

    return sum(prod(shape) for shape in parameter_shapes(config).values())


@contextmanager
def one_thread() -> Iterator[None]:
    """With sequences this short, several threads would spend their time waiting for one another."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pairs_of(kernels: str) -> ModuleType:
    from manual_backprop import kernels as fused
    from manual_backprop import ops

    return fused if kernels == "fused" else ops


def _ops_section(kernels: str) -> Section:
    from manual_backprop.gradient_check import check_ops

    checked = check_ops(pairs=_pairs_of(kernels))
    findings = [replace(f, quantity=MANNERS) if f.bar == 0 else f for f in checked]
    return Section(f"every op, kernels={kernels}, float64", findings)


def _sizes(config: CustomTransformerConfig) -> str:
    return (
        f"V={config.vocab_size} D={config.d_model} L={config.n_blocks} H={config.n_heads} "
        f"{f'G={config.kv_heads} ' * (config.kv_heads != config.n_heads)}F={config.d_ffn} "
        f"{config.activation or config.traits.activation}"
    )


def _short(quantity: str) -> str:
    """Without the name of the worst tensor, which is another one in every case."""
    return (
        quantity.partition(", worst ")[0] if " by name" not in quantity else " ".join(quantity.split()[1:4]).rstrip(",")
    )


def network_described(overrides: Sequence[str]) -> CustomTransformerConfig:
    """The network that a run with these overrides would train. ConfigError with every violation."""
    from manual_backprop.command_line import check

    jobs = check(
        [*overrides, *(line for line in NEVER_USED if not any(o.startswith("tracking") for o in overrides))]
    ).jobs
    if len(jobs) != 1:
        raise InputError(f"these arguments describe {len(jobs)} networks; verify takes one at a time")
    if unused := keys_without_effect(jobs[0].overrides):
        print(f"without effect here, since only a network is verified: {', '.join(unused)}", file=sys.stderr)
    run = jobs[0].config
    return run.network(run.tokenizer.vocab_size or UNKNOWN_VOCABULARY)


def keys_without_effect(overrides: Sequence[str]) -> list[str]:
    """What says how a network is trained, and not what it is."""
    named = [override.lstrip("+").partition("=")[0] for override in overrides if override not in NEVER_USED]
    return [
        key
        for key in named
        if (key.partition(".")[0] not in DESCRIBE_A_NETWORK and key != "training.label_smoothing")
        or key in ("model.learning_rate", "architecture.learning_rate_scale")
    ]


def show(sections: Sequence[Section], console: Console) -> None:
    from rich.table import Table

    for section in sections:
        table = Table(
            title=section.title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False
        )
        lines = lines_of(section)
        several = len({line.group for line in lines}) > 1  # a table of one network need not name it in every line
        for column in (
            ("of", "what", "error", "bar", "", "worst in") if several else ("what", "error", "bar", "", "worst in")
        ):
            table.add_column(column, justify="right" if column in ("error", "bar") else "left", no_wrap=True)
        shown = ""
        for line in lines:
            worst = line.worst
            case = worst.subject.partition(": ")[2] if worst.error > 0 else ""
            verdict = "[green]ok[/]" if worst.ok else "[bold red]FAILED[/]"
            group = [line.group if line.group != shown else ""] if several else []
            table.add_row(*group, line.quantity, _number(worst.error), _bar(worst.bar), verdict, case)
            shown = line.group
        console.print(table)
        console.print()


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2f} x" if 0.01 < value < 100 else f"{value:.1e}"


def _bar(value: float) -> str:
    return "exact" if value == 0 else "2 x" if value == 2 else f"{value:.0e}"


def verdict_of(sections: Sequence[Section], seconds: float) -> str:
    from manual_backprop.gradient_check.measure import AUTOGRAD_BAR

    findings = [finding for section in sections for finding in section.findings]
    failed = [finding for finding in findings if not finding.ok]
    if failed:
        first = failed[0]
        return (
            f"FAILED: {len(failed)} of {len(findings)} measurements are over their bar, the first is "
            f"{first.quantity} of {first.subject}: {first.error:.1e}, bar {_bar(first.bar)} ({seconds:.0f} s)"
        )
    largest = max(finding.error for finding in findings if finding.bar == AUTOGRAD_BAR)
    return (
        f"ok: all {len(findings)} measurements are within their bars; the worst error against autograd in float64 is "
        f"{largest:.1e} ({seconds:.0f} s)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    options, overrides = parser.parse_known_args(given)
    if options.help:
        print(HELP, end="")
        return EXIT_DONE
    start = time.monotonic()
    try:
        config = network_described(overrides) if overrides else None
    except ConfigError as error:
        raise InputError("; ".join(error.violations)) from None  # one line, and the exit code of wrong input
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    with one_thread():
        sections = check_one(config) if config else check_everything()
    show(sections, console)
    verdict = verdict_of(sections, time.monotonic() - start)
    console.print(verdict, soft_wrap=True, style="bold red" if verdict.startswith("FAILED") else "bold green")
    return EXIT_FAILED if verdict.startswith("FAILED") else EXIT_DONE


if __name__ == "__main__":
    from manual_backprop.exit_codes import exit_code_of

    sys.exit(exit_code_of(main))
