"""Rows with named columns from the user's files: JSON lines, CSV, tab-separated values, Parquet.

A row maps the requested columns to their values; a row that cannot be read is a BadRow with its file and line. The
caller interprets the values.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...common.errors import InputError
from ...common.uris import expanded
from .documents import BYTE_ORDER_MARK, BadRow, Files, SourceFile, files_below, unreadable
from .files import ROWS, broken, cells, find_files, not_json

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
LONGEST_CELL = 2**28  # [characters] of CSV


@dataclass(frozen=True)
class TableRow:
    values: Mapping[str, Any]  # by the names of the columns
    where: str  # for messages: the file and the line


def format_of(path: str, formats: Iterable[str], key: str = "path") -> str:
    """The format of a file, or of the files in a folder, by suffix. `key` is the key of `dataset` that holds the
    path. Raises InputError if there is no such path, or if the suffixes do not decide."""
    place, known = expanded(path), ", ".join(formats)
    if not place.exists():
        raise InputError(
            f"dataset.{key}={path}: there is no such file or folder. Give an existing one; a dataset of the hub is "
            "named as dataset.path=OWNER/NAME dataset.format=hub."
        )
    files = list(files_below(place)) if place.is_dir() else [place]
    found = {FORMATS[file.suffix.lower()] for file in files if file.suffix.lower() in FORMATS}
    if len(found) == 1:
        return found.pop()
    endings = ", ".join(ending for ending, form in FORMATS.items() if form in formats)
    said = f"holds no file that ends in {endings}" if place.is_dir() else f"ends in none of {endings}"
    said = f"holds files of several formats ({', '.join(sorted(found))})" if found else said
    way_out = f"Give dataset.format={known}" if key == "path" else "Rename it, or give another"
    raise InputError(f"dataset.{key}={path}: {said}, which does not determine the format. {way_out}.")


class Table(Files):
    """Files of one format."""

    version = "table 1"

    def __init__(self, path: str, form: str):
        self.form = form
        super().__init__(find_files(path, form, tuple(end for end, name in FORMATS.items() if name == form)))

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"format": self.form}

    def rows(self, columns: Mapping[str, str]) -> Iterator[TableRow | BadRow]:
        """The rows of all files. `columns` maps a config key to the column that it names. Raises InputError if a file
        lacks one of the columns."""
        for file in self.files:
            if self.form == "parquet":
                yield from _parquet_rows(file, columns)
            else:
                yield from rows_of_lines(_lines(file), str(file.path), self.form, columns)


def rows_of_lines(
    lines: Iterable[str], where: str, form: str, columns: Mapping[str, str]
) -> Iterator[TableRow | BadRow]:
    """The rows of a text file (jsonl, csv or tsv), from its lines with their line ends; surrogates stand for bytes that
    are not UTF-8. `columns`: key of the config that names a column ("" if none does) -> the column."""
    return _json_rows(lines, where, columns) if form == "jsonl" else _csv_rows(lines, where, form, columns)


def _lines(file: SourceFile) -> Iterator[str]:
    try:
        with file.path.open("r", encoding="utf-8", errors="surrogateescape", newline="\n") as opened:
            yield from opened
    except OSError as error:
        raise unreadable(file.path, error) from error


def _json_rows(lines: Iterable[str], where: str, columns: Mapping[str, str]) -> Iterator[TableRow | BadRow]:
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if line.strip():
            yield _json_row(line, f"{where}, line {number}", columns)


def _json_row(line: str, place: str, columns: Mapping[str, str]) -> TableRow | BadRow:
    try:
        row = json.loads(line)
    except (RecursionError, ValueError) as error:
        return not_json(place, error)
    if not isinstance(row, dict):
        return BadRow(
            place, f"expected an object, as in {{{', '.join(f'{name!r}: ...' for name in columns.values())}}}"
        )
    for key, column in columns.items():
        if column not in row:
            return BadRow(place, f"there is no {column!r}, only {_listed(row)}{_way_out(key)}")
    return TableRow({column: row[column] for column in columns.values()}, place)


def _csv_rows(lines: Iterable[str], where: str, form: str, columns: Mapping[str, str]) -> Iterator[TableRow | BadRow]:
    """The rows of a CSV file, which begins with a heading and has equally many cells in each row. In tab-separated
    values quotes have no meaning."""
    csv.field_size_limit(LONGEST_CELL)
    dialect: dict[str, Any] = {"strict": True} if form == "csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(iter(lines), **dialect)
    heading: list[str] | None = None
    while True:
        place = f"{where}, line {reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow(place, f"this is not CSV ({error})")
            continue
        if not row:
            continue  # a blank line
        if heading is None:
            heading = [name.removeprefix(BYTE_ORDER_MARK).strip() for name in row]
            _check_columns(heading, columns, place)
        elif len(row) != len(heading):
            yield BadRow(place, f"this row has {cells(row)}, but the heading has {cells(heading)}")
        else:
            yield TableRow({column: row[heading.index(column)] for column in columns.values()}, place)


def _parquet_rows(file: SourceFile, columns: Mapping[str, str]) -> Iterator[TableRow | BadRow]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as opened:
            _check_columns(opened.schema_arrow.names, columns, str(file.path))
            for batch in opened.iter_batches(ROWS, columns=list(columns.values())):
                for values in batch.to_pylist():
                    row += 1
                    yield TableRow(values, f"{file.path}, row {row}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise broken(file.path, error, row) from error


def _check_columns(there: Sequence[str], columns: Mapping[str, str], where: str) -> None:
    for key, column in columns.items():
        if there.count(column) != 1:
            how = "no" if column not in there else f"{there.count(column)} times the"
            raise InputError(f"{where}: there is {how} column {column!r}, only {_listed(there)}{_way_out(key)}")


def _way_out(key: str) -> str:
    """The advice for a missing column: name another one by a key of the config, if there is a config."""
    return f"; name one: dataset.{key}=NAME" if key else "; call the column so, as in the training data"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"
