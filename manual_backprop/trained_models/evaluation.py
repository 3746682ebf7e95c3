"""Evaluation of a trained model: its task, its metrics on a split, and logging them to its run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..common.errors import BadRowError, InputError, ManualBackpropError, RunInUseError, StorageError

if TYPE_CHECKING:
    from ..tasks import Measured, Task
    from .saved_model import Found, SavedModel


def open_trained_task(saved: SavedModel, test: str | None = None) -> Task:
    """The task that a model was trained on, with its examples; `test` replaces the test split of the run's config.
    Raises InputError if the examples are gone or differ from the run's."""
    from ..tasks import task_named

    config, cache = saved.config(), saved.found.outputs / "datasets"
    if test is not None:
        config = replace(config, dataset=replace(config.dataset, test=test))
    kind = task_named(config.task.name)
    try:
        task = kind.open(config, cache)
    except InputError as error:
        # The way out of a bad row is one for a run: it has keys.
        why = f"{error.row}. Correct it." if isinstance(error, BadRowError) else error
        raise InputError(
            f"What this run has learned from (dataset={config.dataset.name}) cannot be read any more: {why}"
        ) from error
    for tag, digest in task.digests.items():
        recorded, what = saved.state.get(tag), tag.removesuffix("_digest")
        if recorded != digest:
            name, path = task.source
            where = path or {"python_docs": "the documentation in this Python"}.get(name, name)
            raise InputError(
                f"{where} is not what this model was trained on: the {what}'s digest is {digest[:12]} now and was "
                f"{str(recorded)[:12]}. Evaluate where the old data is, or train on the new one."
            )
    return task


def restored_task(saved: SavedModel) -> Task:
    """The task that a model was trained on, for inference: it needs no examples."""
    from ..tasks import task_named

    kind = task_named(saved.task_name)
    return kind.restored(saved.config(), saved.found.checkpoint, saved.found.outputs / "datasets")


def measure(saved: SavedModel, task: Task, split: str, max_batches: int | None, predictions: int) -> Measured:
    """Measure a model on a split. Raises InputError if there is no such split."""
    try:
        return task.measure_split(saved.model, split, max_batches, predictions)
    except BadRowError as error:  # whose way out is one for a run, before its network is trained
        raise InputError(
            f"--split {split}: {error.row}. Every row of a split is measured: correct this one, or remove it, and give "
            "the result as --test PLACE."
        ) from error
    except InputError as error:
        raise InputError(f"--split {split}: {error}") from error


def metrics_of(measured: Measured, split: str) -> dict[str, float]:
    """The metrics by their logged names, which differ for a part of a split and for the whole."""
    group = "evaluation" if measured.whole else "evaluation_part"
    return {f"{group}/{split}_{name}": float(value) for name, value in measured.metrics.items()}


def log_evaluation(found: Found, step: int, tracking: str, metrics: dict[str, float]) -> str:
    """Add the values to the run's metrics, unless they are there already, and return a sentence about it, also about a
    failure: it does not change the result of the evaluation."""
    from ..tracking import MetricsFile, load_training_log
    from ..tracking.late_delivery import deliver_run
    from ..tracking.run_directory import own_run_directory

    if found.run is None:
        return "Not logged: the checkpoint is not in a run directory."
    try:
        run = own_run_directory(found.run)
        try:
            known = load_training_log(found.run).training
            if any(_value(known.get(name), step) != value for name, value in metrics.items()):
                file = MetricsFile(run.metrics)
                file.append(step, metrics)
                file.close()
        finally:
            run.release()
    except RunInUseError:
        return "Not logged: the run is still training and writes its own metrics."
    except (StorageError, InputError) as error:
        return f"Not logged: {error}"
    name = next(iter(metrics))
    logged = f"Logged to the run as {name.rpartition('_')[0]}_* at step {step}"
    if tracking != "mlflow":
        return f"{logged}."
    try:
        deliver_run(str(found.run), found.outputs)
    except ManualBackpropError as error:
        return f"{logged}. MLflow did not take it: {error}"
    except Exception as error:  # MLflow, its database and its server have many kinds of errors
        reason = " ".join(str(error).split())[:160]
        return f"{logged}. MLflow did not take it ({reason}); later: python -m manual_backprop.sync {found.run.name}"
    return f"{logged}, in metrics.jsonl and MLflow."


def _value(series: Any, step: int) -> float | None:
    return dict(zip(series.steps, series.values, strict=True)).get(step) if series is not None else None
