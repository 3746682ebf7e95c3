"""The steps that `python -m manual_backprop.explain` explains, one for each task: inputs, sizes and weights. `explain`
writes their pages.

The recording of a step is in trace.py, the layout of a page in page.py and encoder_page.py.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...common.batch import AnyBatch, Batch, EncoderBatch, PairBatch
from ...common.errors import CheckFailedError, StorageError
from ...config.schema import CustomTransformerConfig
from ...models.custom import CustomTransformer
from ...models.implementations import build_network
from .autograd import trace_step
from .encoder_page import EncoderPage
from .numbers import Names, decimal
from .page import Page

COMMAND = "python -m manual_backprop.explain"
WORDS = ("we", "go", "round", "and", "stop")
TEXT = ("round", "and", "round", "we")  # the last is only a target; the first is read twice
SYMBOLS = ("1", "2", "3", "4", "pad", "begin", "end")
SOURCE = ("3", "1", "4", "1", "2")  # one symbol is read twice
ENGLISH = ("the", "cat", "and", "the", "dog")
FRENCH = ("le", "chat", "et", "le", "chien")
RATED = ("not", "good", "and", "not", "new")
RATING_WORDS = ("not", "good", "bad", "and", "new", "old")
RATINGS = ("praise", "blame", "mixed")
FIRST_WEEK, HISTORY, HORIZON = "1959-01-31", 5, 6  # of CO2: with a gap in the inputs, and one in the targets
LEARNING_RATE = 0.01
SEED = 202
TOLERANCE = 1e-12  # of a number by hand against autograd's, in float64

Words = tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """The example of a page about one step. sizes: fields of the network's config. denominator: targets that count.
    facts: texts for the names in words.toml. seed: one whose weights give readable numbers, no probability near 0 or 1
    and few gradients near 0."""

    batch: AnyBatch
    names: Names
    sizes: Mapping[str, Any]
    denominator: int
    facts: Mapping[str, str] = field(default_factory=dict)
    seed: int = SEED


def next_words() -> Example:
    """task=language_model: which word comes next."""
    ids = torch.tensor([[WORDS.index(word) for word in TEXT]])
    return Example(
        Batch(tokens=ids[:, :-1], targets=ids[:, 1:]),
        Names(read=TEXT[:-1], vocabulary=WORDS),
        {"vocab_size": len(WORDS), "d_ffn": 6, "max_seq_len": len(TEXT) - 1},
        denominator=len(TEXT) - 1,
    )


def reversed_symbols() -> Example:
    """task=reversal: a row of symbols, backwards."""
    pattern = "reversal shows here as a line from corner to corner"
    held = ", and a test fails when this page and the code differ"
    return pair(SYMBOLS, SOURCE, SOURCE[::-1], {"target": "the same backwards", "pattern": pattern, "held": held})


def translated_words() -> Example:
    """task=translation, with one vocabulary for both languages."""
    vocabulary = tuple(dict.fromkeys((*ENGLISH, *FRENCH, "pad", "begin", "end")))
    pattern = "a row shows which words of the source were looked at for the word that it says"
    facts = {"target": f"`{' '.join(FRENCH)}`", "pattern": pattern, "held": ""}
    return pair(vocabulary, ENGLISH, FRENCH, facts, seed=257)


def pair(vocabulary: Words, source: Words, target: Words, facts: dict[str, str], seed: int = SEED) -> Example:
    """The example of an encoder-decoder: one source and its target, with the tokens `begin` and `end` around it."""
    read = ("begin", *target)
    tokens, targets, sources = (
        torch.tensor([[vocabulary.index(word) for word in row]]) for row in (read, (*target, "end"), source)
    )
    return Example(
        PairBatch(sources, torch.tensor([len(source)]), tokens, targets),
        Names(read, source, vocabulary),
        {"vocab_size": len(vocabulary), "d_ffn": 9, "max_seq_len": len(read), "network": "encoder_decoder"},
        denominator=len(read),
        facts=facts,
        seed=seed,
    )


def rated_text() -> Example:
    """task=classification: which label a text has."""
    inputs = torch.tensor([[RATING_WORDS.index(word) for word in RATED]])
    return Example(
        EncoderBatch(inputs, torch.tensor([len(RATED)]), torch.tensor([RATINGS.index("blame")])),
        Names(RATED, vocabulary=RATING_WORDS, outputs=RATINGS),
        {"vocab_size": len(RATING_WORDS), "n_outputs": len(RATINGS), "network": "encoder"}
        | {"d_ffn": 7, "max_seq_len": len(RATED)},
        denominator=1,
    )


def weeks_of_co2() -> Example:
    """task=forecasting: the next weeks of the series that comes with the package, from the five before them."""
    from ...data.series.reader import SHIPPED, read_series  # numpy
    from ...data.series.windows import Scaling, Windows

    series = read_series(SHIPPED["co2"])
    scaling = Scaling.measured(series.values, HISTORY, HORIZON, None, 1, series.names, series.clock.about)
    all_weeks = [series.time_text(place) for place in range(len(series))]
    first = all_weeks.index(FIRST_WEEK)
    weeks = all_weeks[first : first + HISTORY + HORIZON]
    days = [week[5:] for week in weeks]
    windows = Windows(series.values, scaling, first + HISTORY, first + len(weeks), torch.float64)
    batch = windows.batch(windows.first - windows.first, windows.lengths)  # the only window
    measured = series.values[first : first + len(weeks), 0].tolist()
    read, wanted = batch.inputs[0, :, 0].tolist(), batch.targets[0].tolist()
    rows = [*((decimal(number), "") for number in read), *(("", decimal(number)) for number in wanted)]
    return Example(
        batch,
        Names(days[:HISTORY], inputs=("value", "gap"), outputs=days[HISTORY:]),
        {"vocab_size": 1, "n_inputs": scaling.n_inputs, "n_outputs": scaling.n_outputs, "head_loss": "squared_error"}
        | {"network": "encoder", "d_ffn": 7, "max_seq_len": HISTORY},
        denominator=int((~batch.targets.isnan()).sum()),
        facts={
            "item": "week",
            "read": str(HISTORY),
            "answered": str(HORIZON),
            "scale": decimal(scaling.scale[0], 2),
            "target_scale": decimal(scaling.target_scale[0], 2),
            "task": "\n".join(
                f"| {week} | {'' if math.isnan(value) else value} | {reads} | {says} |"
                for week, value, (reads, says) in zip(weeks, measured, rows, strict=True)
            ),
        },
        seed=242,
    )


EXAMPLES: dict[str, Callable[[], Example]] = {  # by task
    "language_model": next_words,
    "reversal": reversed_symbols,
    "translation": translated_words,
    "classification": rated_text,
    "forecasting": weeks_of_co2,
}


def small_network(architecture: str, task: str = "language_model") -> CustomTransformer:
    """One block of D = 4 (one in the encoder and one in the decoder), in float64, with parameters in whole tenths,
    which a page can print in full. All sizes differ, so that a shape identifies a tensor.

    Not the initial values of training: there, gains are 1, biases 0 and matrices tiny, and half of the calculus would
    not show. Matrices have standard deviation 1 / sqrt(inputs), tables and heads 1, gains 1 + 0.3 e, biases 0.3 e.
    """
    example = EXAMPLES[task]()
    fields = {"d_model": 4, "n_blocks": 1, "n_heads": 2, "architecture": architecture, "precision": "fp64"}
    fields |= example.sizes
    if architecture == "llama":
        fields["n_kv_heads"] = 1
        fields["d_ffn"] = 7 if task == "language_model" else fields["d_ffn"]  # 2F = 12 would be 3D
    network = build_network("custom", CustomTransformerConfig(fields))  # type: ignore[arg-type]
    assert isinstance(network, CustomTransformer)
    generator = torch.Generator().manual_seed(example.seed)
    for name, parameter in network.parameters.items():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 2:
            values = noise if "embedding" in name or name.startswith("head") else noise / parameter.shape[1] ** 0.5
        else:
            values = (1 if name.endswith("norm.weight") else 0) + 0.3 * noise
        parameter.copy_((values * 10).round() / 10)
    return network


def write(path: Path, page: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}. Choose another --output.") from error


def explain(architecture: str, output: Path, task: str = "language_model") -> str:
    """Writes the page and returns a sentence about it. Raises CheckFailedError if by hand and autograd differ."""
    example = EXAMPLES[task]()
    traced = trace_step(small_network(architecture, task), example.batch, example.denominator)
    options = "" if task == "language_model" else f" --task {task}"
    options += "" if architecture == "gpt2" else f" --architecture {architecture}"
    layout = EncoderPage if isinstance(example.batch, EncoderBatch) else Page
    page = layout(traced, example.names, example.facts, LEARNING_RATE, COMMAND + options)
    write(output, page.text())
    worst, where = traced.worst
    counts = f"{page.tensors} tensors, {len(traced.gradients)} gradients"
    if not worst <= TOLERANCE:
        raise CheckFailedError(
            f"Wrote {output}: {counts}, and one differs from autograd's: {where} differs by {worst:.1e}, "
            f"more than {TOLERANCE:.0e}. `python -m manual_backprop.verify` shows which pair is wrong."
        )
    return f"wrote {output}: {counts}, the worst {worst:.1e} from autograd's ({where})"
