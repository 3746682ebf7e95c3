"""Where a run comes from: the command line that asked for it, and the sweep whose job it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = "config_sources.json"  # in a run's directory: where each value of its config was set
SEPARATOR = "\n\n----\n\n"  # between the texts of a file in a run's samples/


@dataclass(frozen=True)
class Origin:
    overrides: tuple[str, ...] = ()  # KEY=VALUE, as the command line named them: a resumed run takes only these
    sources: Mapping[str, str] = field(default_factory=dict)  # of each dotted key: where its value was set
    sweep: Path | None = None  # the directory of the sweep whose job this is
    job: int = 0  # its number in there
