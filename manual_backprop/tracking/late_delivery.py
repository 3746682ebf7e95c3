"""Delivery of a run that has ended: what MLflow did not receive during the run, or what was added later."""

from __future__ import annotations

from pathlib import Path

from ..common.errors import InputError
from .mlflow_delivery import MlflowDelivery, tracking_uri
from .mlflow_messages import where_to_look
from .run_directory import RUNS, SWEEPS, close_dead_runs, find_run, list_runs, own_run_directory, read_run
from .tracker import Tracked, outputs_of


def deliver_run(which: str, root: Path) -> str:
    """Deliver one run and return a sentence about it. Raises ManualBackpropError, and MLflow's exceptions."""
    path = named_run(which, root)
    root = outputs_of(path, root)
    close_dead_runs(root)
    run = own_run_directory(path)
    try:
        experiment_name = Tracked.read(run.path).experiment_name
        delivery = MlflowDelivery(run.path, root)
        delivery.deliver(final=True)
        delivery.terminate_dead_runs()
        where = f"{delivery.address}, experiment {experiment_name}"
        return f"{run.path} is delivered to {where}. {delivery.refusal_message()}".removesuffix(". ")
    finally:
        run.release()


def named_run(which: str, root: Path) -> Path:
    """The directory of a run. `last` is the newest one, even without a checkpoint, since it has metrics to deliver.
    Raises InputError."""
    if which != "last":
        path = find_run(root, which).path
        return outputs_of(path, root) / path.parent.name / path.name if path.parent.name in (RUNS, SWEEPS) else path
    runs = list_runs(root)
    if not runs:
        raise InputError(f"last: there is no run in {root.absolute() / 'runs'}")
    return runs[-1]


def next_in_mlflow(run: Path, purpose: str) -> str:
    """The command to see a run in MLflow; or, if MLflow does not have it, the command to deliver it."""
    root = outputs_of(run, run.parent.parent)
    place = where_to_look(tracking_uri(root), root, read_run(run).get("mlflow"))
    if place is None:
        return f"python -m manual_backprop.sync {run.name}   # MLflow does not have it yet"
    address = ": http://127.0.0.1:5000" * (not place.startswith("http"))
    return f"{place:<24} # {purpose}{address}"
