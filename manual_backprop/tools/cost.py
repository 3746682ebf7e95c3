"""What things cost on this machine: logging, inspection and loading in a training step, preparing, runs in parallel."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..arguments import Parser, sub_command
from ..cost import inspection, loading, parallel, preparing, tracking
from ..errors import EXIT_DONE, EXIT_FAILED
from ..exit_codes import exit_code_of

COMMAND = "python -m manual_backprop.tools.cost"


@dataclass(frozen=True)
class Cost:
    """One of the commands. `module` measures, and its docstring says how."""

    module: ModuleType
    about: str
    exit_codes: str
    example: str


COSTS = {
    "tracking": Cost(
        tracking,
        "what a training step takes longer because it is logged and sent to MLflow",
        f"0 at most {tracking.BAR:.0%}, 1 more, or it could not be measured, 2 wrong arguments.",
        "--model tiny --steps 100 --json tracking.json",
    ),
    "inspection": Cost(
        inspection,
        "what training.inspect_every adds to a training step",
        f"0 at most {inspection.BAR:.0%}, 1 more, or it could not be measured, 2 wrong arguments.",
        "model=tiny --every 10",
    ),
    "loading": Cost(
        loading,
        "which share of a training step goes into making its batches",
        f"0 at most {loading.BAR:.0%}, 1 more, 2 wrong arguments.",
        "--model tiny --pairs 200",
    ),
    "preparing": Cost(
        preparing,
        "how fast a text becomes tokens on disk, and how much memory that takes",
        "0 done, 1 the preparation failed, 2 wrong arguments, 4 the disk is full.",
        "--megabytes 1000",
    ),
    "parallel": Cost(
        parallel,
        "whether MLflow gets everything of many runs at once",
        "0 everything arrived, 1 something did not, 2 wrong arguments.",
        "--rounds 1 --jobs 4",
    ),
}

OVERVIEW = "\n".join(
    (
        f"{__doc__}\n\nGive one of\n",
        *(f"  {COMMAND} {name:<12}{cost.about}" for name, cost in COSTS.items()),
        "\nEach takes --help. Measure on a machine that does nothing else.",
    )
)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = sub_command(COMMAND, OVERVIEW, list(COSTS), arguments)
    if chosen is None:
        return EXIT_DONE
    name, rest = chosen
    cost = COSTS[name]
    examples = f"Examples\n\n  {COMMAND} {name}\n  {COMMAND} {name} {cost.example}"
    parser = Parser(f"tools.cost {name}", cost.module.__doc__ or "", f"{examples}\n\nExit codes: {cost.exit_codes}")
    cost.module.add_options(parser)
    options = parser.parse(rest)
    with tempfile.TemporaryDirectory(prefix=f"cost-{name}-", ignore_cleanup_errors=True) as folder:
        return EXIT_DONE if cost.module.measure(options, Path(folder)) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
