"""The gradient check at the end of a run, on this machine and in the run's precision.

It is a small part of `python -m manual_backprop.verify` and takes seconds: a network with the run's config, with
parameters at the proof scale (`network_check.py`), and one short sequence. The float64 part is the proof. In a lower
precision it compares all gradients together over a few draws, since rounding errors of a single tensor vary too much
from draw to draw. It does not touch the run.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..estimates.memory import parameter_count

if TYPE_CHECKING:
    from ...config.schema import CustomTransformerConfig, RunConfig
    from . import Finding

GRADIENT_CHECK = "gradient_check.txt"  # in a run directory
MOST_SECONDS = 5.0  # of this thread's processor time, so that other processes do not change what is checked
MOST_PARAMETERS = 50_000_000  # a larger network is not checked
SMALL = 2_000_000  # parameters; a network of at most this size is checked without estimating time and memory first
BYTES_PER_PARAMETER = 34  # memory of the check: four float64 numbers, and the temporaries of a step
ENOUGH_TOKENS = 1025  # larger vocabularies are cut to this size, which takes the same code path (kernels/cpu/loss.py)
MOST_TOKENS = 32  # T, with B = 1
DRAWS = 5  # of parameters and tokens: errors of single draws differ by a factor of 10, medians of 5 by less than 2
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunCheck:
    """The result of the check."""

    status: str  # passed, failed or skipped
    line: str  # for the terminal
    page: str  # for the run directory


def check_of_run(run: RunConfig, network: CustomTransformerConfig, memory_limit: int | None = None) -> RunCheck:
    """The gradient check of a run. It skips what would take more than `MOST_SECONDS`, or more memory than
    `memory_limit` [bytes; None: no limit]. It never raises, since a check must not fail a run."""
    if run.implementation.name != "custom":
        return _skipped(f"implementation={run.implementation.name}: none of its gradients is written by hand")
    try:
        if (parameters := parameter_count(network)) > MOST_PARAMETERS:
            return _skipped(
                f"{parameters:,} parameters, and above {MOST_PARAMETERS:,} it would take too long; "
                "python -m manual_backprop.verify, with the same settings, has no limit"
            )
        start = time.monotonic()
        findings, remarks = _measure(network, time.thread_time() + MOST_SECONDS, memory_limit)
    except Exception as error:  # not enough memory for two more networks, or a bug
        log.info("the gradient check raised an exception", exc_info=True)
        return _skipped(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    return _judged(network, findings, remarks, time.monotonic() - start)


def _measure(
    config: CustomTransformerConfig, deadline: float, memory_limit: int | None
) -> tuple[list[Finding], list[str]]:
    """The findings, and remarks about what was skipped for lack of time or memory."""
    exact, remarks = replace(config, precision="fp64"), []
    if parameter_count(exact) > SMALL:
        small = _reduced(exact)
        begin = time.thread_time()
        findings = _measure_exact(small)
        estimate = (time.thread_time() - begin) * parameter_count(exact) / parameter_count(small)
        part = f"with one block and {small.vocab_size} tokens only: the whole network would take"
        if time.thread_time() + estimate > deadline:
            return findings, [f"{part} about {estimate:.0f} s"]
        if memory_limit is not None and BYTES_PER_PARAMETER * parameter_count(exact) > memory_limit:
            return findings, [f"{part} more memory than the training took"]
    begin = time.thread_time()
    findings = _measure_exact(exact)
    seconds = time.thread_time() - begin
    if config.precision != "fp64":
        if time.thread_time() + 1.5 * DRAWS * seconds < deadline:  # a draw takes three networks instead of two
            findings.append(_measure_precision(config))
        else:
            remarks.append(f"no time for {config.precision}")
    return findings, remarks


def _reduced(config: CustomTransformerConfig) -> CustomTransformerConfig:
    """The config with one block in each stack, and at most ENOUGH_TOKENS tokens in each vocabulary."""
    return replace(
        config,
        n_blocks=1,
        n_encoder_blocks=config.n_encoder_blocks and 1,
        vocab_size=min(config.vocab_size, ENOUGH_TOKENS),
        source_vocab_size=config.source_vocab_size and min(config.source_vocab_size, ENOUGH_TOKENS),
    )


def _measure_exact(exact: CustomTransformerConfig) -> list[Finding]:
    """The findings in float64: the loss and every gradient against the mirror, the gradients that must be zero, and the
    slope along a random direction against central differences."""
    from .network_case import draw_batch
    from .network_check import check_direction, compare_step, networks, step_in_place

    batch = draw_batch(exact, 1, min(MOST_TOKENS, exact.max_seq_len), exact.seed)
    by_hand, mirror = networks(exact)
    mirrored, step = step_in_place(mirror, batch), step_in_place(by_hand, batch)
    findings = compare_step("float64", exact, batch, step, mirrored)
    del mirror, mirrored  # frees the memory of two networks, which the direction needs next
    return [*findings, check_direction("float64", by_hand, batch, step[1])]


def _measure_precision(config: CustomTransformerConfig) -> Finding:
    """The error of all gradients together against float64, relative to the mirror's: the median of several draws."""
    from .low_precision import draw_errors
    from .measure import LOW_PRECISION_BAR, Finding

    T = min(MOST_TOKENS, config.max_seq_len)
    ratios = []
    for seed in range(DRAWS):
        errors = draw_errors(replace(config, seed=seed), "proof", 1, T, "torch")
        by_hand, autograd = zip(*(pair for name, pair in errors.items() if name != "loss"), strict=True)
        ratios.append(math.hypot(*by_hand) / math.hypot(*autograd))
    quantity = f"error of all gradients relative to autograd's, median of {DRAWS} draws"
    return Finding(config.precision, quantity, statistics.median(ratios), LOW_PRECISION_BAR)


def _judged(config: CustomTransformerConfig, findings: list[Finding], remarks: list[str], seconds: float) -> RunCheck:
    from . import worst

    failed = [finding for finding in findings if not finding.ok]
    worst_gradient = worst([finding for finding in findings if finding.quantity.startswith("d ")])
    summary = f"{len(findings)} measurements, largest error of a gradient in float64 {worst_gradient.error:.1e}"
    if failed:
        first = failed[0]
        line = (
            f"GRADIENT CHECK FAILED: {len(failed)} of {len(findings)} errors are above their bar; the first is "
            f"{first.quantity} in {first.subject}: {first.error:.1e}, bar {first.bar:.0e}"
        )
    else:
        line = f"gradient check: passed ({'; '.join([summary, *remarks])}; {seconds:.1f} s)"
    sizes = (
        f"{config.architecture}, V={config.vocab_size} D={config.d_model} L={config.n_blocks} H={config.n_heads} "
        f"F={config.d_ffn}, B=1 T={min(MOST_TOKENS, config.max_seq_len)}"
    )
    rows = [
        f"{finding.error:9.1e}  {finding.bar:9.0e}  {'ok' if finding.ok else 'FAILED':6}  "
        f"{finding.subject}: {finding.quantity}"
        for finding in findings
    ]
    page = [line, sizes, *remarks, "", f"{'error':>9}  {'bar':>9}", *rows]
    return RunCheck(FAILED if failed else PASSED, line, "\n".join(page) + "\n")


def _skipped(reason: str) -> RunCheck:
    line = f"gradient check: skipped ({reason})"
    return RunCheck(SKIPPED, line, line + "\n")
