"""The table of README.md, from files that `bench --json` has written: each case and precision, with its fastest
peer."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...common.errors import InputError
from ...config.schema import PRECISIONS
from .page import VERSION

HEAD = (
    "| case | precision | ours | of the limit | fastest peer | time, peer / ours | noise | memory, ours / peer "
    "| with |",
    "|---|---|--:|--:|---|--:|--:|--:|---|",
)


def page(paths: Sequence[Path]) -> str:
    """The table, in the order of cases and precisions; then the processor, and the cases where ours is slower.

    Raises InputError for other files, and if a case was measured twice.
    """
    machines: dict[str, None] = {}
    measured: dict[tuple[str, str], dict[str, Any]] = {}
    for path in paths:
        content = _content(path)
        machine = content["machine"]
        for one in content["cases"]:
            key = one["case"]["name"], one["case"]["config"]["precision"]
            if key in measured:
                raise InputError(f"{path}: {' '.join(key)} is also in another of the files; give one of them")
            measured[key] = one
            threads = one["case"]["threads"]
            machines[f"{machine['processor']}, {threads} threads, torch {machine['torch'].partition('+')[0]}"] = None
    ordered = sorted(measured.items(), key=lambda item: (item[0][0], PRECISIONS.index(item[0][1])))
    lines = [*HEAD, *(_line(name, precision, one) for (name, precision), one in ordered)]
    ratios = {f"{name} in {precision}": _peer(one)["time_ratio"] for (name, precision), one in ordered}
    slower = ", ".join(f"{case} ({ratio:.2f})" for case, ratio in ratios.items() if ratio < 1)
    closing = f"Ours is slower than the fastest peer in {slower}." if slower else "Ours is slower nowhere."
    return "\n".join([*lines, "", f"Measured on {'; '.join(machines)}. {closing}"])


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it holds no JSON"
        raise InputError(f"--markdown {path}: {reason}; give files that --json wrote") from None
    if not isinstance(content, dict) or content.get("version") != VERSION or "cases" not in content:
        raise InputError(f"--markdown {path}: it is not a file that --json writes (with --grow it writes others)")
    return content


def _peer(one: dict[str, Any]) -> dict[str, Any]:
    """The row of the fastest peer. Raises InputError if none was measured."""
    for row in one["rows"]:
        if row["name"] == one["fastest_peer"]:
            return row
    raise InputError(f"{one['case']['name']} in {one['case']['config']['precision']}: no peer was measured")


def _command(name: str, precision: str, one: dict[str, Any]) -> str:
    """The command that repeats the measurement of a named case; the sizes of other cases are only in the file."""
    subject, _, *others = one["rows"]
    rows = " ".join(row["name"] for row in others)
    rounds = len(subject["seconds"]) // 2
    return f"python -m manual_backprop.bench --case {name} --precision {precision} --rounds {rounds} --rows {rows}"


def _line(name: str, precision: str, one: dict[str, Any]) -> str:
    ours, peer = one["rows"][0], _peer(one)
    low, high = peer["time_ratio_quartiles"]
    milliseconds = 1e3 * statistics.median(ours["seconds"])
    peak = ours["peak_bytes"]
    cells = [
        name,
        precision,
        f"{milliseconds:,.4g} ms" + ("" if peak is None else f", {peak / 1e6:,.0f} MB"),
        f"{ours['share_of_limit']:.0%}",
        f"`{peer['name']}`",
        f"{peer['time_ratio']:.2f} ({low:.2f} to {high:.2f})",
        f"{one['noise']:.1%}",
        "" if peer["memory_ratio"] is None else f"{1 / peer['memory_ratio']:.2f}",
        f"`{_command(name, precision, one)}`",
    ]
    return f"| {' | '.join(cells)} |"
