"""Sources of labelled texts: the user's files, datasets of the hub, and docstrings labelled with their package."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ...common.errors import InputError
from ...config.schema import DatasetConfig
from .documents import BadRow, Files, Source
from .hub import HubSource, SavedDataset
from .python_docs import STANDARD_LIBRARY, docstring, encodable, library_files, syntax_trees
from .tables import Table, TableRow, format_of, rows_of_lines

FORMATS = ("jsonl", "csv", "tsv", "parquet", "saved", "hub")
# Packages with more than a hundred docstrings each, in every Python from 3.11 to 3.13. Linux distributions ship
# tkinter, idlelib, lib2to3 and distutils separately, so these are not among them.
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
PLACEHOLDER = "PACKAGE"  # replaces the name of such a package in a text


@dataclass(frozen=True)
class Labelled:
    text: str
    label: str
    where: str  # for messages: the file and the line

    @property
    def place(self) -> float:
        """A hash of the text in [0, 1), which decides the split; rows with the same text are in the same split."""
        return int.from_bytes(hashlib.sha256(self.text.encode("utf-8")).digest()[:8], "big") / 2**64


LabelledRow = Labelled | BadRow
LabelledSource = Source[Labelled]


def open_labelled(dataset: DatasetConfig) -> LabelledSource:
    """The source that a config names. Raises InputError."""
    if dataset.name == "docstrings":
        return Docstrings()
    assert dataset.path is not None
    form = dataset.format or format_of(dataset.path, FORMATS)
    return LabelledSplits(dataset, form) if form in ("saved", "hub") else LabelledFiles(dataset, form)


def open_test_rows(dataset: DatasetConfig) -> LabelledSource:
    """The test split of dataset=labelled, a file or a split of its own. Raises InputError if there is none."""
    if dataset.name == "docstrings" or dataset.path is None:
        raise InputError(
            f"dataset={dataset.name} has only the test split that dataset.test_share sets aside; give that key to a "
            "new run, and leave --test out."
        )
    form = dataset.format or format_of(dataset.path, FORMATS)
    if form in ("saved", "hub"):
        return LabelledSplits(replace(dataset, split=dataset.test or "test", validation=0.5, subset_size=None), form)
    if dataset.test is None:
        raise InputError(
            "dataset=labelled has no test split yet; give a file or a folder, as dataset.test=PATH to the run or as "
            "--test PATH here; or give a share, dataset.test_share=0.1, to a new run."
        )
    return LabelledFiles(replace(dataset, path=dataset.test, format=None, validation=None), None, "test")


def columns_of(dataset: DatasetConfig) -> dict[str, str]:
    return {"text_column": dataset.text_column or "text", "label_column": dataset.label_column or "label"}


class LabelledFiles(LabelledSource):
    """Files of one format, with a column of texts and a column of labels."""

    def __init__(self, dataset: DatasetConfig, form: str | None, key: str = "path"):
        """`key` is the key of dataset that holds the path."""
        assert dataset.path is not None
        self.table = Table(dataset.path, form or format_of(dataset.path, FORMATS, key))
        self.columns = columns_of(dataset)
        self.validation: LabelledFiles | None = None
        if isinstance(dataset.validation, str):
            self.validation = LabelledFiles(
                replace(dataset, path=dataset.validation, validation=None), None, "validation"
            )

    def identity(self) -> dict[str, Any]:
        own = self.table.identity() | self.columns
        return own if self.validation is None else own | {"validation": self.validation.identity()}

    def rows(self) -> Iterator[LabelledRow]:
        for row in self.table.rows(self.columns):
            yield row if isinstance(row, BadRow) else labelled_row(row, *self.columns.values())

    def validation_rows(self) -> Iterator[LabelledRow] | None:
        return None if self.validation is None else self.validation.rows()

    def check_unchanged(self) -> None:
        for source in (self, self.validation):
            if source is not None:
                source.table.check_unchanged()


class LabelledSplits(LabelledSource):
    """A dataset with named splits: on the hub, or in a folder that `datasets.save_to_disk` wrote."""

    def __init__(self, dataset: DatasetConfig, form: str):
        assert dataset.path is not None
        self.columns = columns_of(dataset)
        named = replace(dataset, name=form, text_column=self.columns["text_column"], repository=dataset.path)
        self.splits = HubSource(named) if form == "hub" else SavedDataset(dataset.path, named)

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.splits.notes)

    def identity(self) -> dict[str, Any]:
        return self.splits.identity() | {"label_column": self.columns["label_column"]}

    def rows(self) -> Iterator[LabelledRow]:
        yield from self._rows(self.splits.split, "dataset.split")

    def validation_rows(self) -> Iterator[LabelledRow] | None:
        self.splits.validation_rows()  # adds a note if another split is used for validation
        split = self.splits.validation_split
        return None if split is None else self._rows(split, "dataset.validation")

    def check_unchanged(self) -> None:
        self.splits.check_unchanged()

    def _rows(self, split: str, key: str) -> Iterator[LabelledRow]:
        self.splits.check_split(split, key)
        rows, where = self.splits.splits[split], f"{self.splits.where}, split {split}"
        text, label = self.columns.values()
        for asked, column in self.columns.items():
            if column not in rows.features:
                raise InputError(
                    f"{where}: there is no column {column!r}, only {', '.join(map(repr, rows.features))}; name one: "
                    f"dataset.{asked}=NAME"
                )
        names = getattr(rows.features[label], "names", None)  # class names of labels that are stored as numbers
        for number, values in enumerate(rows.select_columns([text, label]), 1):
            if names and isinstance(values[label], int) and 0 <= values[label] < len(names):
                values = {**values, label: names[values[label]]}
            yield labelled_row(TableRow(values, f"{where}, row {number}"), text, label)


def labelled_row(row: TableRow, text_column: str, label_column: str) -> LabelledRow:
    """A row with its text and label checked. A label is a text or a whole number; spaces around it are removed."""
    text, label = row.values[text_column], row.values[label_column]
    if (bad := bad_text(text, text_column, row.where)) is not None:
        return bad
    if isinstance(label, bool):
        label = str(label).lower()
    elif isinstance(label, int):
        label = str(label)
    if not isinstance(label, str) or not label.strip():
        what = f"is {label!r}"[:80] if label and not isinstance(label, str) else "is empty"
        return BadRow(row.where, f"{label_column!r} {what}: expected a label, a text or a whole number")
    return _no_utf8(label, label_column, row.where) or Labelled(text, label.strip(), row.where)


def bad_text(text: Any, column: str, where: str) -> BadRow | None:
    """What is wrong with a text; None if it is valid."""
    if not isinstance(text, str):
        what = "null" if text is None else f"{text!r}"[:80]
        return BadRow(where, f"{column!r} should be text but is {what}")
    if not text.strip():
        return BadRow(where, f"{column!r} is empty: there is nothing to classify")
    return _no_utf8(text, column, where)


def _no_utf8(text: str, column: str, where: str) -> BadRow | None:
    """What is wrong with a text that UTF-8 cannot encode: undecodable bytes, or half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        letter = ord(text[error.start])
        what = f"byte 0x{letter - 0xDC00:02x}" if 0xDC80 <= letter <= 0xDCFF else "half of a surrogate pair"
        return BadRow(where, f"{column!r} has a {what} at position {error.start}, which is not UTF-8")
    return None


