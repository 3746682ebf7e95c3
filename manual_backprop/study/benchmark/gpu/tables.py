"""The results of a part of the session, tables as Markdown and as JSON; and the settings. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Setting:
    """The settings of a session."""

    device: str  # cuda; or cpu, with small sizes that take seconds, for a try
    text: str  # the path of the text for trainings, "" for none
    until: float  # [s], by time.monotonic(): the deadline of a part

    @property
    def small(self) -> bool:
        return self.device == "cpu"


@dataclass
class Table:
    """Rows of measurements, unrounded; numbers are rounded for display."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    data: Any = None  # additional data for the JSON
    failures: list[str] = field(default_factory=list)  # a sentence for everything that is wrong

    def markdown(self) -> str:
        lines = [f"### {self.title}", ""]
        if self.rows:
            lines += [_line(self.columns), "|" + "---|" * len(self.columns)]
            lines += [_line(shown(value) for value in row) for row in self.rows]
            lines.append("")
        lines += [f"- {text}" for text in (*(f"**{failure}**" for failure in self.failures), *self.remarks)]
        return "\n".join(lines).rstrip() + "\n"

    def as_json(self) -> dict[str, Any]:
        rows = [[_finite(value) for value in row] for row in self.rows]
        content = {"title": self.title, "columns": self.columns, "rows": rows, "remarks": self.remarks}
        return content | {"failures": self.failures} | ({} if self.data is None else {"data": self.data})


Part = Iterator[Table]


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if 1e-3 <= abs(value) < 1e7 or value == 0 else f"{value:.2e}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _finite(value: Any) -> Any:
    """The value without infinity and NaN, which JSON does not have."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
