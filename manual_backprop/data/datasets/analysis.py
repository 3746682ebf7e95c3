"""Statistics of a dataset under a tokenizer, with a recommended vocabulary and sequence length: `analyze_dataset`.

It compares byte-pair encodings of several sizes without any download. All come from a single training: the merges of a
small vocabulary are the first merges of a large one.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...common.errors import InputError
from ...config.schema import DatasetConfig
from ..sources.reading import Reading, training_text
from ..tokens.pretrained import tokenizer_named
from ..tokens.tokenizer import SMALLEST_BPE, BpeTokenizer, Tokenizer
from .analysis_text import CLASSES, COVERAGES, D_MODEL, GPT2_VOCAB_SIZE, RARE, Recommendations, Report, Vocabulary
from .named import check_whole, dataset_named, title_of

VOCAB_SIZES = (512, 1024, 2048, 4096, 8192, 16384)
MOST_RARE = 0.1  # largest share of rare tokens among the learned ones of a recommended vocabulary
LEAST_GAIN = 0.05  # share of tokens that the next larger vocabulary must save to be recommended
LONGEST, SHORTEST = 1024, 64  # recommended sequence lengths
TOP = 20  # most frequent tokens in a report


def analyze_dataset(
    name: str | Path | DatasetConfig,
    subset_size: int | None = None,
    *,
    vocab_sizes: Sequence[int] = VOCAB_SIZES,
    tokenizer: str | Path | None = None,
) -> tuple[Report, Recommendations]:
    """The report on a dataset's training documents, or the first `subset_size` of them. Raises InputError.

    >>> _ = Path("text.txt").write_text("to be or not to be, that is the question. " * 200)
    >>> report, recommended = analyze_dataset("text.txt", vocab_sizes=[270])
    >>> recommended.vocab_size, "recommended" in report.summary()
    (270, True)
    """
    if not vocab_sizes:
        raise InputError("No vocab_sizes were given to compare: give at least one.")
    for size in vocab_sizes:
        check_whole("vocab_sizes", size, SMALLEST_BPE)
    dataset = name if isinstance(name, DatasetConfig) else dataset_named(name, subset_size=subset_size)
    given = None if tokenizer is None else tokenizer_named(tokenizer)
    with training_text(dataset) as reading:
        if given is None:
            tokenizers: list[Tokenizer] = [*_of_several_sizes(reading, vocab_sizes)]
        else:
            tokenizers = [given]
        vocabularies = [_vocabulary(reading, one) for one in tokenizers]
        recommendations = _recommend(vocabularies, given is not None)
        report = Report(
            title=title_of(dataset),
            documents=len(reading.train),
            text_bytes=reading.train_bytes,
            tokenizer="bpe" if tokenizer is None else Path(tokenizer).name,
            vocabularies=vocabularies,
            recommendations=recommendations,
            notes=reading.notes,
        )
    return report, recommendations


def _of_several_sizes(reading: Reading, sizes: Sequence[int]) -> list[BpeTokenizer]:
    """A tokenizer of each size; the largest one that the text allows replaces the sizes that it is too small for."""
    largest = BpeTokenizer.train(reading.spool.sample(reading.train), max(sizes))
    reached = [size for size in sorted(set(sizes)) if size < largest.vocab_size]
    return [*(shortened(largest, size) for size in reached), largest]


def shortened(tokenizer: BpeTokenizer, vocab_size: int) -> BpeTokenizer:
    """The tokenizer that training would give with this smaller vocabulary: training is greedy, so it is a prefix."""
    content = json.loads(tokenizer.content)
    model = content["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < vocab_size}
    model["merges"] = model["merges"][: len(model["merges"]) - (tokenizer.vocab_size - vocab_size)]
    return BpeTokenizer(json.dumps(content))


def _vocabulary(reading: Reading, tokenizer: Tokenizer) -> Vocabulary:
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    lengths, length = [], 0
    for texts, closes in reading.spool.batches(reading.train):
        arrays = list(tokenizer.encode_many(texts))
        counts += np.bincount(np.concatenate(arrays), minlength=len(counts))
        for ids, last in zip(arrays, closes, strict=True):
            length += len(ids)
            if last:
                lengths.append(length + (tokenizer.end_token_id is not None))
                length = 0
    total = int(counts.sum())
    if total == 0:
        raise InputError("The text has no tokens: there is nothing to analyse.")
    texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    kinds = np.array([CLASSES.index(class_of(text)) for text in texts])
    occurring = counts > 0
    rare = occurring & (counts < RARE)
    learned = np.array([len(text.encode("utf-8")) > 1 and "\ufffd" not in text for text in texts])
    return Vocabulary(
        vocab_size=tokenizer.vocab_size,
        tokens=total,
        text_bytes=reading.train_bytes,
        counts=counts,
        ranked=np.sort(counts)[::-1],
        classes={
            name: (int((kinds == number).sum()), float(counts[kinds == number].sum() / total))
            for number, name in enumerate(CLASSES)
        },
        rare=(int(rare.sum()), float(counts[rare].sum() / total)),
        rare_learned=float((counts[learned] < RARE).mean()) if learned.any() else 0.0,
        most_frequent=[(texts[token], int(counts[token])) for token in np.argsort(-counts, kind="stable")[:TOP]],
        lengths=np.array(lengths, dtype=np.int64),
    )


def class_of(text: str) -> str:
    """The class of a token's text by its visible characters; `other` is mixed, part of a character, or empty."""
    visible = text.strip()
    if not visible:
        return "space" if text else "other"
    if "\ufffd" in visible:
        return "other"
    if all(character.isalpha() for character in visible):
        return "letters"
    if all(character.isnumeric() for character in visible):
        return "numbers"
    if not any(character.isalnum() for character in visible):
        return "punctuation"
    return "other"


