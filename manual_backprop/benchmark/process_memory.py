"""The memory of this process, as Linux and the GPU's allocator count it.

On a CPU: the largest resident size since it was reset (`VmHWM`, /proc/self/clear_refs) less the size after the imports,
so that parameters and moments count and Python does not. On a GPU: the largest sum of allocated tensors.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5), /proc/pid/clear_refs


def resident_bytes(entry: str) -> int | None:
    """`VmRSS`, the size now, or `VmHWM`, the largest; None where there is no such account."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(entry + ":")), None)


def reset_peak(device: torch.device) -> bool:
    """From here on the peak counts. False where it cannot be reset."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:  # another system, or a container that does not allow it
        return False
    return True


def peak_since_reset(device: torch.device, after_imports: int | None) -> int | None:
    """[bytes]; None where it cannot be measured."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    peak = resident_bytes("VmHWM")
    return None if peak is None or after_imports is None else peak - after_imports


def give_back_freed_memory() -> None:
    """What was freed so far, to the system: a step shall not be charged with what came before it. glibc alone."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
