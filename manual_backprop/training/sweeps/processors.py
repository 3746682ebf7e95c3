"""How many jobs of a sweep run at once, and how many threads each of them may have."""

import os
from collections.abc import Mapping
from typing import Any


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def jobs_at_once(launcher: Mapping[str, Any], n_jobs: int) -> int:
    """How many jobs the launcher runs at once on this machine. `launcher` is its config in Hydra, `n_jobs` the number
    of all jobs."""
    target = str(launcher.get("_target_"))
    if target.endswith("JoblibLauncher"):
        wanted = int(launcher.get("n_jobs") or 1)
        wanted = wanted if wanted > 0 else max(1, cores() + 1 + wanted)  # -1: as many as there are cores
    elif target.endswith("submitit_launcher.LocalLauncher"):
        wanted = n_jobs  # it starts them all
    else:
        wanted = 1
    return max(1, min(wanted, n_jobs))


def threads_of_a_job(launcher: Mapping[str, Any], n_jobs: int) -> int | None:
    """The number of threads of a job. None leaves it to torch: the job has its machine, or its share of a cluster,
    alone."""
    at_once = jobs_at_once(launcher, n_jobs)
    if at_once > 1:
        return max(1, cores() // at_once)
    return launcher.get("cpus_per_task")
