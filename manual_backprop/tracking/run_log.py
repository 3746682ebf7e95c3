"""run.log: the log messages of a run with times; warnings also go to the terminal."""

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
    """A log file whose failed writes are ignored: a full disk must not end the run."""

    def handleError(self, record: logging.LogRecord) -> None: ...

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def run_log(path: Path) -> Iterator[None]:
    """Write all log messages of the package into a file within this context. Raises StorageError."""
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
    """Shows control characters as escapes, since a message may quote foreign text."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), kept="\n\t")


def warnings_to_terminal() -> None:
    """Print the package's warnings to stderr and detach it from the root logger; call this once in a process."""
    if PACKAGE.handlers:
        return
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(_Visible("%(message)s"))
    # the outermost frame prints errors
    terminal.addFilter(lambda record: record.levelno < logging.ERROR)
    PACKAGE.addHandler(terminal)
    PACKAGE.propagate = False
