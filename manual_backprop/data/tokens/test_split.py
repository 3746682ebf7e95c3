"""The test split of a dataset, which training never reads: `open_test_split`.

It is tokenized when it is first needed, with the tokenizer of the run's corpus, and cached separately. So a run's data
and its digest do not depend on the test split.
"""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...common.digests import json_digest
from ...common.errors import InputError
from ...common.uris import expanded
from ...config.schema import DatasetConfig
from ..sources.documents import Source
from ..sources.hub import TEST_SPLIT, DatasetSplits, evaluation_subset_size
from ..sources.reading import first_rows, selection
from ..sources.registry import open_source
from ..sources.spool import Spool
from .corpus import Corpus
from .run_tokenizer import tokenizer_notes
from .token_cache import Contents, Split, open_split, prepare, write_split

FORMAT = 1  # increased whenever the same text and settings would give other files
WITH_FILES = ("text", "jsonl", "parquet")  # datasets whose test split is a separate file or folder


def open_test_split(dataset: DatasetConfig, corpus: Corpus, cache: str | Path) -> tuple[Split, tuple[str, ...]]:
    """The test split for a run's corpus, and notes about it.

    Raises InputError, which lists the existing splits, if there is none, and StorageError.
    """
    if dataset.name in WITH_FILES:
        if dataset.test is None:
            raise InputError(
                f"dataset={dataset.name} has no test split yet; give a file or a folder, as dataset.test=PATH to the "
                "run or as --test PATH here."
            )
        if dataset.path is not None and _place(dataset.path) == _place(dataset.test):
            raise InputError(
                f"dataset.test={dataset.test}: the model was trained on this text. Give another file or folder, or "
                "give --split train."
            )
        dataset = replace(dataset, path=dataset.test, subset_size=None)
        return _prepared(dataset, open_source(dataset), corpus, Path(cache))
    source = None if dataset.name in ("python_docs", "pretokenized") else open_source(dataset)
    if not isinstance(source, DatasetSplits):
        raise InputError(f"dataset={dataset.name} has a train and a validation split, but no test split.")
    name = dataset.test or TEST_SPLIT
    if name not in source.splits:
        raise InputError(f"{source.where} has no split {name!r}, only {', '.join(source.splits)}.")
    if name == source.split:
        raise InputError(f"The model was trained on the split {name!r} of {source.where}: give --split train.")
    if name == source.validation_split:
        return corpus.split("validation"), (f"split {name} of {source.where} is the validation split, the same text",)
    dataset = replace(dataset, split=name, subset_size=evaluation_subset_size(dataset.subset_size))
    return _prepared(dataset, open_source(dataset), corpus, Path(cache))


def _place(path: str) -> Path:
    return expanded(path).resolve()


def _prepared(dataset: DatasetConfig, source: Source, corpus: Corpus, cache: Path) -> tuple[Split, tuple[str, ...]]:
    """All documents of a source, as one split, from the cache or prepared now; and notes about it."""
    settings = {
        "format": FORMAT,
        "test": selection(dataset, source),
        "on_bad_row": dataset.on_bad_row,
        "tokenizer_digest": corpus.tokenizer_digest,
    }

    def make(folder: Path) -> Contents:
        with closing(Spool(folder / "text", skip_bad_rows=dataset.on_bad_row == "skip")) as spool:
            spool.read(first_rows(source.rows(), dataset.subset_size))
            source.check_unchanged()
            if not len(spool):
                raise InputError(f"There is no text in {dataset.path or dataset.repository} to test on.")
            lost = tokenizer_notes(corpus.tokenizer, spool.texts(spool.parts()))
            sizes = write_split(folder, TEST_SPLIT, corpus.tokenizer, spool, spool.parts())
        spool.path.unlink()
        dtype = np.dtype(corpus.tokenizer.dtype).name
        return {"dtype": dtype, "splits": {TEST_SPLIT: sizes}, "notes": [*source.notes, *spool.notes(), *lost]}

    def read(folder: Path, contents: Contents) -> tuple[Split, tuple[str, ...]]:
        return open_split(folder, contents, TEST_SPLIT), tuple(contents["notes"])

    return prepare(cache / f"{dataset.name}-{TEST_SPLIT}-{json_digest(settings)[:16]}", settings, make, read)
