"""Bringing to MLflow what it did not take of a run while that went on, or what was added to the run later."""

from __future__ import annotations

from pathlib import Path

from manual_backprop.common.errors import InputError
from manual_backprop.tracking.mlflow_delivery import MlflowDelivery, tracking_uri
from manual_backprop.tracking.mlflow_messages import where_to_look, without_credentials
from manual_backprop.tracking.run_directory import (
    RUNS,
    SWEEPS,
    close_dead_runs,
    find_run,
    list_runs,
    own_run_directory,
    read_run,
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
        where = f"{without_credentials(delivery.uri)}, experiment {experiment_name}"
        return f"{run.path} is delivered to {where}. {delivery.what_is_refused()}".removesuffix(". ")
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


def next_in_mlflow(run: Path, purpose: str) -> str:
    """What to type to see a run there; or, where it has not arrived, to bring it there."""
    root = outputs_of(run, run.parent.parent)
    place = where_to_look(tracking_uri(root), root, read_run(run).get("mlflow"))
    if place is None:
        return f"python -m manual_backprop.sync {run.name}   # MLflow has not taken it"
    address = ": http://127.0.0.1:5000" * (not place.startswith("http"))
    return f"{place:<24} # {purpose}{address}"