# Recommendations


def _recommend(vocabularies: list[Vocabulary], given: bool) -> Recommendations:
    vocab_size, why_size = _given_size(vocabularies[0]) if given else _size(vocabularies)
    chosen = next((one for one in vocabularies if one.vocab_size == vocab_size), vocabularies[0])
    max_seq_len, why_length = _length(chosen.lengths)
    saved = (GPT2_VOCAB_SIZE - vocab_size) * D_MODEL
    return Recommendations(vocab_size, max_seq_len, saved, (why_size, why_length))


def _given_size(vocabulary: Vocabulary) -> tuple[int, str]:
    needed = vocabulary.covering(COVERAGES[-1])
    size = min(vocabulary.vocab_size, max(512, -(-needed // 64) * 64))
    return size, (
        f"{needed:,} of its {vocabulary.vocab_size:,} tokens cover {COVERAGES[-1]:.1%} of the text: a tokenizer "
        "learned from this text needs no more"
    )


def _size(vocabularies: list[Vocabulary]) -> tuple[int, str]:
    """The largest size that pays off: each larger one must save tokens, and few of its tokens may be rare."""
    chosen, why = vocabularies[0], "the text is too small to learn a larger one, or none was tried"
    for larger in vocabularies[1:]:
        saved = 1 - larger.tokens / chosen.tokens
        if larger.rare_learned > MOST_RARE:
            share = f"{larger.rare_learned:.0%} of the learned tokens"
            why = f"with {larger.vocab_size:,}, {share} occur less than {RARE} times"
            break
        if saved < LEAST_GAIN:
            why = f"{larger.vocab_size:,} would save only {saved:.1%} of the tokens"
            break
        chosen = larger
    return chosen.vocab_size, why


def _length(lengths: np.ndarray) -> tuple[int, str]:
    """The smallest power of two that is at least as long as 95 % of the documents."""
    wanted = float(np.quantile(lengths, 0.95))
    length = SHORTEST
    while length < min(wanted, LONGEST):
        length *= 2
    whole = float((lengths <= length).mean())
    longer = "; the longer ones are read in several windows" if whole < 0.95 else ""
    return length, f"{whole:.0%} of the documents fit into it{longer}"
