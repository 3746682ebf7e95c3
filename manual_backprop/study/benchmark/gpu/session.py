"""The whole session: one part after the other, each with its share of the time; each table is written at once.

Time that a part does not need is left to the later ones. A part that fails is recorded as failed, and the next one
starts. results.md is for people; results.json has the same numbers, unrounded.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from ....common.durable_files import storage_errors, write_atomically
from ....common.errors import CheckFailedError
from .tables import Part, Setting, Table

VERSION = 1  # of the JSON


@dataclass(frozen=True)
class Kind:
    about: str
    seconds: float  # of ten minutes
    function: str  # module.function in this folder: Setting -> Part; imported when it runs

    def run(self, setting: Setting) -> Part:
        module, name = self.function.split(".")
        tables: Part = getattr(import_module(f".{module}", __package__), name)(setting)
        return tables


PARTS = {
    "a": Kind(
        "correctness: pairs and networks against float64 on the CPU, graphs against eager steps",
        60,
        "correctness.correctness",
    ),
    "b": Kind("limits: copies, products, attention alone", 60, "limits.limits"),
    "c": Kind("steps of G1, G4 and G3 compared with the peers; each optimization alone", 300, "comparison.comparison"),
    "d": Kind("memory over the batch size", 60, "comparison.memory"),
    "e": Kind("nanoGPT's two settings, trained", 120, "training.training"),
}


@dataclass
class Done:
    """The outcome of a part."""

    about: str
    tables: list[Table] = field(default_factory=list)
    seconds: float = 0.0
    failure: str = ""


def run(setting: Setting, minutes: float, names: Sequence[str], folder: Path) -> None:
    """Runs the parts `names`. Raises CheckFailedError at the end if something was wrong, StorageError if results cannot
    be written."""
    begin = time.monotonic()
    total = sum(PARTS[name].seconds for name in names)
    done: dict[str, Done] = {}
    machine = _machine()
    passed = 0.0
    for name in PARTS:
        if name not in names:
            continue
        kind, started = PARTS[name], time.monotonic()
        part = done[name] = Done(kind.about)
        passed += kind.seconds
        until = begin + 60 * minutes * passed / total
        print(f"## ({name}) {kind.about}\n", flush=True)
        try:
            for table in kind.run(Setting(setting.device, setting.text, until)):
                part.tables.append(table)
                part.seconds = time.monotonic() - started
                print(table.markdown(), flush=True)
                _write(folder, machine, done)
        except Exception as error:  # the next part may succeed
            part.failure = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        part.seconds = time.monotonic() - started
        _write(folder, machine, done)
    print(f"{time.monotonic() - begin:.0f} s; written to {folder}", flush=True)
    if wrong := [text for part in done.values() for text in _failures(part)]:
        raise CheckFailedError(f"{len(wrong)} things were wrong, the first: {wrong[0]}. {folder}/results.md has all.")


def _failures(part: Done) -> list[str]:
    return [failure for table in part.tables for failure in table.failures] + ([part.failure] if part.failure else [])


def _write(folder: Path, machine: dict[str, str], done: dict[str, Done]) -> None:
    lines = ["# bench --gpu", "", "; ".join(f"{key} {value}" for key, value in machine.items()), ""]
    for name, part in done.items():
        lines += [f"## ({name}) {part.about}", "", f"{part.seconds:.0f} s.", ""]
        lines += [f"**This part failed: {part.failure}**", ""] if part.failure else []
        lines += [table.markdown() for table in part.tables]
    parts = {name: vars(part) | {"tables": [table.as_json() for table in part.tables]} for name, part in done.items()}
    content = {"version": VERSION, "machine": machine, "parts": parts}
    with storage_errors(f"write into {folder}"):
        write_atomically(folder / "results.md", "\n".join(lines).encode())
        write_atomically(folder / "results.json", (json.dumps(content, indent=1, default=str) + "\n").encode())


def _machine() -> dict[str, str]:
    """The hardware and software that the numbers depend on."""
    import importlib.metadata

    from ..page import machine

    found = machine()
    for library in ("triton", "transformers"):
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "none"
    return found | {"time": time.strftime("%Y-%m-%d %H:%M")}
