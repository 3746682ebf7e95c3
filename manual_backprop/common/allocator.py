"""Settings of glibc's allocator: keep the memory that a step frees for the next step, and return it at the end.

By default glibc returns large freed blocks to the system. The next step allocates the same sizes again, which costs a
page fault for each 4 KiB: a quarter of the time of a small step on a CPU.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

GLIBC = "libc.so.6"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGEST_ON_THE_HEAP = 32 << 20  # bytes: what mallopt allows at most
NEVER_TRIM = 2**31 - 1


def keep_freed_memory() -> None:
    """Keep freed memory in this process from now on. Does nothing with a C library other than glibc."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(GLIBC).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST_ON_THE_HEAP)
        mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)


def trim_freed_memory() -> None:
    """Return all freed memory to the system. Does nothing with a C library other than glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(GLIBC).malloc_trim(0)


def resident_bytes(entry: str) -> int | None:
    """This process's resident memory [bytes]: `VmRSS` is its current size, `VmHWM` its peak. None if unknown."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        if entry != "VmRSS":
            return None
        import psutil

        return int(psutil.Process().memory_info().rss)
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")), None)


def memory_below_peak() -> int | None:
    """The peak resident memory of this process minus its current one [bytes]; None if the system reports neither."""
    peak, now = resident_bytes("VmHWM"), resident_bytes("VmRSS")
    return None if peak is None or now is None else peak - now
