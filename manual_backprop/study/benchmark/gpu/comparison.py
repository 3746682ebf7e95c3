"""(c) The time of a step, ours and the peers', and ours without each optimization; (d) memory over the batch size.

Rows and turns are those of the bench, with two differences. All rows of a case warm up at once, since their compilers
need the processors and not the GPU. Gradients are compared among rows only; (a) compares them with float64.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import NamedTuple

from ....common.errors import CheckFailedError, first_line
from ....config.schema import CustomTransformerConfig
from .. import ablations, rows
from ..ablations import WITHOUT
from ..cases import CASES, GRAPHS, SUBJECT, Case, network_of
from ..measurement import Measurement, measure
from ..page import as_json
from .optimizations import OPTIMIZATIONS
from .processes import Failed, each
from .tables import Part, Setting, Table

SHARES = {"G1": 4.0, "G4": 2.0, "G3": 2.0}  # of the time, to warm up and to measure
WHOLE = 3.0  # likewise, of G1 with its whole batch
PEERS = ("baseline-compiled", "huggingface-compiled")
# Launches count there: peers with CUDA graphs; and one without, should these fail.
OF_SMALL_ONES = (PEERS[0], *(f"{name}{GRAPHS}" for name in PEERS))
ABLATED = {"G3": 1.5, "G1": 2.0}  # likewise
TRIED = ("custom-reference", "baseline-eager")  # on a CPU, where nothing is worth compiling
BATCH_SIZES = (16, 64, 128, 256)
OF_MEMORY = (SUBJECT, "custom-recompute", "baseline-eager", "huggingface-eager")
# What rows of G1 take beside one another [bytes], estimated: each of them, and for a sequence of the batch all of them.
OF_A_ROW = 2.5e9
BESIDE_PEERS, BESIDE_ONE_PEER, ABLATIONS = 2.4e9, 1.7e9, 5e9
USABLE = 0.9  # of a GPU's memory
TINY = CustomTransformerConfig(vocab_size=37, d_model=24, n_blocks=1, n_heads=4, d_ffn=52, max_seq_len=16)


def cases(setting: Setting) -> dict[str, Case]:
    """The cases by name, in the order in which they are measured."""
    found = {name: CASES[name].case(name, "bf16_mixed", 1, None) for name in ("G1", "G4", "G3")}
    if not setting.small:
        return found
    tiny = replace(TINY, precision="bf16_mixed")
    return {name: replace(case, config=tiny, batch_size=3, bar=None) for name, case in found.items()}


# (c)


class Planned(NamedTuple):
    """A table of (c)."""

    title: str
    case: Case
    names: list[str]  # of rows, the subject first
    share: float  # of the time


def comparison(setting: Setting) -> Part:
    planned = plan(setting, memory_of(setting.device))
    for number, (title, case, names, share) in enumerate(planned):
        left = sum(later.share for later in planned[number:])
        now = time.monotonic()
        yield _measured(title, case, names, now + max(0.0, setting.until - now) * share / left)


def plan(setting: Setting, memory: int | None) -> list[Planned]:
    """The measurements, the most important first. `memory`: that of the GPU [bytes], or None."""
    found, subject = cases(setting), TRIED[0] if setting.small else SUBJECT
    planned = []
    for name, case in found.items():
        peers = TRIED[1:] if setting.small else PEERS if name == "G1" else OF_SMALL_ONES
        here = fitting(case, memory, len(peers) + 3, BESIDE_PEERS) if name == "G1" else case
        planned.append(Planned(f"{name} beside its peers", here, [subject, *peers], SHARES[name]))
    whole = found["G1"]
    if planned[0].case is not whole and fitting(whole, memory, 4, BESIDE_ONE_PEER) is whole:
        planned.append(Planned("G1 with its whole batch", whole, [subject, PEERS[0]], WHOLE))
    for name, share in ABLATED.items():
        wanted = [one for one, optimization in OPTIMIZATIONS.items() if optimization.applies(found[name])]
        if setting.small:
            wanted = wanted[:1]
        case = replace(found[name], bar=None)  # which is about peers
        here = fitting(case, memory, len(wanted) + 3, ABLATIONS) if name == "G1" else case
        names = [subject, *(WITHOUT + one for one in wanted)]
        planned.append(Planned(f"{name} without {', '.join(wanted)}", here, names, share))
    return planned


def memory_of(device: str) -> int | None:
    """The GPU's memory [bytes]; None on a CPU, where the cases are so small that it does not matter."""
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory) if device != "cpu" else None


