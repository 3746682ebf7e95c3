"""The peak memory of this process, as counted by Linux and by the GPU's allocator.

On a CPU it is the largest resident size since a reset (`VmHWM`, /proc/self/clear_refs) minus the size after the
imports, so that parameters and moments count and Python does not. On a GPU it is the largest sum of allocated tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...common.allocator import resident_bytes

if TYPE_CHECKING:
    import torch

CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5), /proc/pid/clear_refs


def reset_peak(device: torch.device) -> bool:
    """Resets the peak. Returns False if that is not possible."""
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
    """The peak since the reset [bytes]; None if it cannot be measured."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    peak = resident_bytes("VmHWM")
    return None if peak is None or after_imports is None else peak - after_imports
