"""Sources and targets as token ids, tokenized once and cached: `prepare_pairs`.

As for a corpus (`corpus`), the cache has one folder for each pair of data and tokenizer. A split is two files of ids,
two of offsets, and one with the place of each pair in the data, for messages about pairs that are too long. The text of
all pairs is in memory while they are prepared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from ...common.digests import json_digest
from ...common.errors import InputError
from ...config.schema import DatasetConfig, TokenizerConfig
from ..sources.pairs import FilePairs, Pair, PairSource, open_test_pairs
from ..sources.reading import VALIDATION_SHARE, RowReading, first_rows
from .run_tokenizer import learned_tokenizer, tokenizer_identity, tokenizer_notes
from .token_cache import Contents, RowCache, prepare
from .token_shards import mapped
from .tokenizer import Tokenizer, load_tokenizer

FORMAT = 1  # increased whenever the same pairs and settings would give other files
SOURCE_PREFIX = "source_"  # of the files of a separate source tokenizer
BATCH = 2**14  # texts encoded at once
SIDES = ("source", "target")


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of sources and of targets; the same object if they share one."""

    source: Tokenizer
    target: Tokenizer

    @property
    def shared(self) -> bool:
        return self.source is self.target

    @property
    def digest(self) -> str:
        return self.target.digest if self.shared else json_digest([self.source.digest, self.target.digest])

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files that `save` writes."""
        own = () if self.shared else (f"{SOURCE_PREFIX}{name}" for name in self.source.files)
        return (*self.target.files, *own)

    def save(self, directory: Path) -> None:
        self.target.save(directory)
        if not self.shared:
            self.source.save(directory, SOURCE_PREFIX)

    @classmethod
    def load(cls, directory: Path, shared: bool) -> Tokenizers:
        target = load_tokenizer(directory)
        return cls(target if shared else load_tokenizer(directory, SOURCE_PREFIX), target)


@dataclass(frozen=True)
class PairSplit:
    """Token ids of pairs, memory-mapped and read-only."""

    source: np.ndarray  # (n,) uint32; the source of pair i is source[source_offsets[i] : source_offsets[i + 1]]
    source_offsets: np.ndarray  # (pairs + 1,) int64
    target: np.ndarray
    target_offsets: np.ndarray
    places: np.ndarray  # (pairs, 2) int64: index in `files`, and line number
    kinds: np.ndarray  # (pairs,) int64: indices in `kind_names`
    files: tuple[str, ...]  # "/data/a.tsv, line": the text before a line number
    kind_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.kinds)

    def where(self, number: int) -> str:
        file, line = self.places[number].tolist()
        return f"{self.files[file]} {line}" if line else self.files[file]


@dataclass(frozen=True)
class PairCorpus:
    tokenizers: Tokenizers
    splits: dict[str, PairSplit]  # train, validation, and test if the data has its own
    dataset_digest: str
    notes: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)


def open_pairs(dataset: DatasetConfig) -> PairSource:
    """The source of pairs that a config names. Raises InputError."""
    if dataset.name == "dates":
        from ..sources.dates import Dates

        return Dates(dataset.languages or ())
    if dataset.name == "postfix":
        from ..sources.postfix import Postfix

        return Postfix()
    return FilePairs(dataset)


def prepare_pairs(dataset: DatasetConfig, config: TokenizerConfig, shared: bool, cache: Path) -> PairCorpus:
    """The pairs of a config: from `cache` if they are there and intact, otherwise prepared and stored there. Raises
    InputError for data that cannot be used, and StorageError."""
    return _cached(dataset, config, shared).prepare(cache)


def preview_pairs(dataset: DatasetConfig, config: TokenizerConfig, shared: bool, cache: Path) -> PairCorpus:
    """The pairs of a config without writing to the cache: those that are not in it are prepared for this call only."""
    return _cached(dataset, config, shared).preview(cache)[0]


def open_test_split(dataset: DatasetConfig, corpus: PairCorpus, cache: Path) -> tuple[PairSplit, tuple[str, ...]]:
    """The test split and notes about it. Raises InputError if there is none."""
    if "test" in corpus.splits:
        return corpus.splits["test"], ()
    source = open_test_pairs(dataset)
    settings = {
        "format": FORMAT,
        "test": source.identity(),
        "on_bad_row": dataset.on_bad_row,
        "tokenizers": corpus.tokenizers.digest,
    }

    def make(folder: Path) -> Contents:
        reading = RowReading(dataset.on_bad_row == "skip")
        pairs = list(reading.read(source.rows()))
        source.check_unchanged()
        if not pairs:
            raise InputError(f"dataset.test={dataset.test}: there are no pairs in it.")
        contents = _written(folder, {"test": pairs}, corpus.tokenizers)
        return contents | {"notes": [*source.notes, *reading.notes], "counts": reading.counts}

    def read(folder: Path, contents: Contents) -> tuple[PairSplit, tuple[str, ...]]:
        return _open_split(folder, contents, "test"), tuple(contents["notes"])

    return prepare(cache / f"pairs-test-{json_digest(settings)[:16]}", settings, make, read)


def _cached(dataset: DatasetConfig, config: TokenizerConfig, shared: bool) -> RowCache[PairCorpus]:
    source = open_pairs(dataset)
    tokenizers = [tokenizer_identity(one) for one in _configs(config, shared)]
    share = dataset.validation if isinstance(dataset.validation, float) else None
    selected = {"source": source.identity(), "subset_size": dataset.subset_size, "validation": share}
    settings = {"format": FORMAT, "dataset": selected, "tokenizers": tokenizers}
    return RowCache(
        dataset,
        config,
        settings,
        make=lambda folder: _make(folder, source, dataset, config, shared),
        read=lambda folder, contents: _read(folder, contents, shared),
    )


def _configs(config: TokenizerConfig, shared: bool) -> list[TokenizerConfig]:
    """The configs of the source's and the target's tokenizer; if they share one, only that."""
    own = replace(config, source_path=None)
    return [own] if shared else [replace(own, path=config.source_path or config.path), own]


# Reading


def _make(folder: Path, source: PairSource, dataset: DatasetConfig, config: TokenizerConfig, shared: bool) -> Contents:
    reading = RowReading(dataset.on_bad_row == "skip")
    pairs = _split(reading, source, dataset)
    source.check_unchanged()
    if not pairs["train"] or not pairs["validation"]:
        side = "training" if not pairs["train"] else "validation"
        place = dataset.path or dataset.name
        raise InputError(
            f"There are no pairs for {side} in {place} (rows read: {reading.counts['rows']}, of these bad: "
            f"{reading.counts['bad_rows']}). Give more pairs, or another dataset.validation."
        )
    tokenizers = _tokenizers(config, shared, pairs)
    tokenizers.save(folder)
    lost = [
        f"of the {side}s, {note}"
        for side in SIDES
        for note in tokenizer_notes(getattr(tokenizers, side), (getattr(one, side) for one in pairs["train"]))
        if "no end token" not in note  # the translation task adds end tokens itself
    ]
    contents = _written(folder, pairs, tokenizers)
    return contents | {"notes": [*reading.notes, *source.notes, *lost], "counts": reading.counts}


def _split(reading: RowReading, source: PairSource, dataset: DatasetConfig) -> dict[str, list[Pair]]:
    found = reading.read(first_rows(source.rows(), dataset.subset_size))
    if (validation := source.validation_rows()) is not None:
        return {"train": list(found), "validation": list(reading.read(validation))}
    share = dataset.validation if isinstance(dataset.validation, float) else None
    share = share or source.test_share or VALIDATION_SHARE
    names = ("train", "validation", "test") if source.test_share else ("train", "validation")
    splits: dict[str, list[Pair]] = {name: [] for name in names}
    for pair in found:
        place = int.from_bytes(hashlib.sha256(pair.unit.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
        if place < source.test_share:
            splits["test"].append(pair)
        else:
            splits["validation" if place < source.test_share + share else "train"].append(pair)
    return splits


# Tokens


def _tokenizers(config: TokenizerConfig, shared: bool, pairs: dict[str, list[Pair]]) -> Tokenizers:
    """The tokenizers. BPE learns from the training split; a character tokenizer has the characters of all splits."""
    sides = [SIDES] if shared else [(side,) for side in SIDES]
    made = [_tokenizer(own, pairs, side) for own, side in zip(_configs(config, shared), sides, strict=True)]
    return Tokenizers(made[0], made[-1])


def _tokenizer(config: TokenizerConfig, pairs: dict[str, list[Pair]], sides: Sequence[str]) -> Tokenizer:
    training = [getattr(one, side) for one in pairs["train"] for side in sides]
    everything = (getattr(one, side) for split in pairs.values() for one in split for side in sides)
    return learned_tokenizer(config, training, everything)


def _written(folder: Path, pairs: dict[str, list[Pair]], tokenizers: Tokenizers) -> Contents:
    """Write the files of the splits and return their part of the manifest."""
    sizes, files, kinds = {}, {}, {}  # type: ignore[var-annotated]
    for name, split in pairs.items():
        tokens = {
            side: _write_side(folder / f"{name}.{side}", split, side, getattr(tokenizers, side)) for side in SIDES
        }
        places = np.empty((len(split), 3), dtype=np.int64)
        for row, pair in enumerate(split):
            file, _, line = pair.where.rpartition(" ")
            if not line.isdecimal():
                file, line = pair.where, "0"
            places[row] = files.setdefault(file, len(files)), int(line), kinds.setdefault(pair.kind, len(kinds))
        places.tofile(folder / f"{name}.places.bin")
        sizes[name] = {"pairs": len(split), "tokens": sum(tokens.values()), **tokens}
    return {"splits": sizes, "files": list(files), "kinds": list(kinds)}


def _write_side(path: Path, split: Sequence[Pair], side: str, tokenizer: Tokenizer) -> int:
    offsets, rows = [0], iter(split)
    with path.with_name(f"{path.name}.bin").open("wb") as file:
        while batch := list(islice(rows, BATCH)):
            for ids in _encoded(tokenizer, batch, side):
                file.write(ids.astype(np.uint32).tobytes())
                offsets.append(offsets[-1] + len(ids))
    np.array(offsets, dtype=np.int64).tofile(path.with_name(f"{path.name}.offsets.bin"))
    return offsets[-1]


def _encoded(tokenizer: Tokenizer, batch: list[Pair], side: str) -> Iterator[np.ndarray]:
    """The token ids of one side of a batch. Raises InputError with the place of a text that cannot be encoded."""
    try:
        yield from list(tokenizer.encode_many([getattr(pair, side) for pair in batch]))
    except InputError:
        for pair in batch:
            try:
                tokenizer.encode(getattr(pair, side))
            except InputError as error:
                raise InputError(f"{pair.where}: {error}") from error
        raise


def _read(folder: Path, contents: Contents, shared: bool) -> PairCorpus:
    splits = {name: _open_split(folder, contents, name) for name in contents["splits"]}
    digest = json_digest(contents["settings"]["dataset"])
    return PairCorpus(Tokenizers.load(folder, shared), splits, digest, tuple(contents["notes"]), contents["counts"])


def _open_split(folder: Path, contents: Contents, name: str) -> PairSplit:
    sizes = contents["splits"][name]
    pairs = sizes["pairs"]
    sides: dict[str, np.ndarray] = {}
    for side in SIDES:
        sides[side] = mapped(folder / f"{name}.{side}.bin", np.uint32, sizes[side])
        sides[f"{side}_offsets"] = mapped(folder / f"{name}.{side}.offsets.bin", np.int64, pairs + 1)
    places = mapped(folder / f"{name}.places.bin", np.int64, pairs, 3)
    return PairSplit(
        **sides,
        places=places[:, :2],
        kinds=places[:, 2],
        files=tuple(contents["files"]),
        kind_names=tuple(contents["kinds"]),
    )
