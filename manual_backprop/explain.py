"""`python -m manual_backprop.explain` writes docs/one-step.md: one step of backpropagation, number by number.

A network small enough to print makes one training step; the page shows every line of code that runs, every tensor that
it makes, forward and backward, and autograd's number beside every gradient. Here stands what is explained: the text,
the sizes, the weights. How it is watched: study/explain/trace.py; how it is laid out: study/explain/page.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manual_backprop.common.errors import CheckFailedError, StorageError
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.config.schema import ARCHITECTURES, CustomTransformerConfig

if TYPE_CHECKING:
    from manual_backprop.common.batch import Batch
    from manual_backprop.models.custom import CustomTransformer

COMMAND = "python -m manual_backprop.explain"
DEFAULT_OUTPUT = "docs/one-step.md"

WORDS = ("we", "go", "round", "and", "stop")
TEXT = ("round", "and", "round", "we")  # the last is only a target; the first is read twice
LEARNING_RATE = 0.01
SEED = 202  # of weights whose numbers are worth reading: no probability near 0 or 1, few gradients near 0
TOLERANCE = 1e-12  # of a number by hand against autograd's, in float64


def small_network(architecture: str) -> CustomTransformer:
    """One block of D = 4, in float64, with parameters in whole tenths, which a page can print in full.

    Not the initial values of training: there, gains are 1, biases 0 and matrices tiny, and half of the calculus would
    not show. Matrices have standard deviation 1 / sqrt(inputs), tables and heads 1, gains 1 + 0.3 e, biases 0.3 e.
    """
    import torch

    from manual_backprop.models.custom import CustomTransformer

    network = CustomTransformer(
        CustomTransformerConfig(
            vocab_size=len(WORDS),
            d_model=4,
            n_blocks=1,
            n_heads=2,
            n_kv_heads=1 if architecture == "llama" else None,
            d_ffn=7 if architecture == "llama" else 6,  # twice 6 would look like query, key and value
            max_seq_len=len(TEXT) - 1,
            architecture=architecture,
            precision="fp64",
        )
    )
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in network.parameters.items():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 2:
            values = noise if "embedding" in name or name.startswith("head") else noise / parameter.shape[1] ** 0.5
        else:
            values = (1 if name.endswith("norm.weight") else 0) + 0.3 * noise
        parameter.copy_((values * 10).round() / 10)
    return network


def small_batch() -> Batch:
    import torch

    from manual_backprop.common.batch import Batch

    ids = torch.tensor([[WORDS.index(word) for word in TEXT]])
    return Batch(tokens=ids[:, :-1], targets=ids[:, 1:])


def write(path: Path, page: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}. Choose another --output.") from error


def explain(architecture: str, output: Path) -> str:
    """Write the page; return the sentence that says so. CheckFailedError where by hand and autograd differ."""
    from manual_backprop.study.explain.autograd import trace_step
    from manual_backprop.study.explain.page import Page

    traced = trace_step(small_network(architecture), small_batch(), denominator=len(TEXT) - 1)
    page = Page(
        traced,
        WORDS,
        TEXT,
        LEARNING_RATE,
        COMMAND + ("" if architecture == "gpt2" else f" --architecture {architecture}"),
    )
    write(output, page.text())
    worst, where = traced.worst
    counts = f"{page.tensors} tensors, {len(traced.gradients)} gradients"
    if not worst <= TOLERANCE:
        raise CheckFailedError(
            f"Wrote {output}: {counts}, and one is not autograd's: {where} differs by {worst:.1e}, "
            f"more than {TOLERANCE:.0e}. `python -m manual_backprop.verify` shows which pair is wrong."
        )
    return f"wrote {output}: {counts}, the worst {worst:.1e} from autograd's ({where})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Writes one step of backpropagation down, number by number: a network of one block, three words "
        "and four dimensions; every line of code that runs, every tensor that it makes, and autograd's number beside "
        "every gradient. Takes a few seconds, is the same at each run, and trains nothing.",
        epilog="Exit codes: 0 done, 1 a gradient is not autograd's (the page shows which), 2 a wrong option, "
        "4 the page cannot be written.",
    )
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
    chosen = parser.parse_args(arguments)

    def command() -> None:
        print(explain(chosen.architecture, chosen.output))

    return exit_code_of(command)


if __name__ == "__main__":
    sys.exit(main())
