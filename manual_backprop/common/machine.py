"""Which machine this is, for whoever asks whether another process still lives: a machine may change its name."""

from __future__ import annotations

import re
from pathlib import Path

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
