"""The user's files: plain text, JSON lines, Parquet. Each is read once, in chunks."""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...common.errors import InputError
from ...common.uris import expanded
from .documents import BYTE_ORDER_MARK, BadRow, Document, FileSource, Row, SourceFile, files_below, unreadable

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger(__name__)

CHUNK = 2**20  # [bytes] of a text file read at once
LONGEST_LINE = 2**28  # [bytes] of JSON lines
ROWS = 1000  # of a Parquet file read at once

_ROWS_ENDINGS = (".jsonl", ".ndjson", ".parquet")  # a warning follows if such files are read as plain text
_PACKED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ", ".zst": b"\x28\xb5\x2f\xfd", ".zip": b"PK\x03\x04"}


def find_files(path: str | Path, kind: str, endings: tuple[str, ...] = ()) -> Iterator[SourceFile]:
    """The file `path` itself, or all files below it whose names have one of the endings, sorted.

    Hidden files and folders (with a leading dot) are ignored; a warning lists other files that are left out.
    Raises InputError.
    """
    root = expanded(path)
    if root.is_dir():
        below = list(files_below(root))
        found = [file for file in below if not endings or file.name.lower().endswith(endings)]
        kept = set(found)
        others = [file.relative_to(root).as_posix() for file in below if file not in kept]
        ending = " or ".join(endings)
        wanted = f" whose name ends in {ending}" if endings else ""
        if not found:
            only = f", only {_listed(others, 3)}" if others else ""
            raise InputError(
                f"dataset.path={path}: this folder holds no file{wanted} that can be read (hidden ones are ignored)"
                f"{only}. Give a file or a folder with {kind}."
            )
        if others:
            _warn(
                f"{path}: {len(others)} of {len(below)} files left out, since their names do not end in {ending}: "
                f"{_listed(others, 3)}"
            )
        yield from (SourceFile(file.relative_to(root).as_posix(), file) for file in found)
    elif root.exists():
        _check_unpacked(root)
        yield SourceFile(root.name, root)
    else:
        raise InputError(f"dataset.path={path}: there is no such file or folder. Give an existing one with {kind}.")


def _check_unpacked(path: Path) -> None:
    beginning = _PACKED.get(path.suffix.lower())
    if beginning and path.is_file():
        with path.open("rb") as file:
            if file.read(len(beginning)) == beginning:
                raise InputError(f"{path} is compressed: unpack it, and give the unpacked file.")


@cache  # a run opens its text more than once
def _warn(message: str) -> None:
    log.warning("%s", message)


class TextFiles(FileSource):
    """UTF-8 text: each file is one document, whatever its suffix.

    A byte order mark is removed; line ends and NUL characters are kept.
    """

    version = "text 1"

    def __init__(self, path: str | Path):
        super().__init__(find_files(path, "UTF-8 text"))
        rows = [file.name for file in self.files if file.name.lower().endswith(_ROWS_ENDINGS)]
        if rows:
            _warn(
                f"{path}: read as plain text, each file as one document, not row by row: {_listed(rows, 3)}. "
                "To read rows, use dataset=jsonl or dataset=parquet."
            )

    def rows(self) -> Iterator[Row]:
        for file in self.files:
            yield Document(file.name, read_utf8(file.path), str(file.path))


