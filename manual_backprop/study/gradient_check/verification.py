"""The checks of `python -m manual_backprop.verify`: everything, or one network, as tables of findings."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from types import ModuleType

import torch

from ... import kernels as fused
from ... import ops
from ...config.network import ARCHITECTURES, KERNELS, CustomTransformerConfig
from ..estimates.memory import parameter_count
from .low_precision import check_network_precision, check_op_precision
from .measure import AUTOGRAD_BAR, Finding, worst
from .network_case import ODD, draw_batch, odd_cases, odd_encoders, odd_pairs
from .network_check import check_network
from .op_check import check_ops
from .op_table import ROWS

MOST_TOKENS = 12  # T of a network given by arguments: a proof needs no long sequence
LARGE = 2_000_000  # parameters: larger networks get three draws of one sequence instead of eight draws of four
ODD_NETWORKS = {"decoder": odd_cases, "encoder_decoder": odd_pairs, "encoder": odd_encoders}
SIDE_EFFECTS = "touches nothing else"  # inputs, upstream gradients and outputs; and a second backward returns the same


@dataclass
class Section:
    """One table of findings."""

    title: str
    findings: list[Finding] = field(default_factory=list)


def lines_of(section: Section) -> dict[tuple[str, str], Finding]:
    """The lines of a table: the op (or network) and a quantity, and their worst finding; in the order of their first
    finding. A subject is `op: case`, or a network."""
    together: dict[tuple[str, str], list[Finding]] = {}
    for finding in section.findings:
        together.setdefault((finding.subject.partition(": ")[0], finding.quantity), []).append(finding)
    return {key: worst(findings) for key, findings in together.items()}


def verdict_of(sections: Sequence[Section], seconds: float) -> str:
    """The sentence after all tables: it begins with ok or FAILED."""
    findings = [finding for section in sections for finding in section.findings]
    failed = [finding for finding in findings if not finding.ok]
    if failed:
        first = failed[0]
        return (
            f"FAILED: {len(failed)} of {len(findings)} errors are above their bar; the first is "
            f"{first.quantity} of {first.subject}: {first.error:.1e}, bar {bar_in_words(first.bar)} ({seconds:.0f} s)"
        )
    largest = max(finding.error for finding in findings if finding.bar == AUTOGRAD_BAR)
    return (
        f"ok: all {len(findings)} measurements are within their bars; the worst error against autograd in float64 is "
        f"{largest:.1e} ({seconds:.0f} s)"
    )


def bar_in_words(value: float) -> str:
    return "exact" if value == 0 else "2 x" if value == 2 else f"{value:.0e}"


def check_everything() -> list[Section]:
    """Checks all ops, and the small networks of every architecture, with the textbook pairs and the fused kernels."""
    sections = [_ops_section(kernels) for kernels in KERNELS]
    for (kind, cases), architecture, kernels in product(ODD_NETWORKS.items(), ARCHITECTURES, KERNELS):
        section = Section(f"{architecture}, network={kind}, kernels={kernels}: {_sizes(ODD)}, and odd shapes")
        for name, config, batch, scale in cases(architecture):
            findings = check_network(replace(config, kernels=kernels), batch, scale)
            subject = f"{architecture}: {name}"
            section.findings += [replace(f, subject=subject, quantity=_short(f.quantity)) for f in findings]
        sections.append(section)
    return sections


def check_one(config: CustomTransformerConfig) -> list[Section]:
    """Checks all ops, and one network: in float64, and in its own precision if that differs."""
    B, T = 2, min(MOST_TOKENS, config.max_seq_len)
    exact = replace(config, precision="fp64")
    sections = [_ops_section(config.kernels)]
    for scale in ("proof", "initial"):
        title = f"{_named(config)}, float64, {scale} scale: {_sizes(config)}, B={B} T={T}"
        findings = check_network(exact, draw_batch(exact, B, T, config.seed), scale)
        sections.append(Section(title, [replace(f, quantity=_short(f.quantity)) for f in findings]))
    if config.precision == "fp64":
        return sections
    dtype, pairs = config.get_compute_dtype(), _pairs_of(config.kernels)
    title = f"every op in {str(dtype).removeprefix('torch.')}: error relative to autograd's"
    sections.append(Section(title, [f for row in ROWS.values() for f in check_op_precision(row, dtype, pairs=pairs)]))
    draws, rows = (3, 1) if parameter_count(config) > LARGE else (8, 4)
    for scale in ("proof", "initial"):
        title = f"{_named(config)}, {config.precision}, {scale} scale: error relative to autograd's"
        found = check_network_precision(config, scale, range(draws), rows, min(2 * MOST_TOKENS, config.max_seq_len))
        sections.append(Section(title, found))
    return sections


@contextmanager
def one_thread() -> Iterator[None]:
    """A context with one thread: with such short sequences several threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pairs_of(kernels: str) -> ModuleType:
    return fused if kernels == "fused" else ops


def _ops_section(kernels: str) -> Section:
    checked = check_ops(pairs=_pairs_of(kernels))
    findings = [replace(f, quantity=SIDE_EFFECTS) if f.bar == 0 else f for f in checked]
    return Section(f"every op, kernels={kernels}, float64", findings)


def _named(config: CustomTransformerConfig) -> str:
    return config.architecture + f" {config.network}" * (config.network != "decoder")


def _sizes(config: CustomTransformerConfig) -> str:
    return (
        f"V={config.vocab_size} D={config.d_model} "
        f"{f'L={config.encoder_blocks}+' if config.network == 'encoder_decoder' else 'L='}"
        f"{config.encoder_blocks if config.network == 'encoder' else config.n_blocks} H={config.n_heads} "
        f"{f'G={config.kv_heads} ' * (config.kv_heads != config.n_heads)}F={config.d_ffn} "
        f"{config.activation or config.traits.activation}"
    )


def _short(quantity: str) -> str:
    """The quantity without the name of the worst tensor, which differs between cases."""
    return re.sub(r"^\d+ |, worst .*", "", quantity)
