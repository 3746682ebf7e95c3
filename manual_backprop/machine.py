"""What a run needs and this machine lacks: a text, a run to go on with, a GPU. The driver is asked for GPUs, not torch,
whose import takes seconds.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from manual_backprop.config import RunConfig
from manual_backprop.errors import InputError
from manual_backprop.rules import shown

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, CUDA driver API


def missing_here(config: RunConfig) -> list[str]:
    """One sentence for each thing; the run is to start in the working directory."""
    violations = []
    paths = {"dataset.path": config.dataset.path, "tokenizer.path": config.tokenizer.path}
    if config.dataset.name in ("text", "jsonl", "parquet"):
        paths["dataset.test"] = config.dataset.test  # of others the name of a split
    for key, path in paths.items():
        if path is not None and not (os.path.isfile(place := Path(path).expanduser()) or os.path.isdir(place)):
            violations.append(f"{key}={shown(path)}: there is no such file or folder, seen from {Path.cwd()}")
    if config.resume not in (None, "last", "best"):  # for these two the checkpoints are read, by the run itself
        from manual_backprop.tracking.run_directory import find_run

        try:
            find_run(Path("outputs"), str(config.resume))
        except InputError as error:
            violations.append(f"resume={shown(config.resume)}: {' '.join(str(error).split())}")
    if config.device.name == "cuda":
        capabilities = compute_capabilities()
        if not capabilities:
            violations.append(
                "device=cuda: no NVIDIA GPU can be used on this machine; use device=cpu, or device=auto to take a GPU "
                "only where there is one"
            )
        elif config.precision.name.startswith("bf16") and capabilities[0] < (8, 0):
            violations.append(
                f"precision={config.precision.name}: this GPU (compute capability {capabilities[0][0]}."
                f"{capabilities[0][1]}) has no bfloat16, which came with 8.0; use precision=fp32"
            )
    return violations


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
