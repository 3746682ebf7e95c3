"""Tracking: the files that record a run, and their delivery to MLflow.

    run_directory.py    a run's directory: name, owner, status, lock; finding runs
    run_log.py          run.log, and warnings on the terminal
    progress.py         the progress line on the terminal
    metrics_file.py     metrics.jsonl, the append-only source of truth, and its schema
    training_log.py     TrainingLogger and load_training_log, which also work without the Runner
    tracker.py          the Tracker that the loop calls; LocalTracker (tracking=none)
    system_metrics.py   use of processor, memory and GPU
    mlflow_tracking.py  MlflowTracker: a thread that delivers the run directory to MLflow
    mlflow_messages.py  messages about MLflow: reasons, remedies, addresses without secrets
    mlflow_delivery.py  the delivery itself, for that thread and for `python -m manual_backprop.sync`
    late_delivery.py    the same for a run that has ended
    mlflow_model.py     a run's best checkpoint as MLflow's model
    provenance.py       the code of a run: commit, changes, packages
    environment.py      what determines the exact bits of a run: threads, torch, processor, compiler, code

    close_dead_runs("outputs")
    run = create_run_directory("outputs", "small-python_docs")
    tracker = open_tracker("mlflow", run, root="outputs", experiment_name="manual_backprop", run_name="small")
    tracker.log(step, {"train/loss": 3.2})
    tracker.finish("FINISHED")
    run.release()

Importing this imports neither MLflow nor torch nor Hydra.
May import: data and below.
"""

from __future__ import annotations

from pathlib import Path

from ..common.errors import InputError
from .metrics_file import MetricsFile
from .run_directory import (
    FAILED,
    FINISHED,
    KILLED,
    RUNNING,
    FoundRun,
    RunDirectory,
    close_dead_runs,
    create_run_directory,
    end_run,
    find_run,
    list_runs,
    open_run_directory,
)
from .system_metrics import SystemMetrics
from .tracker import Dataset, LocalTracker, Tracker
from .training_log import LogReader, Series, TrainingLog, TrainingLogger, flatten, load_training_log


def open_tracker(
    name: str,
    run: RunDirectory,
    root: str | Path,
    experiment_name: str,
    run_name: str,
    metrics_length: int | None = None,
) -> Tracker:
    """The tracker of `tracking=name` (mlflow, none) for a run that this process owns; `root` is the outputs directory.

    `metrics_length` [bytes] is the length of metrics.jsonl at the checkpoint from which the run resumes, as returned by
    `Tracker.sync`; None for a new run. A resumed run continues its MLflow run, whose id is in run.json. Does not wait
    for MLflow. Raises StorageError, InputError.
    """
    if name == "none":
        return LocalTracker(run.path, experiment_name, run_name, metrics_length)
    if name == "mlflow":
        from .mlflow_tracking import MlflowTracker

        return MlflowTracker(run.path, Path(root), experiment_name, run_name, metrics_length)
    raise InputError(f"tracking={name!r}: expected mlflow or none")


__all__ = [
    "FAILED",
    "FINISHED",
    "KILLED",
    "RUNNING",
    "Dataset",
    "FoundRun",
    "LocalTracker",
    "LogReader",
    "MetricsFile",
    "RunDirectory",
    "Series",
    "SystemMetrics",
    "Tracker",
    "TrainingLog",
    "TrainingLogger",
    "close_dead_runs",
    "create_run_directory",
    "end_run",
    "find_run",
    "flatten",
    "list_runs",
    "load_training_log",
    "open_run_directory",
    "open_tracker",
]
