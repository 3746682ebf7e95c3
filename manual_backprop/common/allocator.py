"""Keeping the memory that a step frees for the next step, which asks for the same again; and giving it back at the end.

glibc gives freed memory back to the system above a threshold, and getting it again costs a page fault for each 4 KiB:
a quarter of the time of a small step on a CPU.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

GLIBC = "libc.so.6"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGEST_ON_THE_HEAP = 32 << 20  # bytes: what mallopt allows at most
NEVER_TRIM = 2**31 - 1


def keep_freed_memory() -> None:
    """For this process, from here on. Does nothing where the C library is another one."""
    try:
        mallopt = ctypes.CDLL(GLIBC).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_ON_THE_HEAP)
    mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)


def give_back_freed_memory() -> None:
    """All that was kept so far, to the system. Does nothing where the C library is another one."""
    try:
        ctypes.CDLL(GLIBC).malloc_trim(0)
    except (OSError, AttributeError):
        return


def resident_bytes(entry: str) -> int | None:
    """Of this process: `VmRSS`, its size now, or `VmHWM`, the largest; None where the system does not tell that."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        if entry != "VmRSS":
            return None
        import psutil

        return int(psutil.Process().memory_info().rss)
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")), None)


def below_the_peak() -> int | None:
    """How much less memory this process has now than it has had [bytes]; None where the system does not tell."""
    peak, now = resident_bytes("VmHWM"), resident_bytes("VmRSS")
    return None if peak is None or now is None else peak - now
