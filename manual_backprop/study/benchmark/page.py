"""Shows a measurement: as a table, as JSON, and as a picture."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...common.machine import cpu_fields, processor
from ...common.pictures import new_figure, picture, save_figure, with_grid
from ...models.flops import flops_per_token
from .cases import OURS
from .measurement import MeasuredRow, Measurement

VERSION = 1  # of the JSON
WIDTH = 29  # of the column with the names of rows
INSTRUCTIONS = {"amx_tile": "AMX", "avx512_bf16": "AVX-512 with bf16", "avx512f": "AVX-512", "avx2": "AVX2"}


def table(measured: Measurement) -> str:
    case, subject = measured.case, measured.subject
    flops = flops_per_token(case.config, case.config.max_seq_len) * case.tokens
    rate = flops / measured.products.median
    head = (
        f"{'row':<{WIDTH}}{'ms a step':>11}{'tokens/s':>11}{'time / ours':>13}{'quartiles':>16}{'peak MB':>10}"
        f"{'/ ours':>8}{'of the limit':>14}{'first, s':>10}{'cold, s':>9}"
    )
    lines = [
        case.describe(),
        f"{processor_and_instructions()}; matrix products: {products_of(measured)}",
        f"{flops / 1e9:.1f} GFLOP a step; its matrix products alone take {1e3 * measured.products.median:.4g} ms, "
        f"{rate / 1e12:.2f} TFLOP/s: the limit. {len(subject.seconds)} turns of each row.",
        "",
        head,
    ]
    for row in measured.in_order:
        low, middle, high = measured.time_ratio(row)
        memory = measured.memory_ratio(row)
        peak = "unknown" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        cold = f"{row.cold_seconds:.1f}" if row.cold_seconds is not None else "cold" if row.cache == "cold" else ""
        lines.append(
            f"{row.name:<{WIDTH}}{1e3 * row.median:>11.4g}{case.tokens / row.median:>11,.0f}{middle:>13.3f}"
            f"{f'{low:.3f} - {high:.3f}':>16}{peak:>10}"
            f"{'' if memory is None else f'{memory:.2f}':>8}{measured.share_of_limit(row):>14.1%}"
            f"{row.first_seconds:>10.1f}{cold:>9}"
        )
    lines += [f"{name:<{WIDTH}} left out: {reason}" for name, reason in measured.left_out.items()]
    return "\n".join([*lines, "", *_closing(measured)])


def products_of(measured: Measurement) -> str:
    """The library of the matrix products of each row: "oneDNN in custom-fused; MKL in baseline-eager"."""
    rows: dict[str, list[str]] = {}
    for row in measured.rows.values():
        rows.setdefault(row.products, []).append(row.name)
    if len(rows) == 1:
        return f"{next(iter(rows))} in all rows"
    return "; ".join(f"{library} in {', '.join(names)}" for library, names in rows.items())


def processor_and_instructions() -> str:
    """The processor's name, its family and model if the system reports them (a virtual machine may hide the name), and
    the widest of its INSTRUCTIONS."""
    fields = cpu_fields()
    words = [f"{key.removeprefix('cpu ')} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    has = fields.get("flags", "").split()
    words += [name for flag, name in INSTRUCTIONS.items() if flag in has][:1]
    return f"{processor()} ({', '.join(words)})" if words else processor()


def _closing(measured: Measurement) -> list[str]:
    lines = [f"noise floor {measured.noise:.1%} ({measured.subject.name} against itself): no smaller difference counts"]
    if any(row.cache == "cold" for row in measured.rows.values()):
        lines.append("compiled code could not be cached: peaks of rows marked cold include the compiler's memory")
    elif any(row.cache == "warm" for row in measured.rows.values()):
        lines.append("peaks with a warm compile cache")
    failed = [row.name for row in measured.rows.values() if row.cache == "failed"]
    lines += [f"{name} ran uncompiled: compiling does not work here" for name in failed]
    lines += measured.remarks
    peer = measured.fastest_peer
    if peer is None:
        return [*lines, "no peer was measured"]
    low, middle, high = measured.time_ratio(peer)
    memory = measured.memory_ratio(peer)
    closing = f"fastest peer: {peer.name}; time peer/ours = {middle:.2f} ({low:.2f} to {high:.2f})"
    closing += "" if memory is None else f"; memory ours/peer = {1 / memory:.2f}"
    if bar := measured.case.bar:
        closing += f"; the bar: time at least {bar.time:g}"
        closing += "" if bar.memory is None else f", memory at most {bar.memory:g}"
        reached = middle >= bar.time and (bar.memory is None or (memory is not None and 1 / memory <= bar.memory))
        closing += f", which is {'reached' if reached else 'missed'}"
    return [*lines, closing]


def as_json(measured: Measurement) -> dict[str, Any]:
    """Everything that was measured, and the derived numbers of the table. Times in seconds, memory in bytes."""
    peer = measured.fastest_peer

    def row_of(row: MeasuredRow) -> dict[str, Any]:
        content = {key: value for key, value in asdict(row).items() if key != "processor"}
        low, middle, high = measured.time_ratio(row)
        return content | {
            "time_ratio": middle,
            "time_ratio_quartiles": [low, high],
            "memory_ratio": measured.memory_ratio(row),
            "share_of_limit": measured.share_of_limit(row),
        }

    return {
        "case": asdict(measured.case),
        "rows": [row_of(row) for row in measured.in_order],
        "left_out": measured.left_out,
        "remarks": measured.remarks,
        "products": measured.products.seconds,
        "noise": measured.noise,
        "subject": measured.subject.name,
        "fastest_peer": None if peer is None else peer.name,
    }


def machine() -> dict[str, str]:
    """The hardware and software that the numbers depend on."""
    import torch

    found = {"torch": torch.__version__, "python": platform.python_version(), "processor": processor_and_instructions()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


@picture
def draw(measurements: Sequence[Measurement], path: Path) -> None:
    """Writes a PNG: two diagrams for each case, time and memory of its rows. Raises StorageError."""
    heights = [1.1 + 0.3 * len(measured.rows) for measured in measurements]
    figure = new_figure(9, sum(heights))
    grid = figure.subplots(len(measurements), 2, squeeze=False, height_ratios=heights)
    for measured, (left, right) in zip(measurements, grid, strict=True):
        names = list(measured.rows)
        colors = ["tab:orange" if name in OURS else "tab:blue" for name in names]
        milliseconds = [1e3 * row.median for row in measured.rows.values()]
        bounds = [measured.time_ratio(row) for row in measured.rows.values()]
        errors = [
            [time * (1 - low / middle) for time, (low, middle, _) in zip(milliseconds, bounds, strict=True)],
            [time * (high / middle - 1) for time, (_, middle, high) in zip(milliseconds, bounds, strict=True)],
        ]
        left.barh(names, milliseconds, xerr=errors, color=colors, error_kw={"elinewidth": 1})
        left.axvline(1e3 * measured.products.median, color="black", linestyle=":", linewidth=1)
        left.set_xlabel("ms a step (dotted: its matrix products alone)")
        left.set_title(measured.case.describe(), fontsize=8, loc="left")
        known = [(row.peak_bytes or 0) / 1e6 for row in measured.rows.values()]
        right.barh(names, known, color=colors)
        right.set_xlabel("peak memory [MB]")
        right.set_yticklabels([])
        for axes in (left, right):
            axes.invert_yaxis()
            with_grid(axes, "x")
    save_figure(figure, path)
