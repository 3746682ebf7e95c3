"""A corpus: a text as token ids, tokenized once and cached. See `prepare_corpus`.

The cache has one folder for each pair of data and tokenizer, named after the SHA-256 of everything that its content
depends on (`token_cache`). A source is read once into a file (`reading`), which is tokenized in pieces of some
megabytes: a whole text is never in memory. Tokens that `pretokenize_dataset` wrote are read from their own folder,
without the cache. `order` makes batches.
"""

from __future__ import annotations

import json
import logging
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...common.digests import json_digest
from ...common.errors import InputError
from ...common.uris import expanded
from ...config.schema import DatasetConfig, TokenizerConfig
from ..sources.documents import Source
from ..sources.hub import HubUnavailable, unpinned
from ..sources.reading import read_documents, selection
from ..sources.registry import open_source
from ..sources.spool import Spool
from .run_tokenizer import complete_tokenizer, make_tokenizer, tokenizer_identity, tokenizer_notes, warn_of_small_text
from .token_cache import MANIFEST, Contents, Split, cache_folder, find_prepared, open_split, prepare, write_split
from .token_shards import PRETOKENIZED, Tokens, load_pretokenized, manifest_of
from .tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

LARGE = 10_000_000  # [bytes] of text; tokenizing more takes seconds
FORMAT = 2  # increased whenever the same text and settings would give other files


@dataclass(frozen=True)
class Corpus:
    """Token ids of a training and a validation split, memory-mapped and read-only, and their origin."""

    tokenizer: Tokenizer
    train: Tokens  # (n,) uint16 or uint32; the end token, if there is one, follows each document
    validation: Tokens  # (n,)
    train_offsets: np.ndarray  # (documents + 1,) int64: document i is train[offsets[i] : offsets[i + 1]]
    validation_offsets: np.ndarray
    dataset_digest: str  # SHA-256 of everything that determines the documents of both splits, without the tokenizer
    tokenizer_digest: str  # SHA-256 of tokenizer.json, and of tokenizer_config.json if that adds something
    train_bytes: int  # of the text in UTF-8, without end tokens
    validation_bytes: int
    notes: tuple[str, ...] = ()  # for the run's log: what was unusual about the data
    counts: dict[str, int] = field(default_factory=dict)  # of rows, bad_rows and empty_documents

    @classmethod
    def of(cls, tokenizer: Tokenizer, splits: dict[str, Split], dataset_digest: str, contents: Contents) -> Corpus:
        """The corpus with these splits; `contents` is that of the manifest, with the notes and counts."""
        train, validation = splits["train"], splits["validation"]
        return cls(
            tokenizer=tokenizer,
            train=train.tokens,
            validation=validation.tokens,
            train_offsets=train.offsets,
            validation_offsets=validation.offsets,
            dataset_digest=dataset_digest,
            tokenizer_digest=tokenizer.digest,
            train_bytes=train.text_bytes,
            validation_bytes=validation.text_bytes,
            notes=tuple(contents["notes"]),
            counts=contents["counts"],
        )

    def split(self, name: str) -> Split:
        """The split called `name`, which is train or validation."""
        return Split(getattr(self, name), getattr(self, f"{name}_offsets"), getattr(self, f"{name}_bytes"))

    @property
    def train_documents(self) -> int:
        return len(self.train_offsets) - 1

    @property
    def validation_documents(self) -> int:
        return len(self.validation_offsets) - 1


def prepare_corpus(dataset: DatasetConfig, tokenizer: TokenizerConfig, cache: str | Path) -> Corpus:
    """The corpus of a config: from `cache` if it is there and intact, otherwise prepared and stored there.

    Several processes may ask for the same corpus at once: one prepares it, the others wait. Raises InputError for data
    that cannot be used, and StorageError.
    """
    if dataset.name == PRETOKENIZED:
        return _corpus_of_shards(dataset, tokenizer)
    source = open_source(dataset)
    try:
        settings = _settings(dataset, tokenizer, source)
    except HubUnavailable:
        corpus = _prepared_earlier(dataset, tokenizer, Path(cache))
        if corpus is None:
            raise
        return _checked(corpus, dataset, tokenizer)

    folder = cache_folder(cache, dataset, tokenizer, settings)
    corpus = prepare(folder, settings, lambda staged: _make(staged, source, dataset, tokenizer), _read)
    return _checked(_with_revision_note(corpus, dataset, settings), dataset, tokenizer)


def prepared_corpus(dataset: DatasetConfig, tokenizer: TokenizerConfig, cache: str | Path) -> Corpus | None:
    """The corpus of a config if it is in the cache, else None. Writes nothing."""
    if dataset.name == PRETOKENIZED:
        return _corpus_of_shards(dataset, tokenizer)
    try:
        settings = _settings(dataset, tokenizer, open_source(dataset))
    except HubUnavailable:
        return _prepared_earlier(dataset, tokenizer, Path(cache))
    return find_prepared(cache_folder(cache, dataset, tokenizer, settings), settings, _read)


def _settings(dataset: DatasetConfig, tokenizer: TokenizerConfig, source: Source | None) -> dict[str, Any]:
    """Everything that determines the files of a corpus: the key of the cache."""
    return {"format": FORMAT, "dataset": selection(dataset, source), "tokenizer": tokenizer_identity(tokenizer)}


