"""Where a run comes from: its command line, and the sweep that it is a job of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = "config_sources.json"  # in a run directory: where each value of its config was set
SEPARATOR = "\n\n----\n\n"  # between the texts of a file in samples/ of a run directory


@dataclass(frozen=True)
class Origin:
    overrides: tuple[str, ...] = ()  # KEY=VALUE from the command line: only these change a resumed run's config
    sources: Mapping[str, str] = field(default_factory=dict)  # for each dotted key: where its value was set
    sweep: Path | None = None  # the sweep's directory, if this run is a job of one
    job: int = 0  # its number in the sweep
