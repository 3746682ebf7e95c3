"""Reads the text of a dataset once into a file, and splits its documents into training and validation.

A corpus needs that file while it is tokenized (`read_documents`). To train a tokenizer or to analyse a text, the file
is in a temporary folder (`training_text`, `text_of_files`). The text is never in memory as a whole.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...common.durable_files import storage_errors
from ...common.errors import BadRowError, InputError
from ...config.schema import DatasetConfig
from .documents import BadRow, Source
from .registry import open_source
from .spool import Spool

VALIDATION_SHARE = 0.1  # of the text, for a source without a validation split

T = TypeVar("T")

log = logging.getLogger(__name__)


def selection(dataset: DatasetConfig, source: Source | None) -> dict[str, Any]:
    """A JSON value that identifies the documents of both splits, independent of the tokenizer. Without a source its
    identity is left out."""
    identity = None if source is None else source.identity()
    return {"source": identity, "subset_size": dataset.subset_size, "validation": dataset.validation}


def read_documents(spool: Spool, source: Source, dataset: DatasetConfig) -> dict[str, np.ndarray]:
    """Read all documents into the spool and return the parts (documents, 2) of `train` and of `validation`.

    Raises InputError if one of them is empty, or if the source changes while it is read.
    """
    validation = source.validation_rows()
    spool.read(first_rows(source.rows(), dataset.subset_size))
    training = len(spool)
    if validation is not None:
        spool.read(validation)
    source.check_unchanged()
    if training == 0 or (validation is not None and training == len(spool)):
        read = f"read: {spool.counts['rows']} (rows or files), of these empty: {spool.counts['empty_documents']}"
        side = "validation" if training else "training"
        place = dataset.path or dataset.repository or dataset.name
        raise InputError(f"There is no text for {side} in {place} ({read}). Give more text.")
    if validation is not None:
        return {"train": spool.parts(0, training), "validation": spool.parts(training)}
    share = dataset.validation if isinstance(dataset.validation, float) else VALIDATION_SHARE
    training_parts, validation_parts = spool.split(share)
    return {"train": training_parts, "validation": validation_parts}


def first_rows(rows: Iterable[T], count: int | None) -> Iterator[T]:
    """The first `count` rows; None: all. It never requests one row more, which a stream would download."""
    for number, row in enumerate(rows, 1):
        yield row
        if number == count:
            return


class RowReading:
    """Reads rows and counts the bad ones: with `skip` it leaves them out, otherwise the first raises InputError."""

    def __init__(self, skip: bool):
        self.skip, self.first, self.counts = skip, "", {"rows": 0, "bad_rows": 0}

    def read(self, rows: Iterable[T | BadRow]) -> Iterator[T]:
        for row in rows:
            self.counts["rows"] += 1
            if not isinstance(row, BadRow):
                yield row
                continue
            if not self.skip:
                raise BadRowError(
                    row, "Correct it, or leave such rows out with dataset.on_bad_row=skip, which counts them."
                )
            self.counts["bad_rows"] += 1
            self.first = self.first or str(row)
            log.info("left out: %s", row)

    @property
    def notes(self) -> list[str]:
        bad, rows = self.counts["bad_rows"], self.counts["rows"]
        return [f"{bad} of {rows} rows left out as bad, the first: {self.first}"] if bad else []


# Text in a temporary folder


@dataclass(frozen=True)
class Reading:
    spool: Spool
    train: np.ndarray  # (documents, 2) byte positions in the spool
    source: dict[str, Any]  # the source's identity
    notes: tuple[str, ...]

    @property
    def train_bytes(self) -> int:
        return int((self.train[:, 1] - self.train[:, 0]).sum())


@contextmanager
def training_text(dataset: DatasetConfig) -> Iterator[Reading]:
    """The training documents of a dataset, without those of the validation split."""
    source = open_source(dataset)
    identity = source.identity()
    with _temporary_spool(dataset.on_bad_row == "skip") as spool:
        with storage_errors("store the text in the temporary folder (TMPDIR)"):
            train = read_documents(spool, source, dataset)["train"]
        yield Reading(spool, train, identity, (*source.notes, *spool.notes()))


@contextmanager
def text_of_files(
    datasets: list[DatasetConfig], subset_size: int | None = None, skip_bad_rows: bool = False
) -> Iterator[Reading]:
    """All documents of several files, or the first `subset_size` of each."""
    sources = [open_source(dataset) for dataset in datasets]
    identity = {"kind": "files", "files": [source.identity() for source in sources]}
    with _temporary_spool(skip_bad_rows) as spool:
        with storage_errors("store the text in the temporary folder (TMPDIR)"):
            for source in sources:
                spool.read(first_rows(source.rows(), subset_size))
                source.check_unchanged()
        if not len(spool):
            raise InputError(f"There is no text in {', '.join(str(dataset.path) for dataset in datasets)}.")
        yield Reading(spool, spool.parts(), identity, tuple(spool.notes()))


@contextmanager
def _temporary_spool(skip_bad_rows: bool) -> Iterator[Spool]:
    with tempfile.TemporaryDirectory(prefix="manual_backprop-") as folder:
        spool = Spool(Path(folder) / "text", skip_bad_rows)
        spool.path.unlink()  # it is read through the open file; the system deletes it even if the process is killed
        try:
            yield spool
        finally:
            with suppress(OSError):  # closing flushes, which fails again on a full disk
                spool.close()