def fitting(case: Case, memory: int | None, n_rows: int, of_a_sequence: float) -> Case:
    """The case, with a batch that is halved until all rows fit into the memory at the same time."""
    size = case.batch_size
    while memory is not None and size > 1 and n_rows * OF_A_ROW + size * of_a_sequence > USABLE * memory:
        size //= 2
    return case if size == case.batch_size else replace(case, batch_size=size, bar=None)


def _measured(title: str, case: Case, names: Sequence[str], until: float) -> Table:
    if time.monotonic() >= until:
        return Table(title, (), remarks=["not measured: the time was over"])
    try:
        return table_of(title, measure(case, names, work=work, at_once=True, until=until))
    except CheckFailedError as error:
        return Table(title, (), failures=[str(error)])
    except Exception as error:  # the next table may be right
        return Table(title, (), failures=[f"{type(error).__name__}: {first_line(error)}"])


def work(end: Connection, name: str, case: Case) -> None:
    """A process of the bench, with the optimizations of a GPU."""
    ablations.work(end, name, case, OPTIMIZATIONS, TRIED[0] if case.config.device == "cpu" else SUBJECT)


def table_of(title: str, measured: Measurement) -> Table:
    table = Table(
        f"{title}: {measured.case.describe()}",
        ("row", "ms a step", "tokens/s", "time / ours", "from", "to", "peak GiB", "of the limit", "first step, s"),
        data=as_json(measured),
        failures=list(measured.disagreeing.values()),
    )
    for row in measured.in_order:
        low, middle, high = measured.time_ratio(row)
        peak = None if row.peak_bytes is None else row.peak_bytes / 2**30
        cells = row.name, 1e3 * row.median, measured.case.tokens / row.median, middle, low, high, peak
        table.rows.append((*cells, measured.share_of_limit(row), row.first_seconds))
    turns = f"noise {measured.noise:.1%}; {len(measured.subject.seconds)} turns of each row"
    table.remarks = [turns, *measured.remarks]
    table.remarks += [f"{name} was left out: {reason}" for name, reason in measured.left_out.items()]
    peer = measured.fastest_peer
    if peer is not None and (bar := measured.case.bar) is not None:
        reached = measured.time_ratio(peer)[1]
        table.remarks.append(f"fastest peer {peer.name}: {reached:.2f} of our time; the bar is {bar.time:g}")
    return table


# (d)


class Point(NamedTuple):
    row: str
    batch_size: int


def memory(setting: Setting) -> Part:
    """The largest sum of tensors in a step of G1, for batches that grow until they do not fit."""
    from ..peers import why_not

    sizes = (2, 4) if setting.small else BATCH_SIZES
    names = TRIED[:1] if setting.small else OF_MEMORY
    table = Table("G1: peak GiB over the batch size", ("row", *(f"B={size}" for size in sizes)))
    for name in names:
        if network_of(name) == "huggingface" and (reason := why_not(cases(setting)["G1"].config)):
            table.remarks.append(f"{name} was left out: {reason}")
            continue
        peaks: list[float | str | None] = []
        for point, found in each(peak, [Point(name, size) for size in sizes], setting):
            if isinstance(found, Failed):
                expected = found.late or "out of memory" in found.message.lower()
                said = table.remarks if expected else table.failures
                said.append(f"{name}, B={point.batch_size}: {found.message}")
                break
            peaks.append(found)
        table.rows.append((name, *peaks, *[None] * (len(sizes) - len(peaks))))
    yield table


def peak(point: Point, setting: Setting) -> float | None:
    """The peak memory of some steps [GiB]; None if the system does not report it."""
    import gc

    import torch

    from ....common.allocator import resident_bytes
    from ..process_memory import peak_since_reset, reset_peak

    case = replace(cases(setting)["G1"], batch_size=point.batch_size)
    before = resident_bytes("VmRSS")
    steps = rows.Steps(point.row, case)
    known = reset_peak(steps.device)
    steps.seconds(2)
    found = peak_since_reset(steps.device, before) if known else None
    del steps
    gc.collect()
    if setting.device != "cpu":
        torch.cuda.empty_cache()
    return None if found is None else found / 2**30
