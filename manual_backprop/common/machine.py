"""What identifies this machine: its running kernel, its processor, and the GPUs that a process may use.

The kernel's boot id tells whether another process can still be alive; the host name may change. The GPUs come from the
driver: importing torch takes seconds.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, CUDA driver API

# Local file systems: only the running kernel writes them, so every lock on a file there is visible from here.
# Not listed: network file systems (nfs, cifs, lustre, ...), and what a virtual machine shares (9p, virtiofs, fuse).
LOCAL_FILE_SYSTEMS = "ext2 ext3 ext4 xfs btrfs zfs f2fs bcachefs jfs reiserfs nilfs2 overlay aufs tmpfs ramfs".split()  # noqa: SIM905


def boot_id() -> str | None:
    """The boot id of the running Linux kernel, the same in all its containers; None on other systems."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() or None
    except OSError:
        return None


def is_on_local_file_system(path: Path) -> bool:
    """Whether no other kernel can have `path` open. Then a lock on it that can be acquired has no other owner."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        real = path.resolve()
    except OSError:
        return False
    kind, longest = "", -1
    for mount in mounts:  # a later mount hides an earlier one
        fields, _, source = mount.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields.split()[4]))
        if real.is_relative_to(point) and len(point.parts) >= longest:
            kind, longest = source.split()[0], len(point.parts)
    return kind in LOCAL_FILE_SYSTEMS


def cpu_fields() -> dict[str, str]:
    """Linux's description of the first processor: `model name`, `flags` and so on. Empty on other systems."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}


def processor() -> str:
    """The processor's name, or its architecture if the system reports no name."""
    return cpu_fields().get("model name") or platform.processor() or platform.machine()


def compute_capabilities() -> list[tuple[int, int]]:
    """The compute capability of each GPU that this process may use (as CUDA_VISIBLE_DEVICES says), in order."""
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
        if not (
            driver.cuDeviceGet(ctypes.byref(device), ordinal)
            or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
            or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        ):
            found.append((major.value, minor.value))
    return found
