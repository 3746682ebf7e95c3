"""Bringing to MLflow what it did not take of a run while that went on, or what was added to the run later."""

from __future__ import annotations

from pathlib import Path

from manual_backprop.common.errors import InputError
from manual_backprop.tracking.mlflow_delivery import MlflowDelivery, without_credentials
from manual_backprop.tracking.run_directory import (
    RUNS,
    SWEEPS,
    close_dead_runs,
    find_run,
    list_runs,
    own_run_directory,
)
from manual_backprop.tracking.tracker import Tracked, outputs_of


def deliver_run(which: str, root: Path) -> str:
    """Deliver one run; return the sentence that says so. Raises ManualBackpropError, or what MLflow raises."""
    path = named_run(which, root)
    root = outputs_of(path, root)
    close_dead_runs(root)
    run = own_run_directory(path)
    try:
        experiment_name = Tracked.read(run.path).experiment_name
        delivery = MlflowDelivery(run.path, root)
        delivery.deliver(final=True)
        delivery.terminate_dead_runs()
        return f"{run.path} is delivered to {without_credentials(delivery.uri)}, experiment {experiment_name}"
    finally:
        run.release()


def named_run(which: str, root: Path) -> Path:
    """`last` is the newest start here, with or without a checkpoint: its metrics want to be delivered too."""
    if which != "last":
        path = find_run(root, which).path
        return outputs_of(path, root) / path.parent.name / path.name if path.parent.name in (RUNS, SWEEPS) else path
    runs = list_runs(root)
    if not runs:
        raise InputError(f"last: there is no run in {root.absolute() / 'runs'}")
    return runs[-1]
