"""Keeping the memory that a step frees for the next step, which asks for the same again.

glibc gives freed memory back to the system above a threshold, and getting it again costs a page fault for each 4 KiB:
a quarter of the time of a small step on a CPU.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGEST_ON_THE_HEAP = 32 << 20  # bytes: what mallopt allows at most
NEVER_TRIM = 2**31 - 1


def keep_freed_memory() -> None:
    """For this process, from here on. Does nothing where the C library is another one."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_ON_THE_HEAP)
    mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)
