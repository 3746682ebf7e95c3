"""`python -m manual_backprop.tools.levels` writes docs/three-levels.md: a comparison of three levels of one network.

Lines of code are counted in the sources. Step time and memory are measured in pairs, as in `bench`, and the errors of
gradients against float64. All numbers on the page are measured. Takes minutes; run it on an idle machine.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..common.durable_files import write_page
from ..common.exit_codes import exit_code_of
from ..config.arguments import Parser, whole
from ..config.network import CPU_PRECISIONS
from ..config.schema import ARCHITECTURES, model_sizes

DEFAULT_OUTPUT = "docs/three-levels.md"


def main(arguments: Sequence[str] | None = None) -> None:
    epilog = (
        "Exit codes: 0 done, 1 the levels disagree or a measuring process failed, 2 a wrong option, 4 the page cannot "
        "be written."
    )
    parser = Parser("tools.levels", __doc__ or "", epilog)
    parser.add_argument("--architecture", choices=tuple(ARCHITECTURES), default="gpt2", help="(%(default)s)")
    parser.add_argument("--model", choices=tuple(model_sizes()), default="small", help="(%(default)s)")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=CPU_PRECISIONS,
        default=CPU_PRECISIONS,
        metavar="P",
        help="of the steps (all four)",
    )
    parser.add_argument("--batch-size", type=whole(1), default=16, metavar="B", help="sequences (%(default)s)")
    parser.add_argument(
        "--rounds", type=whole(1), default=5, metavar="R", help="rounds of turns, forwards and backwards (%(default)s)"
    )
    parser.add_argument("--threads", type=whole(1), default=os.cpu_count(), metavar="N", help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(DEFAULT_OUTPUT), metavar="FILE", help="(%(default)s)")
    chosen = parser.parse(arguments)
    from ..study.levels import page  # imports torch, so only after the arguments are checked

    steps = (chosen.batch_size, chosen.rounds, chosen.threads, chosen.precision)
    write_page(chosen.output, page(chosen.architecture, chosen.model, *steps))
    print(f"wrote {chosen.output}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
