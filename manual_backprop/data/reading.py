"""The text of a dataset read once into a temporary file, and which parts of it train: what is learned or counted from
it then takes no memory for the text."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DatasetConfig
from ..durable import storage_errors
from ..errors import InputError
from .corpus import _notes, _read
from .documents import Row, open_source
from .spool import Spool


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
    """The training documents of a dataset, without those that a run would validate on."""
    source = open_source(dataset)
    identity = source.identity()
    with _spool(dataset.on_bad_row == "skip") as spool:
        with storage_errors("keep the text in the temporary folder (TMPDIR)"):
            train = _read(spool, source, dataset)["train"]
        yield Reading(spool, train, identity, (*source.notes, *_notes(spool)))


@contextmanager
def text_of_files(
    datasets: list[DatasetConfig], subset_size: int | None = None, skip_bad_rows: bool = False
) -> Iterator[Reading]:
    """All documents of several files; of each, the first `subset_size`."""
    sources = [open_source(dataset) for dataset in datasets]
    identity = {"kind": "files", "files": [source.identity() for source in sources]}
    with _spool(skip_bad_rows) as spool:
        with storage_errors("keep the text in the temporary folder (TMPDIR)"):
            for source in sources:
                spool.read(_first(source.documents(), subset_size))
                source.check_unchanged()
        if not len(spool):
            raise InputError(f"There is no text in {', '.join(str(dataset.path) for dataset in datasets)}.")
        yield Reading(spool, spool.parts(), identity, tuple(_notes(spool)))


@contextmanager
def _spool(skip_bad_rows: bool) -> Iterator[Spool]:
    with tempfile.TemporaryDirectory(prefix="manual_backprop-") as folder:
        spool = Spool(Path(folder) / "text", skip_bad_rows)
        try:
            yield spool
        finally:
            with suppress(OSError):  # of a full disk, which was met before
                spool.close()


def _first(rows: Iterable[Row], count: int | None) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        yield row
        if number == count:
            return
