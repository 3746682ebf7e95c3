"""The name of this machine's processor, and which GPUs a process may use.

The driver is asked and not torch, whose import takes seconds.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, CUDA driver API


def cpu_fields() -> dict[str, str]:
    """What Linux says of the first processor: `model name`, `flags` and so on. Empty where there is no such file."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}


def processor() -> str:
    """Its name, as far as this system tells."""
    return cpu_fields().get("model name") or platform.processor() or platform.machine()


def compute_capabilities() -> list[tuple[int, int]]:
    """The compute capability of each GPU that a process may use (CUDA_VISIBLE_DEVICES counts), in order."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for ordinal in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        if (
            driver.cuDeviceGet(ctypes.byref(device), ordinal)
            or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
            or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        ):
            continue
        found.append((major.value, minor.value))
    return found
