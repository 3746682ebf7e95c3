"""(c) Steps compared with those of the peers, and without each optimization; (d) memory over the batch size.

Rows and turns are those of the bench, with two differences. All rows of a case warm up at once, since their compilers
need the processors and not the GPU. And gradients are compared only with each other: (a) has compared them with
float64.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import NamedTuple

from ....common.errors import CheckFailedError
from ....config.schema import CustomTransformerConfig
from .. import rows
from ..ablations import WITHOUT, ablated
from ..cases import CASES, GRAPHS, SUBJECT, Case
from ..measurement import Measurement, measure
from ..page import as_json
from .optimizations import OPTIMIZATIONS
from .processes import Failed, each
from .tables import Part, Setting, Table

SHARES = {"G1": 5.0, "G4": 2.0, "G3": 2.0}  # of the time, to warm up and to measure
PEERS = ("baseline-compiled", "huggingface-compiled")
OF_SMALL_ONES = tuple(f"{name}{GRAPHS}" for name in PEERS)  # there launches limit the time, and memory is small
ABLATED = {"G3": (1.5, 8), "G1": (2.0, 4)}  # share of the time, and the number of rows that are measured together
TRIED = ("custom-reference", "baseline-eager")  # on a CPU, where compiling is not worth it
BATCH_SIZES = (8, 16, 32, 64, 96, 128, 192, 256)
OF_MEMORY = (SUBJECT, "custom-recompute", "baseline-eager", "huggingface-eager")
TINY = CustomTransformerConfig(vocab_size=37, d_model=24, n_blocks=1, n_heads=4, d_ffn=52, max_seq_len=16)


def cases(setting: Setting) -> dict[str, Case]:
    """The cases, in the order in which they are measured."""
    found = {name: CASES[name].case(name, "bf16_mixed", 1, None) for name in ("G1", "G4", "G3")}
    if not setting.small:
        return found
    tiny = replace(TINY, precision="bf16_mixed")
    return {name: replace(case, config=tiny, batch_size=3, bar=None) for name, case in found.items()}


# (c)


def comparison(setting: Setting) -> Part:
    found, subject = cases(setting), subject_of(setting)
    left = sum(SHARES.values()) + sum(share for share, _ in ABLATED.values())

    def part_of_time(share: float) -> float:
        nonlocal left
        now, all_of_it = time.monotonic(), left
        left -= share
        return now + max(0.0, setting.until - now) * share / all_of_it

    for name, case in found.items():
        peers = TRIED[1:] if setting.small else PEERS if name == "G1" else PEERS + OF_SMALL_ONES
        yield _measured(f"{name} compared with its peers", case, [subject, *peers], part_of_time(SHARES[name]))
    for name, (share, at_once) in ABLATED.items():
        until = part_of_time(share)
        wanted = [one for one, optimization in OPTIMIZATIONS.items() if optimization.applies(found[name])]
        if setting.small:
            wanted = wanted[:1]
        for first in range(0, len(wanted), at_once):
            some = wanted[first : first + at_once]
            title = f"{name} without {', '.join(some)}"
            yield _measured(title, found[name], [subject, *(WITHOUT + one for one in some)], until)


def subject_of(setting: Setting) -> str:
    return TRIED[0] if setting.small else SUBJECT


def _measured(title: str, case: Case, names: Sequence[str], until: float) -> Table:
    if time.monotonic() >= until:
        return Table(title, (), remarks=["there was no time for it"])
    try:
        return table_of(title, measure(case, names, work=work, at_once=True, until=until))
    except CheckFailedError as error:
        return Table(title, (), failures=[str(error)])


def work(end: Connection, name: str, case: Case) -> None:
    """`rows.work` of a row, or of the subject without one optimization."""
    if name.startswith(WITHOUT):
        subject = TRIED[0] if case.config.device == "cpu" else SUBJECT
        rows.prepare(subject, case)
        with ablated(OPTIMIZATIONS[name.removeprefix(WITHOUT)]):
            rows.work(end, subject, case)
    else:
        rows.work(end, name, case)


def table_of(title: str, measured: Measurement) -> Table:
    table = Table(
        f"{title}: {measured.case.describe()}",
        ("row", "ms a step", "tokens/s", "time / ours", "from", "to", "peak GiB", "of the limit", "first step, s"),
        data=as_json(measured),
    )
    for row in (measured.subject, measured.again, *list(measured.rows.values())[1:]):
        low, middle, high = measured.time_ratio(row)
        peak = None if row.peak_bytes is None else row.peak_bytes / 2**30
        table.rows.append(
            (
                *(row.name, 1e3 * row.median, measured.case.tokens / row.median, middle, low, high, peak),
                *(measured.share_of_limit(row), row.first_seconds),
            )
        )
    table.remarks = [
        f"noise {measured.noise:.1%}; {len(measured.subject.seconds)} turns of each row",
        *measured.remarks,
    ]
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
    sizes = (2, 4) if setting.small else BATCH_SIZES
    names = TRIED[:1] if setting.small else OF_MEMORY
    table = Table("G1: peak GiB over the batch size", ("row", *(f"B={size}" for size in sizes)))
    for name in names:
        peaks: list[float | str | None] = []
        for point, found in each(peak, [Point(name, size) for size in sizes], setting):
            if isinstance(found, Failed):
                table.remarks.append(f"{name}, B={point.batch_size}: {found.message}")
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
