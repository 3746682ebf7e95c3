"""Standard output and error that can fail: `| head -2`, a closed terminal, a full disk.

A command that only prints ends then without a message (`OutputClosed`). A run, or any command whose work matters more
than its output, continues without printing: `with enduring_output():`. A failed standard error never ends a command.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import StorageError

READER_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)  # a pipe; a terminal


class OutputClosed(BaseException):
    """The reader of the command's output is gone. A BaseException, so that `except Exception` does not catch it."""


class OutputFile(io.FileIO):
    """The raw file of a stream. Once its reader is gone, the descriptor is redirected to the null device, so that child
    processes that share it and the interpreter's own exit do not fail either."""

    endures = 0  # how many contexts want failed writes to be ignored
    replaced: Any = None  # the stream that had the descriptor, kept alive: it closes the descriptor when deleted

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # a non-blocking descriptor whose reader is slow
                select.select([], [self], [])
            return written
        except OSError as error:
            gone = error.errno in READER_GONE
            if gone or not self.endures:
                redirect_to_null(self.fileno())
            if self.endures:
                return memoryview(data).nbytes
            if gone:
                raise OutputClosed from None
            raise StorageError(f"what this command prints cannot be written: {error.strerror}") from error


def redirect_to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def guard_streams() -> None:
    """Let `sys.stdout` and `sys.stderr` write through an OutputFile, if they are the process's own streams. A closed
    descriptor (`>&-`) is redirected to the null device; otherwise the next opened file would get its number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            redirect_to_null(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(descriptor, "w", closefd=False))  # noqa: SIM115
        elif _raw(stream) is not None and not isinstance(_raw(stream), OutputFile):
            setattr(sys, name, _guarded(stream))
    if isinstance(raw := _raw(sys.stderr), OutputFile):
        raw.endures = 1


def endure_output() -> list[OutputFile]:
    """Ignore failed writes to standard output and error from now on."""
    guard_streams()
    guarded = [raw for raw in (_raw(sys.stdout), _raw(sys.stderr)) if isinstance(raw, OutputFile)]
    for raw in guarded:
        raw.endures += 1
    return guarded


@contextmanager
def enduring_output() -> Iterator[None]:
    """Ignore failed writes to standard output and error within this context."""
    guarded = endure_output()
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for raw in guarded:
            raw.endures -= 1


def _raw(stream: Any) -> io.FileIO | None:
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(stream, io.TextIOWrapper) and isinstance(raw, io.FileIO) else None


def _guarded(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """A stream with the same settings that writes through an OutputFile."""
    stream.flush()
    raw = OutputFile(stream.fileno(), "w", closefd=False)
    raw.replaced = stream
    unbuffered = isinstance(stream.buffer, io.FileIO)  # python -u
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
