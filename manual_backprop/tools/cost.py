"""Measures overhead on this machine: logging, inspection, loading, preparing, parallel runs, several processes."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..common.errors import EXIT_DONE, EXIT_FAILED
from ..common.exit_codes import exit_code_of
from ..config.arguments import Parser, sub_command
from ..training.cost import inspection, loading, parallel, preparing, reduction, tracking

COMMAND = "python -m manual_backprop.tools.cost"
COSTS = {
    cost.__name__.rpartition(".")[2]: cost for cost in (tracking, inspection, loading, preparing, parallel, reduction)
}


def overview() -> str:
    """The help: each command with the first line of its module's docstring."""
    lines = [f"  {name:<12}{str(cost.__doc__).splitlines()[0]}" for name, cost in COSTS.items()]
    return "\n".join((f"{__doc__}\n\n{COMMAND} and one of\n", *lines, "\nEach takes --help."))


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = sub_command(COMMAND, overview(), list(COSTS), arguments)
    if chosen is None:
        return EXIT_DONE
    name, rest = chosen
    about, _, epilog = str(COSTS[name].__doc__).partition("\nExample")
    parser = Parser(f"tools.cost {name}", about, f"Example{epilog}")
    COSTS[name].add_options(parser)
    options = parser.parse(rest)
    with tempfile.TemporaryDirectory(prefix=f"cost-{name}-", ignore_cleanup_errors=True) as folder:
        return EXIT_DONE if COSTS[name].measure(options, Path(folder)) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
