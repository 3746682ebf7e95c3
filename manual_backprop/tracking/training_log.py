"""Writing and reading a run's metrics: `TrainingLogger` and `load_training_log`, of use without the Runner too.

    logger = TrainingLogger("my_run")
    logger.log_step(1, {"train/loss": loss, "learning_rate": 1e-3})
    logger.log_validation(1, {"loss": 5.1})            # validation/loss
    logger.finish("FINISHED")
    log = load_training_log("my_run")
    plt.plot(log.training["train/loss"].steps, log.training["train/loss"].values)

Needs no Hydra, no MLflow and no torch. The schema of the file is described in metrics_file.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

from manual_backprop.common.durable_files import storage_errors
from manual_backprop.common.errors import InputError
from manual_backprop.common.json_files import flattened
from manual_backprop.tracking.metrics_file import METRICS, MetricsFile, read_entries
from manual_backprop.tracking.run_directory import FINISHED, RUN_FILE, end_run, find_run, read_run

_VALIDATION = "validation/"
_SYSTEM = "system/"


class TrainingLogger:
    """Appends metrics to `<directory>/metrics.jsonl`; in a run's directory, `finish` writes the status into run.json.

    `keep` cuts the file back to the length that a checkpoint remembers: what lies beyond is moved to superseded.jsonl.
    """

    def __init__(self, directory: str | Path, keep: int | None = None):
        self.directory = Path(directory)
        with storage_errors(f"create {self.directory}"):
            self.directory.mkdir(parents=True, exist_ok=True)
        self._file = MetricsFile(self.directory / METRICS)
        if keep is not None:
            self._file.truncate(keep)

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def length(self) -> int:
        """How much is written [bytes]."""
        return self._file.length

    def log_step(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Metrics of training after `step` completed steps. Values are anything that `float` takes."""
        self._file.append(step, metrics)

    def log_validation(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Metrics of an evaluation; a name without `validation/` gets it."""
        self._file.append(
            step, {name if name.startswith(_VALIDATION) else _VALIDATION + name: metrics[name] for name in metrics}
        )

    def sync(self) -> int:
        """Force the file to the disk and return its length: what a checkpoint remembers. Raises StorageError."""
        return self._file.sync()

    def finish(self, status: str = FINISHED) -> None:
        """Close the file and write the status. Raises StorageError if the disk still refuses lines."""
        try:
            self._file.close()
        finally:
            if (self.directory / RUN_FILE).is_file():
                end_run(self.directory, status)


@dataclass
class Series:
    """One metric: `values[i]` after `steps[i]` steps, written at `times_ms[i]`. Steps rise and none stands twice."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    times_ms: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingLog:
    """What a run has written so far. `training` and `validation` map the contract's metric names to series, `system`
    those of the machine (system/cpu_utilization_percentage)."""

    path: Path
    run: dict[str, Any]  # run.json; empty for a TrainingLogger's own directory
    config: dict[str, Any]  # config.yaml; empty where there is none
    training: dict[str, Series]
    validation: dict[str, Series]
    system: dict[str, Series]
    damaged_lines: int  # skipped; 0 unless the disk failed


def load_training_log(run: str | Path, root: str | Path = "outputs") -> TrainingLog:
    """Read a finished, running or broken run: its directory, its metrics.jsonl, or its id below the outputs `root`.

    Where a step was logged twice (before and after a resume), the last value counts. Raises InputError.
    """
    path = Path(run)
    if path.name == METRICS and path.is_file():
        path = path.parent
    if not (path / METRICS).is_file():
        if path.is_dir():
            raise InputError(f"{path} has no {METRICS}: expected the directory of a run")
        path = find_run(root, str(run)).path
    last: dict[str, dict[int, tuple[float, int]]] = {}
    damaged: list[int] = []
    for entry in read_entries(path / METRICS, damaged=damaged):
        for name, value in entry.metrics.items():
            last.setdefault(name, {})[entry.step] = (value, entry.time_ms)
    series = {name: _series(points) for name, points in last.items()}
    return TrainingLog(
        path=path,
        run=read_run(path) if (path / RUN_FILE).is_file() else {},
        config=load_config(path),
        training={name: one for name, one in series.items() if not name.startswith((_VALIDATION, _SYSTEM))},
        validation={name: one for name, one in series.items() if name.startswith(_VALIDATION)},
        system={name: one for name, one in series.items() if name.startswith(_SYSTEM)},
        damaged_lines=len(damaged),
    )


def load_config(path: Path) -> dict[str, Any]:
    """The config.yaml of a run directory as plain data; empty where there is none."""
    file = path / "config.yaml"
    if not file.is_file():
        return {}
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        config = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not a config: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} is not a config: expected keys and values")
    return {str(key): value for key, value in config.items()}


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"model": {"d_model": 4}} -> {"model.d_model": 4}: the form in which parameters are tracked. Lists become
    JSON, and an empty mapping nothing."""
    return {
        key: json.dumps(value) if isinstance(value, list | tuple) else value
        for key, value in flattened(config)
        if not isinstance(value, Mapping)
    }


def _series(points: dict[int, tuple[float, int]]) -> Series:
    steps = sorted(points)
    return Series(steps, [points[step][0] for step in steps], [points[step][1] for step in steps])
