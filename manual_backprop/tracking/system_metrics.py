"""Use of processor, memory and GPU during a run, under the names of MLflow's page "System metrics".

Sampled when the loop logs, at most once in `INTERVAL`, without a thread: it takes a fraction of a millisecond every ten
seconds. GPUs need nvidia-ml-py.
"""

from __future__ import annotations

import logging
import time
from typing import Any

INTERVAL = 10.0  # [s], as in MLflow

log = logging.getLogger(__name__)


class SystemMetrics:
    """`sample()` returns the current metrics, or nothing if the last sample is more recent than `INTERVAL`."""

    def __init__(self, gpu: bool = False):
        import psutil

        self._next = 0.0
        self._psutil = psutil
        self._process = psutil.Process()
        psutil.cpu_percent()  # the first call has nothing to compare with
        self._gpus = _nvidia_gpus() if gpu else []

    def sample(self) -> dict[str, float]:
        if time.monotonic() < self._next:
            return {}
        self._next = time.monotonic() + INTERVAL
        memory = self._psutil.virtual_memory()
        metrics = {
            "system/cpu_utilization_percentage": self._psutil.cpu_percent(),  # since the last sample
            "system/system_memory_usage_megabytes": memory.used / 1e6,
            "system/system_memory_usage_percentage": 100 * memory.used / memory.total,
            "system/process_memory_usage_megabytes": self._process.memory_info().rss / 1e6,
        }
        for number, gpu in enumerate(self._gpus):
            metrics |= _of_gpu(f"system/gpu_{number}", gpu)
        return metrics


def _nvidia_gpus() -> list[Any]:
    try:
        import pynvml
    except ImportError:
        log.info("nvidia-ml-py is not installed: the GPU's own metrics are not recorded.")
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        log.info("The GPU's own metrics are not recorded: %s", error)
        return []


def _of_gpu(name: str, gpu: Any) -> dict[str, float]:
    import pynvml

    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        return {
            f"{name}_utilization_percentage": pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
            f"{name}_memory_usage_megabytes": memory.used / 1e6,
            f"{name}_memory_usage_percentage": 100 * memory.used / memory.total,
            f"{name}_power_usage_watts": pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
        }
    except pynvml.NVMLError:  # some virtual GPUs do not support all queries
        return {}
