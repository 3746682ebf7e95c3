"""The step that `python -m manual_backprop.explain` explains: its text, sizes and weights; writes the page.

trace.py records the step, and page.py lays it out.
"""

from pathlib import Path

import torch

from ...common.batch import Batch, PairBatch
from ...common.errors import CheckFailedError, StorageError
from ...config.schema import CustomTransformerConfig
from ...models.custom import CustomTransformer
from ...models.implementations import build_network
from .autograd import trace_step
from .page import Page

COMMAND = "python -m manual_backprop.explain"
WORDS = ("we", "go", "round", "and", "stop")
TEXT = ("round", "and", "round", "we")  # the last is only a target; the first is read twice
SYMBOLS = ("1", "2", "3", "4", "padding", "begin", "end")
SOURCE = ("3", "1", "4", "1", "2")  # one symbol is read twice
LEARNING_RATE = 0.01
SEED = 202  # gives readable numbers: no probability near 0 or 1, few gradients near 0
TOLERANCE = 1e-12  # between a number by hand and autograd's, in float64


def small_network(architecture: str, task: str = "language_model") -> CustomTransformer:
    """One block of D = 4 (one in the encoder and one in the decoder), in float64. The parameters are multiples of 0.1,
    which a page can print in full. All sizes differ, so that a shape is unambiguous.

    The parameters are not the initial values of training: there, gains are 1, biases 0 and matrices tiny, and half of
    the calculus would not show. Matrices have standard deviation 1 / sqrt(inputs), tables and heads 1, gains 1 + 0.3 e,
    biases 0.3 e.
    """
    if task == "reversal":
        sizes = {"vocab_size": len(SYMBOLS), "d_ffn": 9, "max_seq_len": len(SOURCE) + 1, "network": "encoder_decoder"}
    else:
        gated = architecture == "llama"
        sizes = {"vocab_size": len(WORDS), "d_ffn": 7 if gated else 6, "max_seq_len": len(TEXT) - 1}  # 12 would be 3D
    fields = sizes | {"d_model": 4, "n_blocks": 1, "n_heads": 2, "architecture": architecture, "precision": "fp64"}
    if architecture == "llama":
        fields["n_kv_heads"] = 1
    network = build_network("custom", CustomTransformerConfig(fields))  # type: ignore[arg-type]
    assert isinstance(network, CustomTransformer)
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in network.parameters.items():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 2:
            values = noise if "embedding" in name or name.startswith("head") else noise / parameter.shape[1] ** 0.5
        else:
            values = (1 if name.endswith("norm.weight") else 0) + 0.3 * noise
        parameter.copy_((values * 10).round() / 10)
    return network


def small_batch(task: str = "language_model") -> Batch | PairBatch:
    if task == "language_model":
        ids = torch.tensor([[WORDS.index(word) for word in TEXT]])
        return Batch(tokens=ids[:, :-1], targets=ids[:, 1:])
    source = torch.tensor([[SYMBOLS.index(symbol) for symbol in SOURCE]])
    begin, end = (torch.tensor([[SYMBOLS.index(word)]]) for word in ("begin", "end"))
    target = torch.cat((begin, source.flip(1), end), dim=1)
    return PairBatch(source, torch.tensor([len(SOURCE)]), tokens=target[:, :-1], targets=target[:, 1:])


def write(path: Path, page: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}. Choose another --output.") from error


def explain(architecture: str, output: Path, task: str = "language_model") -> str:
    """Writes the page and returns a sentence about it. Raises CheckFailedError if the gradients differ from
    autograd's."""
    batch = small_batch(task)
    traced = trace_step(small_network(architecture, task), batch, denominator=batch.targets.numel())
    options = "" if task == "language_model" else f" --task {task}"
    options += "" if architecture == "gpt2" else f" --architecture {architecture}"
    page = Page(traced, WORDS if task == "language_model" else SYMBOLS, LEARNING_RATE, COMMAND + options)
    write(output, page.text())
    worst, where = traced.worst
    counts = f"{page.tensors} tensors, {len(traced.gradients)} gradients"
    if not worst <= TOLERANCE:
        raise CheckFailedError(
            f"Wrote {output}: {counts}, and one differs from autograd's: {where} by {worst:.1e}, "
            f"more than {TOLERANCE:.0e}. `python -m manual_backprop.verify` shows which pair is wrong."
        )
    return f"wrote {output}: {counts}, the worst {worst:.1e} from autograd's ({where})"
