"""The name of this machine's processor."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


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
