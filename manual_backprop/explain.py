"""`python -m manual_backprop.explain` writes docs/one-step.md: one step of backpropagation, number by number.

A network small enough to print makes one training step; the page shows every line of code that runs, every tensor that
it makes, forward and backward, and autograd's number beside every gradient.
What is explained, and how it is watched and laid out: study/explain/.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.config.arguments import Parser
from manual_backprop.config.schema import ARCHITECTURES

DEFAULT_OUTPUT = "docs/one-step.md"
DESCRIPTION = """\
Writes one step of backpropagation down, number by number: a network of one block, three words and four dimensions;
every line of code that runs, every tensor that it makes, and autograd's number beside every gradient. Takes a few
seconds, is the same at each run, and trains nothing."""
EPILOG = """\
Exit codes: 0 done, 1 a gradient is not autograd's (the page shows which), 2 a wrong option, 4 the page cannot be
written."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("explain", DESCRIPTION, EPILOG)
    parser.add_argument(
        "--architecture",
        choices=tuple(ARCHITECTURES),
        default="gpt2",
        help="gpt2: norms before the sublayers, tied head, GELU; vaswani: norms after them, its own head, ReLU; llama: "
        "RMS norms, rotary positions, shared keys and values, SwiGLU (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path(DEFAULT_OUTPUT), metavar="FILE", help="the page (default: %(default)s)"
    )
    chosen = parser.parse(arguments)
    from manual_backprop.study.explain.example import explain  # torch, only now

    print(explain(chosen.architecture, chosen.output))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
