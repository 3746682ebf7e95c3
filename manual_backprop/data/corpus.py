"""A text as token ids on disk, prepared once: `prepare_corpus`.

The cache holds one folder for each pair of data and tokenizer, named after the SHA-256 of everything that its content
depends on. It appears by one rename when it is complete, and is checked against the digests in its manifest each time
it is opened; so a reader finds a sound corpus or none. Nothing here holds a whole text in memory: a source is read once
into a file (`spool`), and tokens are made of that, some megabytes at a time. Batches are made in `order`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DatasetConfig, TokenizerConfig
from ..durable import sync_directory, sync_file
from ..errors import InputError, StorageError
from .documents import Source, open_source
from .hub import HubUnavailable, is_commit
from .spool import Spool, SpooledText
from .tokenizers import END_TOKENS, BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

FORMAT = 2  # raised whenever the same text and settings would make other files
MANIFEST = "manifest.json"
VALIDATION_SHARE = 0.1  # of a source without a validation split
BPE_SAMPLE = 32 * 2**20  # [bytes] of training text, evenly spread, that BPE learns from; less text is read whole
BATCH = 2**21  # [characters] of text that are encoded at once


@dataclass(frozen=True)
class Corpus:
    """Token ids of a training and a validation split, memory-mapped and read-only, and where they come from."""

    tokenizer: Tokenizer
    train: np.ndarray  # (n,) uint16 or uint32; each document is followed by the end token where there is one
    validation: np.ndarray  # (n,)
    train_offsets: np.ndarray  # (documents + 1,) int64: document i is train[offsets[i] : offsets[i + 1]]
    validation_offsets: np.ndarray
    dataset_digest: str  # SHA-256 of what the documents of both splits depend on, whatever the tokenizer
    tokenizer_digest: str  # SHA-256 of tokenizer.json
    train_bytes: int  # of the text in UTF-8, without end tokens
    validation_bytes: int
    notes: tuple[str, ...] = ()  # what whoever reads a run's results must know
    counts: dict[str, int] = field(default_factory=dict)  # of rows, bad_rows and empty_documents

    @property
    def train_documents(self) -> int:
        return len(self.train_offsets) - 1

    @property
    def validation_documents(self) -> int:
        return len(self.validation_offsets) - 1


def prepare_corpus(dataset: DatasetConfig, tokenizer: TokenizerConfig, cache: str | Path) -> Corpus:
    """The corpus that a config means: out of `cache` where it is there and sound, else made and put there.

    Any number of processes may ask for the same one at once: one makes it, the others wait for it. Raises InputError
    for data that cannot be used and StorageError where the cache cannot be written.
    """
    source = open_source(dataset)
    try:
        settings = _settings(dataset, tokenizer, source)
    except HubUnavailable:
        corpus = _prepared_earlier(dataset, tokenizer, Path(cache))
        if corpus is None:
            raise
        return _checked(corpus, dataset, tokenizer)
    folder = _folder(dataset, tokenizer, Path(cache), settings)
    corpus = _open(folder, settings)  # without the lock: a sound corpus can be read where nothing can be written
    if corpus is None:
        corpus = _prepare(folder, source, dataset, tokenizer, settings)
    return _checked(corpus, dataset, tokenizer)


def prepared_corpus(dataset: DatasetConfig, tokenizer: TokenizerConfig, cache: str | Path) -> Corpus | None:
    """The corpus that a config means, where it was prepared before. Writes nothing."""
    try:
        settings = _settings(dataset, tokenizer, open_source(dataset))
    except HubUnavailable:
        return _prepared_earlier(dataset, tokenizer, Path(cache))
    return _open(_folder(dataset, tokenizer, Path(cache), settings), settings)


def _selection(dataset: DatasetConfig, source: Source | None) -> dict[str, Any]:
    """What the documents of both splits depend on."""
    identity = None if source is None else source.identity()
    return {"source": identity, "subset_size": dataset.subset_size, "validation": dataset.validation}


def _settings(dataset: DatasetConfig, tokenizer: TokenizerConfig, source: Source | None) -> dict[str, Any]:
    """What the files of a corpus depend on."""
    return {
        "format": FORMAT,
        "dataset": _selection(dataset, source),
        "tokenizer": _tokenizer_identity(tokenizer, _ready_tokenizer(tokenizer)),
    }


def _folder(dataset: DatasetConfig, tokenizer: TokenizerConfig, cache: Path, settings: dict[str, Any]) -> Path:
    return cache / f"{dataset.name}-{tokenizer.name}-{_json_digest(settings)[:16]}"


def _checked(corpus: Corpus, dataset: DatasetConfig, tokenizer: TokenizerConfig) -> Corpus:
    """The corpus, unless it was made by leaving out rows that this config wants to hear of."""
    bad = corpus.counts.get("bad_rows", 0)
    if bad and dataset.on_bad_row != "skip":
        first = next(note for note in corpus.notes if "bad row" in note)
        raise InputError(f"{first}. Mend them, or leave them out with dataset.on_bad_row=skip, which counts them.")
    if tokenizer.name == BpeTokenizer.name and corpus.tokenizer.vocab_size < (tokenizer.vocab_size or 0):
        log.warning(
            "The text is too small to learn tokenizer.vocab_size=%d tokens: the tokenizer has %d.",
            tokenizer.vocab_size,
            corpus.tokenizer.vocab_size,
        )
    return corpus


def _prepared_earlier(dataset: DatasetConfig, tokenizer: TokenizerConfig, cache: Path) -> Corpus | None:
    """Without the hub nobody knows the newest revision: the one that was prepared last is taken, and named."""
    asked = dataset.repository, dataset.config, dataset.split or "train", dataset.text_column or "text"
    found = sorted(cache.glob(f"{dataset.name}-*/{MANIFEST}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        try:
            there = json.loads(path.read_text(encoding="utf-8"))["contents"]["settings"]
            source = there["dataset"]["source"]
            without = {**there, "dataset": {**there["dataset"], "source": None}}
            if tuple(source.get(key) for key in ("repository", "config", "split", "column")) != asked:
                continue
            if without == _settings(dataset, tokenizer, None) and (corpus := _open(path.parent, there)) is not None:
                log.warning(
                    "The hub cannot be reached: going on with revision %s, prepared before.", source["revision"]
                )
                return corpus
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


# Making one


def _prepare(
    folder: Path, source: Source, dataset: DatasetConfig, tokenizer: TokenizerConfig, settings: dict[str, Any]
) -> Corpus:
    """Waits until no other process makes this corpus, then makes it if none has."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            corpus = _open(folder, settings)
            if corpus is None:
                if folder.exists():
                    log.warning("%s is damaged and will be made again", folder)
                _build(folder, source, dataset, tokenizer, settings)
                corpus = _open(folder, settings)
    except OSError as error:
        raise StorageError(
            f"The prepared text cannot be kept in {folder.parent} ({error.strerror or error}): make room or make "
            "the folder writable."
        ) from error
    if corpus is None:
        raise StorageError(f"{folder} was written and then read back differently: the disk or file system is at fault.")
    return corpus


