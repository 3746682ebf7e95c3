"""The tracker: the object to which the training loop reports metrics, parameters, tags and files.

Everything is first written into the run directory, the source of truth: metrics into metrics.jsonl; parameters, tags,
datasets and the list of artifacts into tracking.json. From there it is delivered to MLflow (mlflow_tracking.py), unless
tracking=none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

from ..common.durable_files import write_atomically
from ..common.errors import InputError
from ..common.uris import same_place
from .run_directory import RUNS, SWEEPS, read_run
from .training_log import TRACKING_FILE, TrainingLogger

DIRECTORY_TAG = "run_directory"
STORE = "mlflow.db"  # beside the outputs directory, unless another is named


@dataclass(frozen=True)
class Dataset:
    """A run's input. `profile` depends on the data alone; `tags` also depend on the run."""

    name: str
    digest: str
    source_type: str
    source: dict[str, Any]
    profile: dict[str, int]
    tags: dict[str, str]


@dataclass
class Tracked:
    """The content of tracking.json: what a run delivers in addition to its metrics."""

    experiment_name: str = "manual_backprop"
    run_name: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)  # their first values
    changes: dict[str, list[list[Any]]] = field(default_factory=dict)  # parameter -> [first step, value], in order
    tags: dict[str, str] = field(default_factory=dict)
    datasets: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[list[str]] = field(default_factory=list)  # [path, folder in the artifacts ("" for none)]

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
    """The outputs directory of a run, by the path that has mlflow.db beside it: if `outputs` is a symbolic link, its
    target has other neighbours. Without a store, by the path that the run was created with. Raises InputError."""
    if run.parent.name not in (RUNS, SWEEPS):
        return otherwise.absolute()
    here = run.parent.parent
    known = Tracked.read(run).tags.get(DIRECTORY_TAG)
    named = [] if known is None else [Path(known).parent.parent]
    places = [place.absolute() for place in (*named, otherwise, here) if same_place(place, here)]
    return next((place for place in places if (place.parent / STORE).is_file()), places[0])


def add_tags(directory: Path, tags: Mapping[str, Any]) -> None:
    """Add tags to a run that has ended; the caller must own its directory. Raises InputError, StorageError."""
    tracked = Tracked.read(directory)
    tracked.tags |= {name: str(value) for name, value in tags.items()}
    tracked.write(directory)


def environment_of_run(directory: Path) -> dict[str, Any]:
    """The environment of a run when it started, including its code, as far as its directory records it.

    run.json has `code` separately. The oldest runs have their commit only in a tag, which a resume replaces. Raises
    InputError.
    """
    run, tags = read_run(directory), Tracked.read(directory).tags
    known = {}
    if "git_commit" in tags and not run["resumes"]:
        known["commit"] = tags["git_commit"] + " and changes" * (tags.get("git_dirty") == "true")
    return known | (run.get("made_with") or {}) | {"code": run.get("code")}


class LocalTracker(TrainingLogger):
    """The tracker of tracking=none, which writes into the run directory, and the base of every other one.

    No method waits for a network. All raise StorageError if the run directory cannot be written. `keep` is the length
    of metrics.jsonl recorded in the checkpoint from which the run resumes (None: a new run).
    """

    def __init__(self, directory: Path, experiment_name: str, run_name: str, keep: int | None = None):
        super().__init__(directory, keep)
        self._tracked = Tracked.read(directory)
        self._tracked.experiment_name = experiment_name
        self._tracked.run_name = run_name
        self._write()

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Log metrics by name after `step` completed optimizer steps, from 1."""
        self.log_step(step, metrics)

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log parameters by dotted keys. The first value of a parameter stays; a resume with another value adds it,
        with its first step, to the tag `changed.KEY`."""
        resumes = read_run(self.directory)["resumes"]
        first_step = resumes[-1]["step"] + 1 if resumes else 1  # of this process
        for name, value in parameters.items():
            value = value if value is None or isinstance(value, str | int | float | bool) else str(value)
            first = self._tracked.parameters.setdefault(name, value)
            # Drop changes at steps that this resume repeats.
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
        """Log the data of the run; logging the same again changes nothing."""
        if vars(dataset) not in self._tracked.datasets:
            self._tracked.datasets.append(dict(vars(dataset)))
            self._write()

    def log_artifact(self, path: str | Path, artifact_path: str | None = None) -> None:
        """Add a file to the run's artifacts. If it changes, it is delivered again at the next call and at the end."""
        absolute = Path(path).absolute()
        inside = absolute.is_relative_to(self.directory)
        entry = [str(absolute.relative_to(self.directory) if inside else absolute), artifact_path or ""]
        if entry not in self._tracked.artifacts:
            self._tracked.artifacts.append(entry)
        self._write()  # even if it is listed: the new time of tracking.json makes the thread check all artifacts again

    def _write(self) -> None:
        self._tracked.write(self.directory)


Tracker = LocalTracker  # what the training loop is given
