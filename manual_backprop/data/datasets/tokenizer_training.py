"""Trains a tokenizer and saves it in a folder that `transformers` can load too.

`train_tokenizer` learns from a dataset, `train_tokenizer_from_files` from files. Many runs can share the result, while
`tokenizer=bpe` trains one within a run.
"""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...common.durable_files import new_folder
from ...common.errors import InputError
from ...common.uris import expanded
from ...config.schema import DatasetConfig
from ..sources.reading import Reading, text_of_files, training_text
from ..tokens.tokenizer import END_TOKEN, FILE_NAME, BpeTokenizer
from .named import check_whole, dataset_named, has_columns, short_name, title_of

log = logging.getLogger(__name__)

TOKENIZERS = Path("outputs/tokenizers")
SPECIAL_TOKENS = ("<unk>", "<pad>", "<bos>", END_TOKEN)
SMALLEST = 256 + len(SPECIAL_TOKENS)
ORIGIN = "origin.json"
MIN_FREQUENCY = 2  # of a pair of tokens, to be merged


def train_tokenizer(
    name: str | Path | DatasetConfig,
    vocab_size: int,
    *,
    subset_size: int | None = None,
    min_frequency: int = MIN_FREQUENCY,
    output: str | Path | None = None,
) -> Path:
    """Train byte-level BPE on the training documents of a dataset and return its folder. Raises InputError.

    >>> _ = Path("text.txt").write_text("to be or not to be, that is the question. " * 200)
    >>> train_tokenizer("text.txt", vocab_size=270).as_posix()
    'outputs/tokenizers/text-270'
    """
    _check(vocab_size, min_frequency)
    dataset = name if isinstance(name, DatasetConfig) else dataset_named(name, subset_size=subset_size)
    folder = _place(output, title_of(dataset), vocab_size, min_frequency, dataset.subset_size)
    with training_text(dataset) as reading:
        return _train(reading, vocab_size, min_frequency, folder)


def train_tokenizer_from_files(
    paths: Iterable[str | Path],
    vocab_size: int,
    *,
    text_column: str | None = None,
    skip_bad_rows: bool = False,
    subset_size: int | None = None,
    min_frequency: int = MIN_FREQUENCY,
    output: str | Path | None = None,
) -> Path:
    """Train byte-level BPE on all documents of .txt, .jsonl and .parquet files, or folders of them, and return its
    folder. Raises InputError.

    >>> for name in ("one.txt", "two.txt"):
    ...     _ = Path(name).write_text("to be or not to be, that is the question. " * 100)
    >>> train_tokenizer_from_files(["one.txt", "two.txt"], vocab_size=270, output="tokenizer").name
    'tokenizer'
    """
    _check(vocab_size, min_frequency)
    check_whole("subset_size", subset_size, 1)
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    files = [expanded(path) for path in given]
    if not given or "" in given:
        raise InputError("No file was given to learn a tokenizer from: give at least one.")
    for file in files:
        if not os.path.exists(file):
            raise InputError(f"{file}: there is no such file. Give .txt, .jsonl or .parquet files that exist.")
    datasets = [dataset_named(file) for file in files]
    if text_column is not None:
        if all(not has_columns(dataset) for dataset in datasets):
            raise InputError(f"The text column {text_column!r} cannot be used: plain text has no columns.")
        datasets = [
            replace(dataset, text_column=text_column) if has_columns(dataset) else dataset for dataset in datasets
        ]
    title = short_name(files[0]) + (f"-and-{len(files) - 1}-more" if len(files) > 1 else "")
    folder = _place(output, title, vocab_size, min_frequency, subset_size)
    with text_of_files(datasets, subset_size, skip_bad_rows) as reading:
        return _train(reading, vocab_size, min_frequency, folder)


def _check(vocab_size: int, min_frequency: int) -> None:
    for what, value in (("vocab_size", vocab_size), ("min_frequency", min_frequency)):
        check_whole(what, value if value is not None else "null", 1)
    if vocab_size < SMALLEST:
        raise InputError(
            f"A vocabulary of {vocab_size} tokens is too small: there are 256 bytes and {', '.join(SPECIAL_TOKENS)}, "
            f"so give at least {SMALLEST}."
        )


def _place(output: str | Path | None, title: str, vocab_size: int, min_frequency: int, subset_size: int | None) -> Path:
    """The folder for the tokenizer. Raises InputError if it holds a tokenizer that was trained otherwise."""
    name = f"{title}-{vocab_size}" + (f"-first-{subset_size}" if subset_size is not None else "")
    name += f"-min-{min_frequency}" if min_frequency != MIN_FREQUENCY else ""
    folder = TOKENIZERS / name if output is None else expanded(output)
    if folder.exists():
        asked = {"vocab_size": vocab_size, "min_frequency": min_frequency}
        try:
            origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
            differs = any(origin[key] != value for key, value in asked.items())
        except (OSError, ValueError, KeyError, TypeError):  # another program's: `_save` compares it after training
            differs = False
        if differs or not (folder / FILE_NAME).is_file():
            raise _another(folder)
    return folder


def _another(folder: Path) -> InputError:
    return InputError(f"{folder} exists and is not this tokenizer: remove it, or give another place (--output).")


def _train(reading: Reading, vocab_size: int, min_frequency: int, folder: Path) -> Path:
    texts = reading.spool.sample(reading.train)
    tokenizer = BpeTokenizer.train(texts, vocab_size, SPECIAL_TOKENS, min_frequency)
    if tokenizer.vocab_size < vocab_size:
        log.warning("The text is too small to learn %d tokens: the tokenizer has %d.", vocab_size, tokenizer.vocab_size)
    for note in reading.notes:
        log.warning("%s", note)
    origin = {"source": reading.source, "vocab_size": vocab_size, "min_frequency": min_frequency}
    _save(tokenizer, folder, origin | {"text_bytes": reading.train_bytes, "sha256": tokenizer.digest})
    return folder


def _save(tokenizer: BpeTokenizer, folder: Path, origin: dict[str, Any]) -> None:
    """Save the folder by one rename. An existing folder with the same tokenizer stays."""
    if folder.exists():
        there = folder / FILE_NAME
        if there.is_file() and BpeTokenizer(there.read_text(encoding="utf-8")).digest == tokenizer.digest:
            log.info("%s exists already and holds the same tokenizer", folder)
            return
        raise _another(folder)
    with new_folder(folder) as staged:
        tokenizer.save(staged)
        for name, content in (*_for_transformers().items(), (ORIGIN, origin)):
            (staged / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _for_transformers() -> dict[str, Any]:
    """The files that AutoTokenizer.from_pretrained reads in addition to tokenizer.json."""
    unknown, padding, begin, end = SPECIAL_TOKENS
    named = {"unk_token": unknown, "pad_token": padding, "bos_token": begin, "eos_token": end}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {"tokenizer_config.json": kind | named, "special_tokens_map.json": named}
