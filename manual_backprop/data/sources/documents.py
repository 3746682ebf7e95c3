"""What a source of text is: something that is identified cheaply, and read document by document.

`identity` is what a cache is asked for before anything is parsed; `documents` reads, once and in order, and says of
every row that is no text where it stands and why. The kinds of sources are in `python_docs`, `files` and `hub`; tokens
are not this module's business.
"""

import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...common.errors import InputError


@dataclass(frozen=True)
class Document:
    """One text. A long one comes in `pieces`, which can be read once; reading them may raise BadRow."""

    name: str
    pieces: Iterable[str]
    where: str = ""  # for messages: the file and the line

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class BadRow(Exception):
    """A row that is no text: where it stands, and why."""

    def __init__(self, where: str, reason: str):
        self.where, self.reason = where, reason
        super().__init__(f"{where}: {reason}")


Row = Document | BadRow


def no_utf8(where: str, error: UnicodeEncodeError) -> BadRow:
    half = repr(error.object[error.start])
    return BadRow(
        where, f"the text has half of a surrogate pair ({half}) at position {error.start}, which no UTF-8 can hold"
    )


class Source(ABC):
    """Where documents come from."""

    notes: list[str]  # what a reader of the run must know about how this source was read

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON that names the data: the same identity, the same documents."""

    @abstractmethod
    def documents(self) -> Iterator[Row]:
        """The documents to train on, or, where there is no `validation_documents`, all of them."""

    def validation_documents(self) -> Iterator[Row] | None:
        """The documents of a validation split that comes with the data; None: a part of `documents` is to validate."""
        return None

    @abstractmethod
    def check_unchanged(self) -> None:
        """Called when the documents have been read: InputError where they changed meanwhile."""


@dataclass(frozen=True)
class SourceFile:
    name: str  # relative to the folder that was asked for, with forward slashes; a single file's last part
    path: Path
    status: tuple[int, int] = field(init=False)  # size and time of the last change, when it was first seen

    def __post_init__(self) -> None:
        now = self.path.stat()
        if not stat.S_ISREG(now.st_mode):  # a named pipe would be waited for without an end
            raise InputError(
                f"{self.path} is no regular file (but a named pipe, a socket or a device), and only those can be read: "
                "move it away, or give a file or a folder of files."
            )
        object.__setattr__(self, "status", (now.st_size, now.st_mtime_ns))

    def status_now(self) -> tuple[int, int]:
        now = self.path.stat()
        return now.st_size, now.st_mtime_ns


class FileSource(Source):
    """Files, identified by the names and bytes of all of them. Subclasses say what documents are in them."""

    version: str  # raised whenever other documents are made of the same bytes

    def __init__(self, files: Iterable[SourceFile]):
        self.notes = []
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
        for file in self.files:
            if file.status_now() != file.status:
                raise InputError(f"{file.path} changed while it was being read. Start again when nothing writes to it.")


def files_below(
    root: Path, foreign: Callable[[str], bool] = lambda folder: False, follow_links: bool = True
) -> Iterator[Path]:
    """Every file below a folder in an order that depends on names only, without hidden and foreign ones.

    Where links to folders are followed, one that can be reached in several ways is visited once: no loop is endless.
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
