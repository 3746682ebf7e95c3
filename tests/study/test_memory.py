"""Freed memory is kept for the next step, and given back when it is no longer needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

GLIBC_ONLY = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc and /proc")
SCRIPT = """
from manual_backprop.common.allocator import memory_below_peak, trim_freed_memory, keep_freed_memory
keep_freed_memory()
step = [bytearray(b"x" * 2**20) for _ in range(100)]
del step
kept = memory_below_peak()
trim_freed_memory()
print(kept, memory_below_peak())
"""


@GLIBC_ONLY
def test_what_is_freed_is_kept_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    kept, given_back = map(int, done.stdout.split())
    assert kept < 10 * 2**20
    assert 95 * 2**20 < given_back < 120 * 2**20
