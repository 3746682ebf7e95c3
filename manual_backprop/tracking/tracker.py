"""The tracker: the one object through which the loop says what happens.

Everything is written into the run's directory first, which is the truth: metrics into metrics.jsonl, parameters, tags
and the list of artifacts into tracking.json. MLflow follows from there (mlflow_tracking.py); with tracking=none
nothing follows, and with NullTracker (benchmarks, ranks other than 0) nothing is written either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

from manual_backprop.durable import write_atomically
from manual_backprop.errors import InputError
from manual_backprop.tracking.run_directory import FINISHED
from manual_backprop.tracking.training_log import TrainingLogger

TRACKING_FILE = "tracking.json"


class Tracker(Protocol):
    """What the loop may call. Nothing here waits for a network; StorageError means that the run directory is
    unwritable."""

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Metrics (DESIGN.md, 7) after `step` completed optimizer steps, from 1."""

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Dotted keys; of a key that was logged before with another value, a tag `changed.KEY` tells the new one."""

    def set_tags(self, tags: Mapping[str, Any]) -> None: ...

    def log_artifact(self, path: str | Path, artifact_path: str | None = None) -> None:
        """A file that belongs to the run; when it changes, it is delivered again at the end or at the next call."""

    def log_checkpoints(self) -> None:
        """The checkpoints in the run's directory are others than before (called after each save)."""

    def sync(self) -> int:
        """Force the metrics to the disk; return their length [bytes], which a checkpoint remembers."""

    def finish(self, status: str = FINISHED) -> None:
        """FINISHED, FAILED or KILLED. The last call."""


class NullTracker:
    """Does nothing, wherever a tracker is asked for."""

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None: ...

    def log_parameters(self, parameters: Mapping[str, Any]) -> None: ...

    def set_tags(self, tags: Mapping[str, Any]) -> None: ...

    def log_artifact(self, path: str | Path, artifact_path: str | None = None) -> None: ...

    def log_checkpoints(self) -> None: ...

    def sync(self) -> int:
        return 0

    def finish(self, status: str = FINISHED) -> None: ...


@dataclass
class Tracked:
    """The content of tracking.json: what a run has to deliver beside its metrics."""

    experiment_name: str = "manual_backprop"
    run_name: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: list[list[str]] = field(default_factory=list)  # [path, folder among the artifacts ("" for none)]

    @classmethod
    def read(cls, directory: Path) -> Tracked:
        file = directory / TRACKING_FILE
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls(run_name=directory.name)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error


class LocalTracker:
    """tracking=none: writes into the run's directory. It is also what every other tracker starts with.

    `keep` is the length of metrics.jsonl that the checkpoint remembers from which the run resumes (None: a new run).
    """

    def __init__(self, directory: Path, experiment_name: str, run_name: str, keep: int | None = None):
        self.directory = directory
        self._logger = TrainingLogger(directory, keep)
        self._tracked = Tracked.read(directory)
        self._tracked.experiment_name = experiment_name
        self._tracked.run_name = run_name
        self._write()

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        self._logger.log_step(step, metrics)

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        self._tracked.parameters |= {name: _plain(value) for name, value in parameters.items()}
        self._write()

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self._tracked.tags |= {name: str(value) for name, value in tags.items()}
        self._write()

    def log_artifact(self, path: str | Path, artifact_path: str | None = None) -> None:
        absolute = Path(path).absolute()
        inside = absolute.is_relative_to(self.directory)
        entry = [str(absolute.relative_to(self.directory) if inside else absolute), artifact_path or ""]
        if entry not in self._tracked.artifacts:
            self._tracked.artifacts.append(entry)
        self._write()  # also when it is listed: a new time of tracking.json makes the feeder look at its content again

    def log_checkpoints(self) -> None:
        """The checkpoints lie in the run's directory already."""

    def sync(self) -> int:
        return self._logger.sync()

    def finish(self, status: str = FINISHED) -> None:
        self._logger.finish(status)

    def _write(self) -> None:
        write_atomically(self.directory / TRACKING_FILE, (json.dumps(vars(self._tracked), indent=1) + "\n").encode())


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
