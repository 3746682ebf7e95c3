"""What the last bits of a run depend on beside its config and its data: threads, torch, processor, compiler, code."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models.network import Network


def circumstances(network: Network) -> dict[str, Any]:
    """Of a network in this process, as it is now: every checkpoint and every run.json has them."""
    import torch

    device = network.device
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "compiled": network.compiles,
    }


def differing(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not as it was: "threads: 2 then, 1 now"."""
    return [f"{name}: {then.get(name)} then, {value} now" for name, value in now.items() if then.get(name) != value]


def code_digest() -> str:
    """SHA-256 of the sources of this package: what a commit does not tell of a changed checkout, or of a wheel."""
    folder = Path(__file__).resolve().parent
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def processor() -> str:
    """Its name, as far as this system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