def texts_in_lines(lines: Iterator[str], where: str, column: str) -> Iterator[str]:
    """The texts of a file without labels. Its suffix says whether it is JSON lines, CSV or TSV; otherwise each line is
    a text. Stdin is JSON lines if the first line begins with {. Raises InputError with the file and the line."""
    first = next(lines, "")
    ending = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv"}
    form = ending.get(Path(where).suffix.lower())
    if form is None and where == "stdin" and first.lstrip().startswith("{"):
        form = "jsonl"
    rows = chain([first] if first else [], lines)
    read: Iterator[TableRow | BadRow]
    if form is None:
        plain = ((number, line.rstrip("\r\n")) for number, line in enumerate(rows, 1))
        read = (TableRow({column: line}, f"{where}, line {number}") for number, line in plain if line.strip())
    else:
        read = rows_of_lines(rows, where, form, {"": column})
    for row in read:
        bad = row if isinstance(row, BadRow) else bad_text(row.values[column], column, row.where)
        if bad is not None or isinstance(row, BadRow):
            raise InputError(f"{bad}. Correct the line, or leave it out.")
        yield row.values[column]


class Docstrings(Files, LabelledSource):
    """dataset=docstrings: the text of a docstring, labelled with its package of the standard library.

    The text is the docstring alone, without the name of its function or class. The word PACKAGE replaces the name of
    each of the PACKAGES in it, in any case and also inside of words, since that name is the label. A text that occurs
    in several packages has no unique label and is left out; one that occurs several times in a package is used once.
    """

    version = "docstrings 1"

    def __init__(self) -> None:
        root = STANDARD_LIBRARY
        missing = [name for name in PACKAGES if not (root / name / "__init__.py").is_file()]
        if missing:
            raise InputError(
                f"dataset=docstrings reads the sources of Python's standard library, but {', '.join(missing)} is not "
                f"in {root}. Use a Python installation that has them, or texts of your own with dataset=labelled "
                "dataset.path=PATH."
            )
        super().__init__(file for name in PACKAGES for file in library_files(root / name))

    def rows(self) -> Iterator[LabelledRow]:
        names = re.compile("|".join(PACKAGES), re.IGNORECASE)
        found: dict[str, Labelled | None] = {}
        for file, tree in syntax_trees((file.name, file.path.read_bytes()) for file in self.files):
            label = file.partition("/")[0]
            for node in ast.walk(tree):
                if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                if (raw := docstring(node)) is None:
                    continue
                text = names.sub(PLACEHOLDER, encodable(raw))
                one = found.setdefault(text, Labelled(text, label, f"{file}, line {getattr(node, 'lineno', 1)}"))
                if one is not None and one.label != label:
                    found[text] = None
        yield from (row for row in found.values() if row is not None)
