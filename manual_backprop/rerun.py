"""Repeat a run, and check whether its losses are the same, bit by bit.

`python -m manual_backprop.rerun RUN [KEY=VALUE ...]`. The new run has the old one's config, seed and threads. Before it
starts, it lists everything that differs from then: code, packages, data, machine, and changes by the command line. If
the losses differ although nothing else does, that is a bug, which the exit code reports.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from manual_backprop.common.errors import EXIT_DONE, InputError
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.common.startup.output import enduring_output
from manual_backprop.config.arguments import Parser
from manual_backprop.trained_models.saved_model import names_a_run
from manual_backprop.training.reproduction import rerun

COMMAND = "python -m manual_backprop.rerun"

HELP = """\
RUN is `last`, a run id or its last six characters, its id in MLflow, or the path of its directory. KEY=VALUE changes
its config, as on the command line of manual_backprop.run.

  python -m manual_backprop.rerun last
  python -m manual_backprop.rerun 4f1c2a precision=bf16

The new run is in outputs/runs like every other, with the tag `rerun_of`. Ctrl-C ends it; the steps until then are
compared.

exit code  0  the losses are bitwise the same, or a difference between then and now was listed
           1  no difference was listed, but the losses differ
           2  there is no such run, or its config cannot be used any more
"""


@enduring_output()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("rerun", (__doc__ or "").splitlines()[0], HELP)
    parser.add_argument("run", metavar="RUN", help="the run to repeat")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes of its config")
    options = parser.parse(arguments)
    if "=" in options.run and not names_a_run(options.run):
        raise InputError(f"{options.run}: the first argument must name the run: {COMMAND} RUN {options.run}")
    rerun(options.run, options.overrides, Path.cwd())
    return EXIT_DONE


if __name__ == "__main__":
    from manual_backprop.common.interruption import exit_on_signal

    exit_on_signal()
    sys.exit(exit_code_of(main))