def _make(folder: Path, source: Source, dataset: DatasetConfig, config: TokenizerConfig) -> Contents:
    """Writes the files of a corpus; returns the contents of its manifest."""
    with closing(Spool(folder / "text", skip_bad_rows=dataset.on_bad_row == "skip")) as spool:
        parts = read_documents(spool, source, dataset)
        if (size := spool.path.stat().st_size) > LARGE:
            log.warning("tokenizing %.0f MB of text, once: later runs reuse the tokens", size / 1e6)
        whole = np.concatenate([parts["train"], parts["validation"]])
        tokenizer = make_tokenizer(config, spool.sample(parts["train"]), spool.texts(whole))
        lost = tokenizer_notes(tokenizer, spool.texts(whole))
        sizes = {name: write_split(folder, name, tokenizer, spool, part) for name, part in parts.items()}
    spool.path.unlink()
    tokenizer.save(folder)
    return {
        "dtype": np.dtype(tokenizer.dtype).name,
        "splits": sizes,
        "notes": [*source.notes, *spool.notes(), *lost],
        "counts": spool.counts,
    }


def _read(folder: Path, contents: Contents) -> Corpus:
    splits = {name: open_split(folder, contents, name) for name in contents["splits"]}
    return Corpus.of(load_tokenizer(folder), splits, json_digest(contents["settings"]["dataset"]), contents)


def _with_revision_note(corpus: Corpus, dataset: DatasetConfig, settings: dict[str, Any]) -> Corpus:
    """The corpus with a note on this config's revision, since a config with another revision may have prepared it."""
    if dataset.repository is None:
        return corpus
    return replace(corpus, notes=(*corpus.notes, *unpinned(dataset, settings["dataset"]["source"]["revision"])))


def _checked(corpus: Corpus, dataset: DatasetConfig, tokenizer: TokenizerConfig) -> Corpus:
    """The corpus. Raises InputError if bad rows were left out when it was prepared, but this config forbids it."""
    bad = corpus.counts.get("bad_rows", 0)
    if bad and dataset.on_bad_row != "skip":
        first = next(note for note in corpus.notes if "bad row" in note)
        raise InputError(f"{first}. Correct them, or leave them out with dataset.on_bad_row=skip, which counts them.")
    warn_of_small_text(tokenizer, corpus.tokenizer)
    return corpus


def _prepared_earlier(dataset: DatasetConfig, tokenizer: TokenizerConfig, cache: Path) -> Corpus | None:
    """The corpus that was prepared last for any revision of this dataset, for use without the hub; a warning names the
    revision. None if there is none."""
    requested = dataset.repository, dataset.config, dataset.split or "train", dataset.text_column or "text"
    found = sorted(cache.glob(f"{dataset.name}-*/{MANIFEST}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        try:
            there = json.loads(path.read_text(encoding="utf-8"))["contents"]["settings"]
            source = there["dataset"]["source"]
            without = {**there, "dataset": {**there["dataset"], "source": None}}
            if tuple(source.get(key) for key in ("repository", "config", "split", "column")) != requested:
                continue
            same = without == _settings(dataset, tokenizer, None)
            if same and (corpus := find_prepared(path.parent, there, _read)) is not None:
                log.warning(
                    "The hub cannot be reached: using revision %s, which was prepared before.", source["revision"]
                )
                return _with_revision_note(corpus, dataset, there)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


# Tokens from `pretokenize_dataset`


def _corpus_of_shards(dataset: DatasetConfig, config: TokenizerConfig) -> Corpus:
    """The corpus that `pretokenize_dataset` wrote, with its own tokenizer. Raises InputError for another one."""
    if dataset.path is None:
        raise InputError(
            f"dataset={PRETOKENIZED} needs a path: give the folder that `tools.tokenization pretokenize` wrote as "
            "dataset.path=PATH."
        )
    folder = expanded(dataset.path)
    contents = manifest_of(folder)
    shards = {name: load_pretokenized(folder, name) for name in ("train", "validation")}
    tokenizer = shards["train"].tokenizer
    if config.name != PRETOKENIZED:
        given = complete_tokenizer(config)
        if given is None or given.digest != tokenizer.digest:
            raise InputError(
                f"tokenizer={config.name}: the tokens in {folder} are from another tokenizer; use "
                f"tokenizer={PRETOKENIZED}, the one that made them."
            )
    sizes, longest = contents["splits"], contents["settings"]["max_length"]
    selected, notes = contents["settings"]["dataset"], list(contents["notes"])
    if longest is not None:  # the documents are cut, so they are not those of the text
        selected = {**selected, "max_length": longest}
        cut, documents = (sum(split[key] for split in sizes.values()) for key in ("cut", "documents"))
        notes.append(f"{cut} of {documents} documents have more than {longest} tokens and were cut there")
    splits = {name: Split(tokens.plain(), tokens.offsets, sizes[name]["bytes"]) for name, tokens in shards.items()}
    return Corpus.of(tokenizer, splits, json_digest(selected), {**contents, "notes": notes})
