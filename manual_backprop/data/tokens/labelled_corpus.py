"""Labelled texts as token ids, tokenized once and cached: `prepare_labelled`.

As for a corpus (`corpus`), the cache has one folder for each pair of data and tokenizer: for each split a file of ids,
one of offsets and one of labels. All texts are in memory while they are prepared.

If the data has no splits of its own, a hash of the text decides: equal texts are in the same split, and the same share
of each label is held out, but never all of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...common.digests import json_digest
from ...common.errors import InputError
from ...config.schema import DatasetConfig, TokenizerConfig
from ..sources.labelled import Labelled, LabelledSource, open_labelled, open_test_rows
from ..sources.reading import VALIDATION_SHARE, RowReading, first_rows
from .run_tokenizer import learned_tokenizer, tokenizer_identity, tokenizer_notes
from .token_cache import Contents, RowCache
from .token_shards import mapped
from .tokenizer import Tokenizer, load_tokenizer

FORMAT = 1  # increased whenever the same rows and settings would give other files
MOST_LABELS = 10_000
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class LabelledSplit:
    """Token ids and labels of texts, read-only; memory-mapped if they are from the cache."""

    tokens: np.ndarray  # (n,) of the tokenizer's dtype; text i is tokens[offsets[i] : offsets[i + 1]]
    offsets: np.ndarray  # (texts + 1,) int64
    labels: np.ndarray  # (texts,) int64: indices into the corpus's `labels`

    def __len__(self) -> int:
        return len(self.labels)

    def ids(self, number: int) -> np.ndarray:
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]


@dataclass(frozen=True)
class LabelledCorpus:
    """The splits of labelled texts, with their tokenizer and labels."""

    tokenizer: Tokenizer
    labels: tuple[str, ...]  # those of the training texts, sorted
    splits: dict[str, LabelledSplit]  # train, validation, and test if a share of the data is set aside for it
    dataset_digest: str
    notes: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)


def prepare_labelled(dataset: DatasetConfig, config: TokenizerConfig, cache: Path) -> LabelledCorpus:
    """The labelled texts of a config: from `cache` if they are there and intact, otherwise prepared and stored there.
    Raises InputError for data that cannot be used, and StorageError."""
    return _cached(dataset, config).prepare(cache)


def preview_labelled(
    dataset: DatasetConfig, config: TokenizerConfig, cache: Path
) -> tuple[LabelledCorpus | None, bool]:
    """The labelled texts of a config without writing to the cache, and whether they were in it. Texts that were not are
    prepared for this call only; None for texts that are still on the hub."""
    cached = _cached(dataset, config)
    if dataset.format == "hub":
        found = cached.find(cache)
        return found, found is not None
    return cached.preview(cache)


def open_test_split(dataset: DatasetConfig, corpus: LabelledCorpus) -> tuple[LabelledSplit, tuple[str, ...]]:
    """The test split and notes about it. Raises InputError if there is none, or if it has a label that the corpus does
    not have."""
    if "test" in corpus.splits and dataset.test is None:
        return corpus.splits["test"], ()
    source = open_test_rows(dataset)
    reading = RowReading(dataset.on_bad_row == "skip")
    rows = list(reading.read(source.rows()))
    source.check_unchanged()
    if not rows:
        raise InputError(f"dataset.test={dataset.test}: there are no texts in it.")
    for row in rows:
        try:
            corpus.tokenizer.encode(row.text)
        except InputError as error:  # a character that the tokenizer cannot encode
            raise InputError(f"{row.where}: {error}") from error
    tokens, offsets = _encoded(corpus.tokenizer, [row.text for row in rows])
    return LabelledSplit(tokens, offsets, _numbers(rows, corpus.labels, "test")), (*source.notes, *reading.notes)


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """The token ids of each text as in training: with the begin and end tokens, if the tokenizer has them."""
    end = [] if tokenizer.end_token_id is None else [tokenizer.end_token_id]
    return [np.array([*tokenizer.begin_token_ids, *ids, *end]) for ids in tokenizer.encode_many(list(texts))]


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    rows = encoded(tokenizer, texts)
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in rows])]).astype(np.int64)
    return np.concatenate(rows).astype(tokenizer.dtype), offsets


def _cached(dataset: DatasetConfig, config: TokenizerConfig) -> RowCache[LabelledCorpus]:
    source = open_labelled(dataset)
    share = dataset.validation if isinstance(dataset.validation, float) else None
    selected = {"source": source.identity(), "subset_size": dataset.subset_size, "validation": share}
    selected |= {"test_share": dataset.test_share}
    settings = {"format": FORMAT, "dataset": selected, "tokenizer": tokenizer_identity(config)}
    return RowCache(dataset, config, settings, lambda folder: _make(folder, source, dataset, config), _read)


def _make(folder: Path, source: LabelledSource, dataset: DatasetConfig, config: TokenizerConfig) -> Contents:
    reading = RowReading(dataset.on_bad_row == "skip")
    rows = _split(reading, source, dataset)
    source.check_unchanged()
    place = dataset.path or dataset.name
    labels = _labels(rows["train"], place, dataset) if rows["train"] else []
    if not rows["train"] or not rows["validation"]:
        raise InputError(
            f"There are no texts for {'validation' if rows['train'] else 'training'} in {place} (rows read: "
            f"{reading.counts['rows']}, of these bad: {reading.counts['bad_rows']}). Give more texts, or another "
            "dataset.validation."
        )
    texts = {name: [row.text for row in split] for name, split in rows.items()}
    tokenizer = learned_tokenizer(config, texts["train"], [text for split in texts.values() for text in split])
    tokenizer.save(folder)
    sizes = {}
    for name, split in rows.items():
        tokens, offsets = _encoded(tokenizer, texts[name])
        tokens.tofile(folder / f"{name}.bin")
        offsets.tofile(folder / f"{name}.offsets.bin")
        _numbers(split, labels, name).tofile(folder / f"{name}.labels.bin")
        sizes[name] = {"texts": len(split), "tokens": len(tokens)}
    lost = [note for note in tokenizer_notes(tokenizer, texts["train"]) if "no end token" not in note]
    notes = [*reading.notes, *source.notes, *lost]
    dtype = np.dtype(tokenizer.dtype).name
    return {"dtype": dtype, "splits": sizes, "labels": labels, "notes": notes, "counts": reading.counts}


def _read(folder: Path, contents: Contents) -> LabelledCorpus:
    splits = {
        name: LabelledSplit(
            mapped(folder / f"{name}.bin", contents["dtype"], sizes["tokens"]),
            mapped(folder / f"{name}.offsets.bin", np.int64, sizes["texts"] + 1),
            mapped(folder / f"{name}.labels.bin", np.int64, sizes["texts"]),
        )
        for name, sizes in contents["splits"].items()
    }
    digest = json_digest(contents["settings"]["dataset"])
    notes, labels = tuple(contents["notes"]), tuple(contents["labels"])
    return LabelledCorpus(load_tokenizer(folder), labels, splits, digest, notes, contents["counts"])


# Rows


def _split(reading: RowReading, source: LabelledSource, dataset: DatasetConfig) -> dict[str, list[Labelled]]:
    rows = list(reading.read(first_rows(source.rows(), dataset.subset_size)))
    validation = source.validation_rows()
    shares = {"test": dataset.test_share or 0.0}
    if validation is None:
        shares["validation"] = dataset.validation if isinstance(dataset.validation, float) else VALIDATION_SHARE
    if sum(shares.values()) >= 1:
        raise InputError(
            f"dataset.test_share={dataset.test_share}: with a share of {shares['validation']:g} for validation nothing "
            "is left to train on; together they must be less than 1."
        )
    held_out = _held_out(rows, shares)
    splits: dict[str, list[Labelled]] = {name: [] for name in SPLITS if name != "test" or dataset.test_share}
    for row in rows:
        splits[held_out.get(row.text, "train")].append(row)
    if validation is not None:
        splits["validation"] = list(reading.read(validation))
    return splits


def _held_out(rows: Sequence[Labelled], shares: dict[str, float]) -> dict[str, str]:
    """Text -> split, for the texts that are not in the training split: of each label's texts, sorted by a hash, the
    first `shares`. Their number is rounded down, but is at least one if a label has three texts. A text with several
    labels counts for the first."""
    texts: dict[str, Labelled] = {}
    for row in rows:
        texts.setdefault(row.text, row)
    of_label: dict[str, list[Labelled]] = defaultdict(list)
    for row in sorted(texts.values(), key=lambda row: row.place):
        of_label[row.label].append(row)
    found: dict[str, str] = {}
    for some in of_label.values():
        first = 0
        for split, share in shares.items():
            count = min(max(int(len(some) * share), share > 0 and len(some) > 2), len(some) - 1 - first)
            found |= {row.text: split for row in some[first : first + count]}
            first += count
    return found


def _labels(rows: Sequence[Labelled], place: str, dataset: DatasetConfig) -> list[str]:
    """The labels of the training rows, sorted. Raises InputError if there is only one, or if they look like texts."""
    labels = sorted({row.label for row in rows})
    column = dataset.label_column or "label"
    if len(labels) == 1:
        raise InputError(
            f"{place}: all {len(rows):,} training rows have the label {labels[0]!r}, but a classifier needs at least "
            f"two. Give rows of other labels, or name another column: dataset.label_column=NAME (it is {column!r})."
        )
    if len(labels) > MOST_LABELS or (len(labels) == len(rows) and len(rows) > 2):
        raise InputError(
            f"{place}: the column {column!r} has {len(labels):,} different labels in {len(rows):,} training rows; is "
            "it the text? Name the column of the labels: dataset.label_column=NAME."
        )
    return labels


def _numbers(rows: Sequence[Labelled], labels: Sequence[str], split: str) -> np.ndarray:
    """The index of each row's label in `labels`. Raises InputError for a label that no training row has."""
    places = {label: number for number, label in enumerate(labels)}
    for row in rows:
        if row.label not in places:
            known = ", ".join(map(repr, labels[:10])) + (f" and {len(labels) - 10} more" if len(labels) > 10 else "")
            raise InputError(
                f"{row.where}: the label {row.label!r} is only in the {split} split; training rows have {known}. No "
                "model can learn it: correct it, add training rows with it, or remove the row."
            )
    return np.array([places[row.label] for row in rows], dtype=np.int64)