def _build(
    folder: Path, source: Source, dataset: DatasetConfig, config: TokenizerConfig, settings: dict[str, Any]
) -> None:
    """Makes a corpus in a folder beside its place and moves it there. The caller holds the lock."""
    begin = time.monotonic()
    for abandoned in folder.parent.glob(f"{folder.name}.partial-*"):  # its maker was killed: the lock is ours
        shutil.rmtree(abandoned)
    staged = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    staged.mkdir()
    try:
        spool = Spool(staged / "text", skip_bad_rows=dataset.on_bad_row == "skip")
        try:
            parts = _read(spool, source, dataset)
            tokenizer = _make_tokenizer(config, spool, parts)
            lost = _what_is_lost(tokenizer, next(_texts(spool, parts["train"])))
            sizes = {name: _write_split(staged, name, tokenizer, spool, part) for name, part in parts.items()}
        finally:
            spool.close()
        spool.path.unlink()
        tokenizer.save(staged)
        digests = {path.name: _digest(path) for path in sorted(staged.iterdir())}
        contents = {
            "settings": settings,
            "dtype": np.dtype(tokenizer.dtype).name,
            "splits": sizes,
            "notes": [*source.notes, *_notes(spool), *lost],
            "counts": spool.counts,
            "sha256": digests,
        }
        manifest = {"contents": contents, "sha256": _json_digest(contents)}
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in staged.iterdir():
            sync_file(path)
        sync_directory(staged)
        if folder.exists():  # damaged, or the caller would have used it
            shutil.rmtree(folder)
        staged.rename(folder)
        sync_directory(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    log.info(
        "prepared %d training and %d validation tokens in %.1f s: %s",
        sizes["train"]["tokens"],
        sizes["validation"]["tokens"],
        time.monotonic() - begin,
        folder,
    )


def _read(spool: Spool, source: Source, dataset: DatasetConfig) -> dict[str, np.ndarray]:
    """All documents into the spool; the parts of it that train and that validate."""
    validation = source.validation_documents()
    rows: Iterable[Any] = source.documents()
    if dataset.subset_size is not None:
        rows = _first(rows, dataset.subset_size)
    spool.read(rows)
    training = len(spool)
    if validation is not None:
        spool.read(validation)
    source.check_unchanged()
    if training == 0 or (validation is not None and training == len(spool)):
        read = f"{spool.counts['rows']} rows or files were read, {spool.counts['empty_documents']} of them empty"
        side = "validation" if training else "training"
        raise InputError(f"There is no text to be had for {side} from {_place_of(dataset)}: {read}.")
    if validation is not None:
        return {"train": spool.parts(0, training), "validation": spool.parts(training)}
    share = dataset.validation if isinstance(dataset.validation, float) else VALIDATION_SHARE
    training_parts, validation_parts = spool.split(share)
    return {"train": training_parts, "validation": validation_parts}


def _first(rows: Iterable[Any], count: int) -> Iterator[Any]:
    """Not one more than `count` is asked for: a stream would fetch it."""
    for number, row in enumerate(rows, 1):
        yield row
        if number == count:
            return


def _place_of(dataset: DatasetConfig) -> str:
    return str(dataset.path or dataset.repository or dataset.name)


def _notes(spool: Spool) -> list[str]:
    counts = spool.counts
    notes = []
    if counts["bad_rows"]:
        notes.append(
            f"{counts['bad_rows']} bad rows of {counts['rows']} were left out, the first: {spool.first_bad_row}"
        )
    if counts["empty_documents"]:
        notes.append(f"{counts['empty_documents']} empty documents of {counts['rows']} were left out")
    return notes


def _what_is_lost(tokenizer: Tokenizer, text: str) -> list[str]:
    """What a tokenizer of others may lack: an end token, and giving back what it was given."""
    notes = []
    if tokenizer.end_token_id is None and not isinstance(tokenizer, CharTokenizer):
        notes.append(f"the tokenizer has no end token ({', '.join(END_TOKENS)}): nothing stands between documents")
    text = text[:100_000]
    back = tokenizer.decode(tokenizer.encode(text))
    if back != text:
        place = next((place for place, pair in enumerate(zip(text, back, strict=False)) if pair[0] != pair[1]), 0)
        here = text[place : place + 20], back[place : place + 20]
        notes.append(f"the tokenizer does not give back the text: {here[0]!r} comes back as {here[1]!r}")
    return notes


def _ready_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer, where it does not depend on the text. One of the hub is loaded when its content must be known."""
    if config.name == ByteTokenizer.name:
        return ByteTokenizer()
    if config.name == CharTokenizer.name:
        return None
    if config.name == BpeTokenizer.name:
        if config.vocab_size is None:
            raise InputError("tokenizer=bpe needs to know how many tokens to learn: give tokenizer.vocab_size=NUMBER.")
        return None
    if config.repository is None and config.path is None:
        raise InputError(f"tokenizer={config.name}: there is no such tokenizer; use bpe, byte, char, file or gpt2.")
    if is_commit(config.revision):
        return None
    from .pretrained import pretrained_tokenizer

    return pretrained_tokenizer(config)


def _tokenizer_identity(config: TokenizerConfig, ready: Tokenizer | None) -> list[Any]:
    if ready is not None:
        return [config.name, ready.digest]
    if config.name == BpeTokenizer.name:
        return [config.name, config.vocab_size]
    return [config.name, config.repository, config.revision]


def _make_tokenizer(config: TokenizerConfig, spool: Spool, parts: dict[str, np.ndarray]) -> Tokenizer:
    ready = _ready_tokenizer(config)
    if ready is not None:
        return ready
    if config.name == CharTokenizer.name:
        return CharTokenizer.train(_texts(spool, np.concatenate([parts["train"], parts["validation"]])))
    if config.name == BpeTokenizer.name:
        assert config.vocab_size is not None
        return BpeTokenizer.train(_sample(spool, parts["train"], BPE_SAMPLE), config.vocab_size)
    from .pretrained import pretrained_tokenizer

    return pretrained_tokenizer(config)


def _texts(spool: SpooledText, parts: np.ndarray) -> Iterator[str]:
    for begin, end in parts.tolist():
        yield from spool.pieces(begin, end)


def _sample(spool: SpooledText, parts: np.ndarray, most: int) -> Iterator[str]:
    """The text of these parts; where it has more than `most` bytes, pieces from all over it that have about that."""
    share = min(1.0, most / max(1, int((parts[:, 1] - parts[:, 0]).sum())))
    seen = taken = 0
    for text in _texts(spool, parts):
        size = len(text.encode("utf-8"))
        if taken <= seen * share:
            taken += size
            yield text
        seen += size


def _write_split(folder: Path, name: str, tokenizer: Tokenizer, spool: Spool, parts: np.ndarray) -> dict[str, int]:
    """NAME.bin has the tokens, NAME.offsets.bin where documents begin."""
    end = [] if tokenizer.end_token_id is None else [np.array([tokenizer.end_token_id])]
    counts: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
    total = 0
    with (folder / f"{name}.bin").open("wb") as file:
        for texts, closes in _batches(spool, parts):
            arrays: list[np.ndarray] = []
            lengths = []
            for ids, closing in zip(tokenizer.encode_many(texts), closes, strict=True):
                arrays += [ids, *end] if closing else [ids]
                total += len(ids) + (len(end) if closing else 0)
                if closing:
                    lengths.append(total)
            np.concatenate(arrays).astype(tokenizer.dtype).tofile(file)
            counts.append(np.array(lengths, dtype=np.int64))
    offsets = np.concatenate(counts)
    offsets.tofile(folder / f"{name}.offsets.bin")
    return {"documents": len(parts), "bytes": int((parts[:, 1] - parts[:, 0]).sum()), "tokens": total}


def _batches(spool: SpooledText, parts: np.ndarray) -> Iterator[tuple[list[str], list[bool]]]:
    """Some megabytes of text at a time, in pieces, and for each piece whether a document ends with it."""
    texts: list[str] = []
    closes: list[bool] = []
    size = 0
    for text, closing in _pieces(spool, parts):
        texts.append(text)
        closes.append(closing)
        size += len(text)
        if size >= BATCH:
            yield texts, closes
            texts, closes, size = [], [], 0
    if texts:
        yield texts, closes


def _pieces(spool: SpooledText, parts: np.ndarray) -> Iterator[tuple[str, bool]]:
    for begin, end in parts.tolist():
        held = None  # until it is known whether it is the last
        for text in spool.pieces(begin, end):
            if held is not None:
                yield held, False
            held = text
        assert held is not None
        yield held, True


# Opening one


def _open(folder: Path, settings: dict[str, Any]) -> Corpus | None:
    """The corpus in a folder; None where there is none, or where it is not what its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        contents = manifest["contents"]
        if contents["settings"] != settings or _json_digest(contents) != manifest["sha256"]:
            return None
        if any(_digest(folder / name) != digest for name, digest in contents["sha256"].items()):
            return None
        tokenizer = load_tokenizer(folder)
        arrays = {}
        for name, sizes in contents["splits"].items():
            for kind, file, dtype, count in (
                (name, f"{name}.bin", contents["dtype"], sizes["tokens"]),
                (f"{name}_offsets", f"{name}.offsets.bin", np.int64, sizes["documents"] + 1),
            ):
                arrays[kind] = np.memmap(folder / file, dtype, mode="r", shape=(count,))
        return Corpus(
            tokenizer=tokenizer,
            **arrays,
            dataset_digest=_json_digest(settings["dataset"]),
            tokenizer_digest=tokenizer.digest,
            train_bytes=contents["splits"]["train"]["bytes"],
            validation_bytes=contents["splits"]["validation"]["bytes"],
            notes=tuple(contents["notes"]),
            counts=contents["counts"],
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be used: %s", folder, error)
        return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()
