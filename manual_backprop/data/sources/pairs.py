"""Pairs of sources and targets: the user's files, two files line by line, and datasets of the hub.

Each side is a source of documents; row i of one and row i of the other are a pair. So a file is read twice, once for
each column. A hash of a pair's `unit` decides its split. The unit here is the source's text, so that no source is in
both the training and the validation split; in `dates` it is a day.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ...common.errors import InputError
from ...common.uris import expanded
from ...config.schema import DatasetConfig
from .documents import (
    BYTE_ORDER_MARK,
    BadRow,
    Document,
    FileSource,
    Row,
    Source,
    SourceFile,
    files_below,
    unreadable,
)
from .files import ColumnFiles, JsonLines, ParquetFiles, cells, find_files
from .hub import HubSource, SavedDataset

FORMAT_OF = {".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
USUAL = ("source", "target")  # default names of the columns


@dataclass(frozen=True)
class Pair:
    source: str
    target: str
    where: str  # for messages: the file and the line
    unit: str  # pairs with the same unit are in the same split
    kind: str = ""  # metrics are also reported for each kind


PairRow = Pair | BadRow


class PairSource(Source[Pair]):
    """A source of pairs."""

    test_share = 0.0  # share of the units in the test split; 0: the test split is elsewhere, or there is none


class FilePairs(PairSource):
    """dataset=pairs: the user's files, or a dataset of the hub."""

    def __init__(self, dataset: DatasetConfig, key: str = "path"):
        """`key` is the key of `dataset` that holds the path. Raises InputError if there is no such file, or if its
        format is not known."""
        if dataset.path is None:
            raise InputError("dataset=pairs needs a path: give a file or a folder as dataset.path=PATH.")
        form = dataset.format or format_of(dataset.path, dataset, key)
        self.has_splits = form in ("saved", "hub")
        self.sides = tuple(_side(dataset, form, key) for key in ("source_column", "target_column"))
        self.validation: FilePairs | None = None
        if isinstance(dataset.validation, str) and not self.has_splits:
            validation = replace(dataset, path=dataset.validation, format=form, validation=None)
            self.validation = FilePairs(validation, "validation")

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.sides[0].notes)

    def identity(self) -> dict[str, Any]:
        source, target = (side.identity() for side in self.sides)
        own = {"kind": "pairs 1", "source": source, "target": target}
        return own if self.validation is None else own | {"validation": self.validation.identity()}

    def rows(self) -> Iterator[PairRow]:
        return _paired(*(side.rows() for side in self.sides))

    def validation_rows(self) -> Iterator[PairRow] | None:
        if self.validation is not None:
            return self.validation.rows()
        source, target = (side.validation_rows() for side in self.sides)
        return None if source is None or target is None else _paired(source, target)

    def check_unchanged(self) -> None:
        for side in self.sides:
            side.check_unchanged()
        if self.validation is not None:
            self.validation.check_unchanged()


def format_of(path: str, dataset: DatasetConfig, key: str) -> str:
    """The format of a file, or of the files in a folder, by suffix. Raises InputError if these do not decide."""
    place = expanded(path)
    if place.is_dir():
        found = {FORMAT_OF[file.suffix.lower()] for file in files_below(place) if file.suffix.lower() in FORMAT_OF}
        if len(found) == 1:
            return found.pop()
        reason = f"it holds files of several formats ({', '.join(sorted(found))})" if found else "it holds no such file"
    elif place.is_file():
        if (form := FORMAT_OF.get(place.suffix.lower())) is not None:
            return form
        reason = f"its name ends in {place.suffix}" if place.suffix else "its name has no suffix"
    elif all(_beside(path, column).is_file() for column in _columns(dataset)):
        return "lines"
    else:
        both = [_beside(path, column) for column in _columns(dataset)]
        if there := [file for file in both if file.is_file()]:
            (missing,) = set(both) - set(there)
            raise InputError(f"dataset.{key}={path}: there is {there[0]}, and no {missing} beside it. Give both files.")
        raise InputError(
            f"dataset.{key}={path}: there is no such file or folder, nor {both[0]} and {both[1]}. Give an existing "
            "one; a dataset of the hub is named as dataset.path=OWNER/NAME dataset.format=hub."
        )
    raise InputError(
        f"dataset.{key}={path}: {reason}, which does not determine the format. Give dataset.format=tsv, jsonl, parquet "
        "or saved."
    )


def _columns(dataset: DatasetConfig) -> tuple[str, str]:
    return dataset.source_column or USUAL[0], dataset.target_column or USUAL[1]


def _beside(path: str, ending: str) -> Path:
    return expanded(f"{path}.{ending}")


def _side(dataset: DatasetConfig, form: str, key: str) -> Source:
    """The sources or the targets of a dataset."""
    assert dataset.path is not None
    named = getattr(dataset, key)
    column = named or key.removesuffix("_column")
    if form == "jsonl":
        return JsonLines(dataset.path, column, key)
    if form == "parquet":
        return ParquetFiles(dataset.path, column, key)
    if form == "tsv":
        return TabSeparated(dataset.path, named, key)
    if form == "lines":
        return Lines(_beside(dataset.path, column))
    rows = replace(dataset, name=form, text_column=column)
    if form == "saved":
        return SavedDataset(dataset.path, rows, key)
    return HubSource(replace(rows, repository=dataset.path), key)


