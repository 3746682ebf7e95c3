"""Which machine this is: its kernel, for whoever asks whether another process still lives (a machine may change its
name), its processor, and which GPUs a process may use, of which the driver is asked and not torch, whose import takes
seconds.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, CUDA driver API

# File systems that only the running kernel writes: who locked a file there, under whatever name, is seen from here.
# Not listed: what reaches over a network (nfs, cifs, lustre, ...) or into a virtual machine (9p, virtiofs, fuse).
OF_ONE_KERNEL = "ext2 ext3 ext4 xfs btrfs zfs f2fs bcachefs jfs reiserfs nilfs2 overlay aufs tmpfs ramfs".split()  # noqa: SIM905


def boot_id() -> str | None:
    """Of the running kernel, which all its containers share; None where there is none (other systems than Linux)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() or None
    except OSError:
        return None


def is_of_one_kernel(path: Path) -> bool:
    """Whether no other kernel can have `path` open: then a lock on it that can be taken has no owner any more."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        real = path.resolve()
    except OSError:
        return False
    kind, longest = "", -1
    for mount in mounts:  # a later one lies over an earlier one
        fields, _, source = mount.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields.split()[4]))
        if real.is_relative_to(point) and len(point.parts) >= longest:
            kind, longest = source.split()[0], len(point.parts)
    return kind in OF_ONE_KERNEL


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
