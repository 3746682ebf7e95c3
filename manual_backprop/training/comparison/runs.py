"""Compares finished runs: their settings that differ, their final losses, and the largest difference of their curves.

Reads run directories only: no MLflow, no torch. `compare` prints it, and a sweep does for its own runs at its end.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from manual_backprop.common.columns import columns
from manual_backprop.config.schema import RunConfig, model_sizes
from manual_backprop.config.validation import with_defaults
from manual_backprop.tracking import FINISHED, TrainingLog, flatten

LOSS = "validation/loss"
LOSSES = ("train/loss", LOSS)
ALIKE = ("implementation", "kernels", "device", "device.threads")  # must not change the result
NO_SETTING = ("run_name", "experiment_name", "resume", "plan")


class Metric(NamedTuple):
    """A metric that ranks runs by its last value."""

    name: str = LOSS
    highest_is_best: bool = False

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> "Metric":
        """The main metric of a run (`run.json`), which chooses its best checkpoint."""
        return cls(str(run.get("best_metric") or LOSS), run.get("best_is_highest") is True)

    @classmethod
    def shared(cls, metrics: Iterable["Metric"]) -> "Metric":
        """What ranks runs with these main metrics: the one that all have; the validation loss if they differ."""
        different = set(metrics)
        return different.pop() if len(different) == 1 else cls()

    @property
    def title(self) -> str:
        """validation accuracy"""
        return self.name.replace("/", " ").replace("_", " ")

    def sort_key(self, value: float | None) -> float:
        """Sorts the best value first, and one that is missing last."""
        return math.inf if value is None else -value if self.highest_is_best else value

    def shown(self, value: float | None) -> str:
        """The value with the digits of a table; empty if it is missing."""
        return "" if value is None else f"{value:.4f}" if self.name == LOSS else f"{value:.4g}"


@dataclass(frozen=True)
class Compared:
    """A run in a comparison."""

    log: TrainingLog
    settings: Mapping[str, Any]  # that differ between the runs, as typed on a command line

    @property
    def label(self) -> str:
        return in_words(self.settings) or self.log.path.name

    @property
    def status(self) -> str:
        """The run's status; empty for the directory of a TrainingLogger, which has none."""
        return str(self.log.run.get("status", FINISHED))

    @property
    def main_metric(self) -> Metric:
        return Metric.of(self.log.run)

    def last(self, metric: Metric) -> float | None:
        """The last value of the validation loss or its main metric; None if not finite, or if the run has not ended."""
        series = self.log.validation.get(metric.name) if metric in (Metric(), self.main_metric) else None
        value = series.values[-1] if series is not None and self.status == FINISHED else math.inf
        return value if math.isfinite(value) else None


def compare(logs: Sequence[TrainingLog]) -> list[Compared]:
    """Each run with its settings that differ, in the given order."""
    flat = [_settings(log.config) for log in logs]
    kept: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for settings in flat for name in settings):
        column = [settings.get(name) for settings in flat]
        # a key that follows from another key (n_heads from model=tiny, for example) adds nothing
        if len(set(column)) > 1 and all(_partition(column) != _partition(other) for other in kept.values()):
            kept[name] = column
    return [Compared(log, {name: column[number] for name, column in kept.items()}) for number, log in enumerate(logs)]


def should_coincide(runs: Sequence[Compared]) -> bool:
    """Whether these runs differ only in settings that must not change the result, such as the implementation."""
    return len(runs) > 1 and all(name in ALIKE for run in runs for name in run.settings)


def spreads(logs: Sequence[TrainingLog], metric: str) -> dict[int, float]:
    """For each step that all runs have logged: the highest value minus the lowest."""
    series = [{**log.training, **log.validation}.get(metric) for log in logs]
    curves = [{} if one is None else dict(zip(one.steps, one.values, strict=True)) for one in series]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    columns = {step: [curve[step] for curve in curves] for step in steps}
    return {
        step: max(values) - min(values) if all(map(math.isfinite, values)) else math.inf
        for step, values in columns.items()
    }


def difference_lines(logs: Sequence[TrainingLog]) -> list[str]:
    """The largest differences of the training loss and of the validation loss, in words."""
    found = []
    for metric in LOSSES:
        if by_step := spreads(logs, metric):
            step = max(by_step, key=by_step.__getitem__)
            found.append(
                f"largest difference of {metric}: {by_step[step]:.2g} nats per token, after step {step} "
                f"({len(by_step)} {'step' if len(by_step) == 1 else 'steps'} compared)"
            )
    return found or ["no step was logged by all of them: nothing to subtract"]


def table_lines(runs: Sequence[Compared]) -> list[str]:
    """The best first. As wide as it has to be: a run's name that is cut in half finds no run."""
    names = list(runs[0].settings)
    metrics = list(dict.fromkeys([Metric(), *(run.main_metric for run in runs)]))
    rows = [[*names, *(metric.title for metric in metrics), "steps", "status", "run"]]
    ranked_by = Metric.shared(run.main_metric for run in runs), Metric()  # the loss where the first is equal
    for run in sorted(runs, key=lambda run: [metric.sort_key(run.last(metric)) for metric in ranked_by]):
        steps = max((series.steps[-1] for series in {**run.log.training, **run.log.validation}.values()), default=0)
        values = [metric.shown(run.last(metric)) or "-" for metric in metrics]
        settings = [_typed(run.settings[name]) for name in names]
        rows.append([*settings, *values, str(steps), run.status, _short_path(run.log.path)])
    return columns(rows)


def in_words(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={_typed(value)}" for key, value in settings.items())


def _typed(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _short_path(path: Path) -> str:
    return min(str(path), os.path.relpath(path), key=len)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as dotted keys; a group has the name of its option, and a model of conf/model its name."""
    config = with_defaults(config)  # it may be from another version
    sizes = config.get("model") or {}
    named = [
        name
        for name, option in model_sizes().items()
        if all(sizes.get(key) == value for key, value in option.items() if key != "learning_rate")
    ]
    flat: dict[str, Any] = {"task": RunConfig.task.name} if config else {}  # a run of a version without tasks
    flat |= {"model": named[0]} if named else {}
    return flat | {
        name.removesuffix(".name"): value
        for name, value in flatten(config).items()
        if name not in NO_SETTING and not name.startswith("tags.")
    }


def _partition(column: Sequence[Any]) -> tuple[int, ...]:
    """Which runs share a value. If it is the same for two keys, each key follows from the other."""
    return tuple(column.index(value) for value in column)
