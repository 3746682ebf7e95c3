"""The project's exceptions and their exit codes.

Jobs raise them; only the outermost frame of a command turns them into an exit code (`exit_code`). A message is a
sentence for the user: what was given, what was expected, what to do.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_NOT_FINITE = 3
EXIT_STORAGE = 4
EXIT_RANK_FAILED = 5
# Phrases in the messages of torch and numpy after an allocation has failed.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "could not create a memory object",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "failed to allocate",
)


class ManualBackpropError(Exception):
    """A failure that the user can act on. Its message is shown alone, without a traceback."""

    exit_code = EXIT_FAILED


class CheckFailedError(ManualBackpropError):
    """A check that the user asked for (verify, a sweep's job) did not pass."""


class InputError(ManualBackpropError, ValueError):
    """What the user gave cannot be used: a file, a token id, a shape, a length."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(InputError):
    """The configuration is wrong. `violations` holds one sentence for each mistake."""

    def __init__(self, violations: list[str]):
        self.violations = violations
        super().__init__("\n".join(violations))


class BadRowError(InputError):
    """A row of the data cannot be used. `row` says which and why, `way_out` what can be done about it in a run."""

    def __init__(self, row: object, way_out: str):
        self.row = str(row)
        super().__init__(f"{row}. {way_out}")


class CheckpointError(InputError):
    """A checkpoint is damaged, missing, or not one of this project's."""


class RunInUseError(InputError):
    """Another process owns the run directory."""


class OutOfMemory(ManualBackpropError):
    """The run needs more memory than the machine or its GPU has."""


class NotFiniteError(ManualBackpropError):
    """The loss or the gradient norm is not finite, and the run is configured to stop in that case."""

    exit_code = EXIT_NOT_FINITE


class StorageError(ManualBackpropError):
    """The run directory cannot be written, or the final save failed."""

    exit_code = EXIT_STORAGE


class ProcessFailed(ManualBackpropError):
    """Another process of the same training has failed or has ended."""

    exit_code = EXIT_RANK_FAILED


class Interrupted(ManualBackpropError):
    """A signal asked the run to stop; exit code 128 + signal, as shells expect."""

    def __init__(self, signal_number: int, message: str):
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        super().__init__(message)


def first_line(error: Exception) -> str:
    """The first line of an exception's message, at most 200 characters; its type if the message is empty."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)


@contextmanager
def memory_errors(what_to_do: Callable[[], str]) -> Iterator[None]:
    """Turn any exception for exhausted memory into an OutOfMemory with the message of `what_to_do`."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # their local variables keep the tensors alive
        raise OutOfMemory(what_to_do()) from error