def _paired(sources: Iterator[Row], targets: Iterator[Row]) -> Iterator[PairRow]:
    """The pairs of two sides. Raises InputError if one side has more rows than the other."""
    for number, (source, target) in enumerate(zip_longest(sources, targets), 1):
        if source is None or target is None:
            there, what = (source, "target") if target is None else (target, "source")
            raise InputError(
                f"{there.where}: this row has no {what}: the file of the {what}s ends after {number - 1} rows. Both "
                "files need the same number of lines, with one pair in each line; complete the shorter file."
            )
        yield _pair(source, target)


def _pair(source: Row, target: Row) -> PairRow:
    for row in (source, target):
        if isinstance(row, BadRow):
            return row
    assert isinstance(source, Document)
    assert isinstance(target, Document)
    texts = []
    for side, document in (("source", source), ("target", target)):
        text = document.text
        if not text.strip():
            return BadRow(document.where, f"the {side} is empty")
        texts.append(text)
    return Pair(texts[0], texts[1], source.where, unit=texts[0])


class Lines(FileSource):
    """One text per line, in one UTF-8 file."""

    version = "lines 1"

    def __init__(self, path: Path):
        super().__init__(find_files(path, "one text per line"))

    def rows(self) -> Iterator[Row]:
        for number, line, where in _lines(self.files[0]):
            yield line if isinstance(line, BadRow) else Document(f"{number}", (line,), where)


class TabSeparated(ColumnFiles):
    """Tab-separated values, whose `column` is a text. There is no quoting: a cell is everything between two tabs.

    A column given by name is looked up in the first line. With a column given by number, from 1, the first line is a
    row too. Without a column it is a row as well, unless it holds the names source and target.
    """

    version = "tsv 1"
    kind = "tab-separated values", (".tsv", ".txt")

    def rows(self) -> Iterator[Row]:
        for file in self.files:
            place, first = None, list[str]()
            for number, line, where in _lines(file):
                row = [] if isinstance(line, BadRow) else line.split("\t")
                if place is None and row:
                    column = self.column
                    if column is None and {*USUAL} <= {name.strip() for name in row}:
                        column = self.key.removesuffix("_column")
                    place, first = self._place(column, row, where), row
                    if column is not None and not column.isdecimal():
                        continue
                if isinstance(line, BadRow):
                    yield line
                elif len(row) != len(first) or place is None:
                    yield BadRow(where, f"this line has {cells(row)}, but the first one has {cells(first)}")
                else:
                    yield Document(f"{file.name}:{number}", (row[place],), where)

    def _place(self, column: str | None, first: list[str], where: str) -> int:
        """The index of the column in a row. Raises InputError."""
        if column is not None and not column.isdecimal():
            names = [name.strip() for name in first]
            if names.count(column) != 1:
                raise InputError(
                    f"{where}: there is no column {column!r}, only {', '.join(map(repr, names))}. Name one of "
                    f"these, dataset.{self.key}=NAME, or, if the first line has no names, give a number: "
                    f"dataset.{self.key}=1."
                )
            return names.index(column)
        number = int(column) if column else USUAL.index(self.key.removesuffix("_column")) + 1
        if not 1 <= number <= len(first):
            raise InputError(
                f"{where}: there is no column {number}, the line has {cells(first)}; are there tabs between "
                f"source and target? Give dataset.{self.key}=1 to {len(first)}, or another dataset.format."
            )
        return number - 1


def _lines(file: SourceFile) -> Iterator[tuple[int, str | BadRow, str]]:
    """The number, the text without its line end, and the place (for messages) of each line of a file."""
    try:
        with file.path.open("rb") as opened:
            for number, line in enumerate(opened, 1):
                where = f"{file.path}, line {number}"
                try:
                    text: str | BadRow = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
                except UnicodeDecodeError as error:
                    byte = f"byte {error.start} of the line is 0x{line[error.start]:02x}"
                    text = BadRow(where, f"{byte}, which is not UTF-8 ({error.reason})")
                if number == 1 and isinstance(text, str):
                    text = text.removeprefix(BYTE_ORDER_MARK)
                yield number, text, where
    except OSError as error:
        raise unreadable(file.path, error) from error


def open_test_pairs(dataset: DatasetConfig) -> FilePairs:
    """The test split of dataset=pairs, which training never reads. Raises InputError if there is none."""
    if dataset.format in ("saved", "hub"):
        name = dataset.test or "test"
        if name == (dataset.split or "train"):
            raise InputError(f"dataset.test={name}: is the training split. Name another one.")
        return FilePairs(replace(dataset, split=name, validation=0.5, subset_size=None))
    if dataset.test is None:
        raise InputError(
            "dataset=pairs has no test split yet; give a file or a folder, as dataset.test=PATH to the run or as "
            "--test PATH here."
        )
    return FilePairs(replace(dataset, path=dataset.test, validation=None, subset_size=None), "test")
