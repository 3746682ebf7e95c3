"""`python -m manual_backprop.explain` writes docs/one-step.md: one step of backpropagation, number by number; with
`--task reversal` that of an encoder-decoder, docs/one-step-encoder-decoder.md; and steps of the other tasks.

The page shows one training step of a tiny network: every executed line of code, every tensor that it computes, forward
and backward, and autograd's number beside every gradient. The code is in study/explain/.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.config.arguments import Parser
from manual_backprop.config.schema import ARCHITECTURES

OUTPUTS = {"language_model": "docs/one-step.md", "reversal": "docs/one-step-encoder-decoder.md"}
OUTPUTS |= {task: f"one-step-{task}.md" for task in ("translation", "classification", "forecasting")}
DESCRIPTION = """\
Writes one step of backpropagation down, number by number: a network of one block, a few words and four dimensions;
every line of code that runs, every tensor that it makes, and autograd's number beside every gradient. Takes a few
seconds, is the same at each run, and trains nothing."""
EPILOG = """\
Exit codes: 0 done, 1 a gradient differs from autograd's (the page shows which), 2 a wrong option, 4 the page cannot be
written."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("explain", DESCRIPTION, EPILOG)
    parser.add_argument(
        "--architecture",
        choices=tuple(ARCHITECTURES),
        default="gpt2",
        help="gpt2: norms before the sublayers, tied head, GELU; vaswani: norms after them, separate head, ReLU; "
        "llama: RMS norms, rotary positions, shared keys and values, SwiGLU (default: %(default)s)",
    )
    parser.add_argument(
        "--task",
        choices=tuple(OUTPUTS),
        default="language_model",
        help="language_model: a decoder says which word comes next; reversal: an encoder and a decoder, of one block "
        "each, turn a sequence round; translation: likewise, an English text becomes a French one; classification: an "
        "encoder says which label a text has; forecasting: likewise, the next weeks of CO2 (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the page (default: {OUTPUTS['language_model']}, for reversal {OUTPUTS['reversal']}, for the others "
        "one-step-TASK.md)",
    )
    chosen = parser.parse(arguments)
    from manual_backprop.study.explain.example import explain  # imports torch, so only after the arguments are checked

    print(explain(chosen.architecture, chosen.output or Path(OUTPUTS[chosen.task]), chosen.task))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
