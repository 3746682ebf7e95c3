"""A disk of a few megabytes that really becomes full, for scripts that tests run.

It is a tmpfs in a mount namespace of its own: as root, or as an unprivileged user in a user namespace. If a container
forbids both, its /dev/shm is already a small tmpfs (64 MB by default), which is filled up to the wanted size.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from command_tools import PATIENCE, ROOT, environment

LARGEST_SHARED_MEMORY = 512 << 20  # [bytes]; a host's own is half of its memory, and is not ours to fill


def run_on_small_disk(script: str, folder: Path, megabytes: int) -> subprocess.CompletedProcess[str]:
    """Runs a Python script in a process; its `sys.argv[1]` is an empty directory on the small disk."""
    file, disk = folder / "on_small_disk.py", folder / "disk"
    file.write_text(textwrap.dedent(script))
    disk.mkdir()
    mount = f'mount -t tmpfs -o size={megabytes}m none "{disk}"'
    for flags in ("-m", "-rm"):
        if subprocess.run(["unshare", flags, "sh", "-c", mount], capture_output=True).returncode == 0:
            return _run(["unshare", flags, "sh", "-c", f'{mount} && exec "$@"', "sh", *_python(file, disk)])
    shared = Path("/dev/shm")
    total, _, free = shutil.disk_usage(shared)
    if total > LARGEST_SHARED_MEMORY:
        raise AssertionError(
            "this machine forbids mounting (unshare -m, unshare -rm), and /dev/shm is too large to fill"
        )
    disk = shared / f"manual_backprop-{os.getpid()}"
    disk.mkdir()
    try:
        with (disk / ".rest").open("wb") as rest:
            os.posix_fallocate(rest.fileno(), 0, max(1, free - (megabytes << 20)))
        (disk / "empty").mkdir()
        return _run(_python(file, disk / "empty"))
    finally:
        shutil.rmtree(disk)


def _python(file: Path, disk: Path) -> list[str]:
    return [sys.executable, str(file), str(disk)]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    given = environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=given)
