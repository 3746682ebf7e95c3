"""run.log: what the program said in a run, with times; warnings reach the terminal too."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..common.durable_files import storage_errors
from ..common.plain_text import visible

PACKAGE = logging.getLogger("manual_backprop")


class _RunLog(logging.FileHandler):
    """Lines that a full disk refuses are missing there; the run does not end for them."""

    def handleError(self, record: logging.LogRecord) -> None: ...

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def run_log(path: Path) -> Iterator[None]:
    """Within it, everything that the package logs goes into the file. Raises StorageError."""
    with storage_errors(f"write {path}"):
        file = _RunLog(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = PACKAGE.level
    PACKAGE.addHandler(file)
    PACKAGE.setLevel(logging.INFO)
    try:
        yield
    finally:
        PACKAGE.removeHandler(file)
        PACKAGE.setLevel(before)
        file.close()


class _Visible(logging.Formatter):
    """A line may quote others' text, of which a terminal would obey a part."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), kept="\n\t")


def warnings_to_terminal() -> None:
    """Once a process: what the package warns of is a line on stderr, and nothing reaches the root logger."""
    if PACKAGE.handlers:
        return
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(_Visible("%(message)s"))
    # errors are told by the outermost frame, once
    terminal.addFilter(lambda record: record.levelno < logging.ERROR)
    PACKAGE.addHandler(terminal)
    PACKAGE.propagate = False