def read_utf8(path: Path) -> Iterator[str]:
    """A file's text in pieces. Raises BadRow with the line and the position of the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, lines, first = 0, 1, True
    try:
        with path.open("rb") as file:
            while True:
                chunk = file.read(CHUNK)
                try:
                    text = decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    bad = position + len(chunk) - len(error.object) + error.start
                    line = lines + error.object[: error.start].count(b"\n")
                    raise BadRow(
                        f"{path}, line {line}",
                        f"byte {bad} of the file is 0x{error.object[error.start]:02x}, which is not UTF-8 "
                        f"({error.reason})",
                    ) from error
                position, lines = position + len(chunk), lines + text.count("\n")
                if text:
                    yield text.removeprefix(BYTE_ORDER_MARK) if first else text
                    first = False
                if not chunk:
                    return
    except OSError as error:
        raise unreadable(path, error) from error


class ColumnFiles(FileSource):
    """Files of rows, whose `column` is a document."""

    kind: tuple[str, tuple[str, ...]]  # what the files hold, and how their names end

    def __init__(self, path: str | Path, column: Any, key: str = "text_column"):
        """`key` is the config key that sets `column`, for messages."""
        super().__init__(find_files(path, *self.kind))
        self.column, self.key = column, key

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"column": self.column}


class JsonLines(ColumnFiles):
    """One JSON object per line, whose `column` is a document. Blank lines are ignored."""

    version = "jsonl 1"
    kind = "JSON lines", (".jsonl", ".ndjson", ".json")

    def rows(self) -> Iterator[Row]:
        for source in self.files:
            rows = 0
            for number, line in enumerate(self._lines(source.path), 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    rows += 1
                    where = f"{source.path}, line {number}"
                    array = rows == 1 and line.lstrip().startswith(b"[")
                    yield self._array(where) if array else self._row(line, f"{source.name}:{number}", where)

    def _lines(self, path: Path) -> Iterator[bytes]:
        try:
            with path.open("rb") as file:
                while line := file.readline(LONGEST_LINE):
                    yield line
        except OSError as error:
            raise unreadable(path, error) from error

    def _array(self, where: str) -> BadRow:
        return BadRow(
            where,
            f"this begins a JSON array; write one object per line, each with its {self.column!r}, without brackets",
        )

    def _row(self, line: bytes, name: str, where: str) -> Row:
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            return BadRow(where, f"the line is longer than {LONGEST_LINE // 2**20} MB; is this JSON lines?")
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return BadRow(where, f"byte {error.start} of the line is 0x{line[error.start]:02x}, which is not UTF-8")
        except (RecursionError, ValueError) as error:
            return not_json(where, error)
        if not isinstance(row, dict):
            return BadRow(where, f"expected an object with a {self.column!r}, but this is {_kind(row)}")
        outer, _, inner = self.column.partition(".")
        if self.column not in row and isinstance(row.get(outer), dict) and inner in row[outer]:
            row = {self.column: row[outer][inner]}
        if self.column not in row:
            return BadRow(where, f"there is no {self.column!r}, only {_listed(row)}; name one: dataset.{self.key}=NAME")
        return row_of(row[self.column], name, where, self.column)


class ParquetFiles(ColumnFiles):
    """Rows of Parquet files, whose `column` is a document."""

    version = "parquet 1"
    kind = "Parquet", (".parquet",)

    def rows(self) -> Iterator[Row]:
        import pyarrow
        import pyarrow.parquet

        for source in self.files:
            row = 0
            try:
                with pyarrow.parquet.ParquetFile(source.path) as file:
                    check_column(file.schema_arrow, self.column, str(source.path), self.key)
                    for batch in file.iter_batches(ROWS, columns=[self.column]):
                        column = inner_column(batch.column(0), self.column)
                        yield from rows_of(column, source.name, str(source.path), row, self.column)
                        row += batch.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                raise broken(source.path, error, row) from error


# Rows as values


def inner_column(column: pyarrow.Array, name: str) -> pyarrow.Array:
    """The column itself, or its inner field for a nested name `outer.inner`, such as `translation.en` on the hub."""
    import pyarrow.compute
    import pyarrow.types

    if not pyarrow.types.is_struct(column.type):
        return column
    return pyarrow.compute.struct_field(column, name.partition(".")[2])


def row_of(value: Any, name: str, where: str, column: str) -> Row:
    if not isinstance(value, str):
        return BadRow(where, f"{column!r} should be text but is {_kind(value)}")
    return Document(name, (value,), where)


def rows_of(column: pyarrow.Array, name: str, where: str, first: int, title: str) -> Iterator[Row]:
    """The values of a column, text or null, as rows; the first has the index `first`, from 0."""
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = [value_of(scalar) for scalar in column]
    for number, value in enumerate(values, first + 1):
        place = f"{where}, row {number}"
        if isinstance(value, UnicodeDecodeError):
            yield BadRow(place, f"{title!r} is not UTF-8 (byte {value.start})")
        else:
            yield row_of(value, f"{name}:{number}", place, title)


def value_of(scalar: Any) -> Any:
    """The Python value of a scalar; for a text that is not UTF-8, the UnicodeDecodeError."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def not_json(where: str, error: ValueError | RecursionError) -> BadRow:
    if isinstance(error, json.JSONDecodeError):
        return BadRow(where, f"this is not JSON ({error.msg.removesuffix(' at')} at column {error.colno})")
    return BadRow(where, f"this is not JSON that can be read ({error})")


def broken(path: Path, error: Exception, row: int | None = None) -> InputError:
    """The error for a Parquet file of which `row` rows could be read."""
    read = "" if row is None else f"; it could be read up to row {row}"
    return InputError(
        f"{path} is damaged or not a Parquet file{read} ({brief(error)}). Get the whole file again, or move it away."
    )


def cells(row: Sized) -> str:
    return "1 cell" if len(row) == 1 else f"{len(row)} cells"


def brief(error: Exception) -> str:
    """The message of a library's exception, shortened to one line."""
    return " ".join(str(error).split())[:200].rstrip(".")


def no_column(where: str, column: str, columns: Iterable[str], key: str = "text_column") -> InputError:
    return InputError(
        f"{where} has no column {column!r}, only {_listed(columns)}. Name the one with the text: dataset.{key}=NAME."
    )


def check_column(schema: pyarrow.Schema, column: str, where: str, key: str = "text_column") -> None:
    """Raise InputError unless the column exists and holds text. `outer.inner` names a field of a nested column."""
    import pyarrow
    import pyarrow.types as types

    outer = column.partition(".")[0]
    if column not in schema.names and outer in schema.names and types.is_struct(schema.field(outer).type):
        parts = schema.field(outer).type
        schema = pyarrow.schema(
            [parts.field(place).with_name(f"{outer}.{parts.field(place).name}") for place in range(parts.num_fields)]
        )
    if column not in schema.names:
        raise no_column(where, column, schema.names, key)
    if schema.names.count(column) > 1:
        raise InputError(
            f"{where} has {schema.names.count(column)} columns named {column!r}, and it is not clear which one is "
            f"meant: rename all but one, or name another column with text: dataset.{key}=NAME."
        )
    kind = schema.field(column).type
    tests: tuple[Callable[[Any], bool], ...] = (types.is_string, types.is_large_string, types.is_string_view)
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not any(test(kind) for test in tests):
        raise InputError(
            f"{where}: the column {column!r} holds {kind}, not text. Name the one with the text: "
            f"dataset.{key}=NAME, of {_listed(schema.names)}."
        )


def _listed(names: Any, most: int = 10) -> str:
    names = [repr(str(name)) for name in names]
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join(names[:most] + more) or "nothing"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value!r}"[:60]
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return "text" if isinstance(value, str) else type(value).__name__
