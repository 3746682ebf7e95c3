"""What can go wrong, and the exit code that it means.

Jobs raise these; only the outermost frame of a command turns them into an exit code (`exit_code`). A message is a
sentence for the person who reads it: what was given, what was expected, what to do.
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
# How torch and numpy say that memory ran out.
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
    """A failure that a user can read. Its message stands alone; no traceback is shown for it."""

    exit_code = EXIT_FAILED


class CheckFailedError(ManualBackpropError):
    """A check that the user asked for (verify, a sweep's job) did not pass."""


class InputError(ManualBackpropError, ValueError):
    """What the user gave cannot be used: a file, a token id, a shape, a length."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(InputError):
    """The configuration is wrong. `violations` holds one sentence for each thing that is."""

    def __init__(self, violations: list[str]):
        self.violations = violations
        super().__init__("\n".join(violations))


class CheckpointError(InputError):
    """A checkpoint is damaged, foreign or absent."""


class RunInUseError(InputError):
    """Another process owns the run directory."""


class OutOfMemory(ManualBackpropError):
    """The memory of the machine, or of its GPU, does not hold the run."""


class NotFiniteError(ManualBackpropError):
    """The loss or the gradient norm is not a finite number, and the run was told to end then."""

    exit_code = EXIT_NOT_FINITE


class StorageError(ManualBackpropError):
    """The run directory cannot be written, or the final save failed."""

    exit_code = EXIT_STORAGE


class ProcessFailed(ManualBackpropError):
    """Another process of the same training has failed, or is gone."""

    exit_code = EXIT_RANK_FAILED


class Interrupted(ManualBackpropError):
    """A signal asked the run to stop; exit code 128 + signal, as shells expect."""

    def __init__(self, signal_number: int, message: str):
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        super().__init__(message)


def first_line(error: Exception) -> str:
    """Of what somebody else's code raised: enough for one line of ours, and its kind where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)


@contextmanager
def memory_errors(what_to_do: Callable[[], str]) -> Iterator[None]:
    """Raises OutOfMemory, with the words of `what_to_do`, in place of whatever says that memory ran out."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # what they hold is the memory that is missing
        raise OutOfMemory(what_to_do()) from error
