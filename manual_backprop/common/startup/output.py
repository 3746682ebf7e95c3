"""Standard output and error whose reader may go: `| head -2`, a terminal that is closed, a disk that is full.

A command that only prints ends then, without a word (`OutputClosed`). A run, and whatever else has more to lose than
its lines, goes on without them: `with enduring_output():`. Standard error is endured by every command.
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

from manual_backprop.common.errors import StorageError

NOBODY_READS = (errno.EPIPE, errno.EIO, errno.ENXIO)  # a pipe; a terminal


class OutputClosed(BaseException):
    """Nobody reads any more what a command prints. No Exception: it passes through whoever catches these."""


class OutputFile(io.FileIO):
    """The raw end of a stream. Where nobody reads any more, the descriptor leads nowhere from then on, so that
    processes which share it, and the interpreter at its end, are spared as well."""

    endures = 0  # how many ask for that
    replaced: Any = None  # the stream that had the descriptor; it would close that if nothing kept it

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # a descriptor that does not wait, and a slow reader
                select.select([], [self], [])
            return written
        except OSError as error:
            gone = error.errno in NOBODY_READS
            if gone or not self.endures:
                leads_nowhere(self.fileno())
            if self.endures:
                return memoryview(data).nbytes
            if gone:
                raise OutputClosed from None
            raise StorageError(f"what this command prints cannot be written: {error.strerror}") from error


def leads_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def guard_streams() -> None:
    """Make `sys.stdout` and `sys.stderr` such streams, where they are streams of the process. A descriptor that was
    closed (`>&-`) leads nowhere; the next file that is opened would take its place otherwise."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            leads_nowhere(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(descriptor, "w", closefd=False))  # noqa: SIM115
        elif _raw(stream) is not None and not isinstance(_raw(stream), OutputFile):
            setattr(sys, name, _guarded(stream))
    if isinstance(raw := _raw(sys.stderr), OutputFile):
        raw.endures = 1


def endure_output() -> list[OutputFile]:
    """From here on nothing that is printed can fail."""
    guard_streams()
    guarded = [raw for raw in (_raw(sys.stdout), _raw(sys.stderr)) if isinstance(raw, OutputFile)]
    for raw in guarded:
        raw.endures += 1
    return guarded


@contextmanager
def enduring_output() -> Iterator[None]:
    """Within it nothing that is printed can fail."""
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
    """The same stream, with what is unwritten of it."""
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
