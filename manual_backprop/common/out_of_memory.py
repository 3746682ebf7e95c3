"""Memory that ran out, in one sentence with the way out. torch and numpy say it in a dozen ways."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import OutOfMemory

MESSAGES = (
    "can't allocate memory",
    "cannot allocate memory",
    "could not create a memory object",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "failed to allocate",
)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in MESSAGES)


@contextmanager
def memory_errors(batch_size: int) -> Iterator[None]:
    """Raises OutOfMemory in place of whatever says that memory ran out."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        lower = (
            f"lower training.batch_size={batch_size} and raise training.gradient_accumulation_steps as much, which "
            "trains the same, or choose a smaller"
            if batch_size > 1
            else "choose a smaller"
        )
        raise OutOfMemory(
            f"The memory is not enough for this run: {lower} model.max_seq_len or model. plan=true says how much a run "
            "needs."
        ) from error
