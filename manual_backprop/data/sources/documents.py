"""The interface of a source of text: it has an identity that is cheap to compute, and yields rows, such as documents.

`identity` is the key of a cache and needs no parsing. `rows` reads once and in order; for a row that is not text it
gives the place and the reason. The kinds of sources are in `python_docs`, `files` and `hub`; sources of labelled texts
are in `labelled`, those of pairs in `pairs`. Not here: tokens.
"""

import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ...common.errors import InputError

BYTE_ORDER_MARK = "\ufeff"
T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """One text, in pieces. The pieces can be read only once; reading them may raise BadRow."""

    name: str
    pieces: Iterable[str]
    where: str = ""  # for messages: the file and the line

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class BadRow(Exception):
    """A row that is not valid text: its place and the reason."""

    def __init__(self, where: str, reason: str):
        self.where, self.reason = where, reason
        super().__init__(f"{where}: {reason}")


Row = Document | BadRow


def not_utf8(where: str, error: UnicodeEncodeError) -> BadRow:
    half = repr(error.object[error.start])
    return BadRow(
        where, f"the text has half of a surrogate pair ({half}) at position {error.start}, which UTF-8 cannot encode"
    )


class Source(ABC, Generic[T]):
    """A source of rows: documents, labelled texts, or pairs of texts."""

    notes: Sequence[str] = ()  # for the run's log: what was unusual when this source was read

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """A JSON value that identifies the data: equal identities mean equal rows."""

    @abstractmethod
    def rows(self) -> Iterator[T | BadRow]:
        """The training rows; all rows if `validation_rows` is None."""

    def validation_rows(self) -> Iterator[T | BadRow] | None:
        """The rows of the data's own validation split; None if a part of `rows` is used for validation."""
        return None

    def check_unchanged(self) -> None:
        """Called after reading. Raises InputError if the rows have changed meanwhile: those of files may."""


@dataclass(frozen=True)
class SourceFile:
    name: str  # path relative to the given folder, with forward slashes; a single file's name
    path: Path
    status: tuple[int, int] = field(init=False)  # size and modification time when it was first seen

    def __post_init__(self) -> None:
        now = self.path.stat()
        if not stat.S_ISREG(now.st_mode):  # reading a named pipe could block forever
            raise InputError(
                f"{self.path} is not a regular file (but a named pipe, a socket or a device) and cannot be read: "
                "move it away, or give a file or a folder of files."
            )
        object.__setattr__(self, "status", (now.st_size, now.st_mtime_ns))


class Files:
    """Files that are read, identified by their names and bytes."""

    version: str  # changed whenever the same bytes would give other rows

    def __init__(self, files: Iterable[SourceFile]):
        try:
            self.files = list(files)
        except OSError as error:
            raise unreadable(error.filename, error) from error

    def identity(self) -> dict[str, Any]:
        total = hashlib.sha256()
        for source in self.files:
            total.update(hashlib.sha256(source.name.encode("utf-8", "surrogateescape")).digest())
            try:
                with source.path.open("rb") as file:
                    total.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise unreadable(source.path, error) from error
        return {"kind": self.version, "sha256": total.hexdigest()}

    def check_unchanged(self) -> None:
        """Raises InputError if a file has changed since it was found."""
        for file in self.files:
            now = file.path.stat()
            if (now.st_size, now.st_mtime_ns) != file.status:
                raise InputError(f"{file.path} changed while it was being read. Start again when nothing writes to it.")


class FileSource(Files, Source[Document]):
    """A source of files. Subclasses read the documents in them."""


def files_below(
    root: Path, foreign: Callable[[str], bool] = lambda folder: False, follow_links: bool = True
) -> Iterator[Path]:
    """Every file below a folder, in an order that depends on names only, without hidden files and `foreign` folders.

    A folder that several links lead to is visited once, so that a cycle of links ends.
    """
    visited: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=_refuse, followlinks=follow_links):
        place = os.path.realpath(folder)
        if place in visited:
            folders.clear()
            continue
        visited.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not foreign(name))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(folder, name)


def _refuse(error: OSError) -> None:
    raise unreadable(error.filename, error) from error


def unreadable(path: object, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read ({error.strerror or error}); make it readable or move it away.")
