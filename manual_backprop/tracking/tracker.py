"""The tracker: the one object through which the loop says what happens.

Everything is written into the run's directory first, which is the truth: metrics into metrics.jsonl, parameters, tags,
datasets and the list of artifacts into tracking.json. MLflow follows from there (mlflow_tracking.py); with
tracking=none nothing follows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

from manual_backprop.common.durable_files import write_atomically
from manual_backprop.common.errors import InputError
from manual_backprop.common.uris import same_place
from manual_backprop.tracking.run_directory import FINISHED, RUNS, SWEEPS, read_run
from manual_backprop.tracking.training_log import TRACKING_FILE, TrainingLogger

DIRECTORY_TAG = "run_directory"
STORE = "mlflow.db"  # beside the outputs directory, unless another is named


@dataclass(frozen=True)
class Dataset:
    """A run's input. `profile` depends on nothing but the data; what depends on the run too stands in `tags`."""

    name: str
    digest: str
    source_type: str
    source: dict[str, Any]
    profile: dict[str, int]
    tags: dict[str, str]


class Tracker(Protocol):
    """What the loop may call. Nothing here waits for a network; StorageError means that the run directory is
    unwritable."""

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Metrics (DESIGN.md, 7) after `step` completed optimizer steps, from 1."""

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Dotted keys. A value stays as it was first logged; other ones that a resume brings are told, each with its
        first step, by a tag `changed.KEY`."""

    def set_tags(self, tags: Mapping[str, Any]) -> None: ...

    def log_dataset(self, dataset: Dataset) -> None:
        """What the run learns from; the same one again changes nothing."""

    def log_artifact(self, path: str | Path, artifact_path: str | None = None) -> None:
        """A file that belongs to the run; when it changes, it is delivered again at the end or at the next call."""

    def log_checkpoints(self) -> None:
        """The checkpoints in the run's directory are others than before (called after each save)."""

    def sync(self) -> int:
        """Force the metrics to the disk; return their length [bytes], which a checkpoint remembers."""

    def finish(self, status: str = FINISHED) -> None:
        """FINISHED, FAILED or KILLED. The last call."""


@dataclass
class Tracked:
    """The content of tracking.json: what a run has to deliver beside its metrics."""

    experiment_name: str = "manual_backprop"
    run_name: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)  # as they were first logged
    changes: dict[str, list[list[Any]]] = field(default_factory=dict)  # of parameters: [first step, value], in order
    tags: dict[str, str] = field(default_factory=dict)
    datasets: list[dict[str, Any]] = field(default_factory=list)
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

    def write(self, directory: Path) -> None:
        write_atomically(directory / TRACKING_FILE, (json.dumps(vars(self), indent=1) + "\n").encode())


def outputs_of(run: Path, otherwise: Path) -> Path:
    """The outputs directory in which a run lies, called so that mlflow.db stands beside it: where `outputs` is a
    symbolic link, its target has other neighbours. Without a store, as it was called when the run was made. Raises
    InputError."""
    if run.parent.name not in (RUNS, SWEEPS):
        return otherwise.absolute()
    here = run.parent.parent
    known = Tracked.read(run).tags.get(DIRECTORY_TAG)
    named = [] if known is None else [Path(known).parent.parent]
    places = [place.absolute() for place in (*named, otherwise, here) if same_place(place, here)]
    return next((place for place in places if (place.parent / STORE).is_file()), places[0])


def add_tags(directory: Path, tags: Mapping[str, Any]) -> None:
    """Tags of a run that has ended; whoever calls this owns its directory. Raises InputError, StorageError."""
    tracked = Tracked.read(directory)
    tracked.tags |= {name: str(value) for name, value in tags.items()}
    tracked.write(directory)


def environment_of_run(directory: Path) -> dict[str, Any]:
    """The environment of a run when it started, its code among them, as far as its directory tells.

    `code` stands beside the others. The first runs had their commit among the tags only, which a resume replaces.
    Raises InputError.
    """
    run, tags = read_run(directory), Tracked.read(directory).tags
    known = {}
    if "git_commit" in tags and not run["resumes"]:
        known["commit"] = tags["git_commit"] + " and changes" * (tags.get("git_dirty") == "true")
    return known | (run.get("made_with") or {}) | {"code": run.get("code")}


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
        first_step = _first_step(self.directory)
        for name, value in parameters.items():
            value = _plain(value)
            first = self._tracked.parameters.setdefault(name, value)
            # What was changed at a step that this resume makes again never happened.
            changes = [change for change in self._tracked.changes.pop(name, []) if change[0] < first_step]
            if value != (changes[-1][1] if changes else first):
                changes.append([first_step, value])
            if changes:
                self._tracked.changes[name] = changes
        self._write()

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self._tracked.tags |= {name: str(value) for name, value in tags.items()}
        self._write()

    def log_dataset(self, dataset: Dataset) -> None:
        if vars(dataset) not in self._tracked.datasets:
            self._tracked.datasets.append(dict(vars(dataset)))
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
        self._tracked.write(self.directory)


def _first_step(directory: Path) -> int:
    """The step that this process makes first."""
    resumes = read_run(directory)["resumes"]
    return resumes[-1]["step"] + 1 if resumes else 1


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
