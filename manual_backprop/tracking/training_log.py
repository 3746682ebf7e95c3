"""Writing and reading a run's metrics: `TrainingLogger` and `load_training_log`, which also work without the Runner.

`LogReader` follows a run: each of its reads returns only what is new.

Needs no Hydra, no MLflow and no torch. metrics_file.py describes the schema of the file.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, SupportsFloat

from ..common.durable_files import storage_errors, write_atomically
from ..common.errors import InputError
from ..common.json_files import flattened, read_object
from .metrics_file import METRICS, SUPERSEDED, MetricsFile, read_entries
from .run_directory import FINISHED, RUN_FILE, end_run, find_run, read_run

TRACKING_FILE = "tracking.json"
CONFIG_FILE = "config.yaml"
_VALIDATION = "validation/"
_SYSTEM = "system/"
_EVALUATION = "evaluation/"  # measured later, perhaps of an early checkpoint: it supersedes nothing


class TrainingLogger:
    """Appends metrics to `<directory>/metrics.jsonl`; in a run directory, `finish` writes the status into run.json.

    `keep` [bytes] cuts the file back to the length that a checkpoint remembers: what lies beyond is moved to
    superseded.jsonl. `config`, a mapping or a dataclass such as the model's own config, is written into
    `<directory>/config.yaml`; what is in it may be nested. Raises StorageError if the directory cannot be written,
    InputError for a file that is there and holds no metrics, and for a config of another kind.

    >>> logger = TrainingLogger("logged", config={"seed": 1, "model": {"d_model": 64}})
    >>> for step in range(1, 4):
    ...     logger.log_step(step, {"train/loss": 1 / step, "learning_rate": 1e-3})
    >>> logger.log_validation(3, {"loss": 0.4})  # validation/loss
    >>> logger.finish()
    >>> load_training_log("logged").validation["validation/loss"].values
    [0.4]
    """

    def __init__(self, directory: str | Path, keep: int | None = None, config: Any = None):
        self.directory = Path(directory)
        plain = None if config is None else _plain(config)
        if plain is not None and not isinstance(plain, dict):
            raise InputError(f"config={config!r}: expected a mapping or a dataclass, as a model's own config is one")
        with storage_errors(f"create {self.directory}"):
            self.directory.mkdir(parents=True, exist_ok=True)
        if plain is not None:  # JSON, which is YAML as well
            write_atomically(self.directory / CONFIG_FILE, (json.dumps(plain, indent=1) + "\n").encode())
        self._file = MetricsFile(self.directory / METRICS)
        if keep is not None:
            self._file.truncate(keep)

    @property
    def path(self) -> Path:
        """The path of metrics.jsonl."""
        return self._file.path

    @property
    def length(self) -> int:
        """The length of metrics.jsonl [bytes]."""
        return self._file.length

    def log_step(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Metrics of training after `step` completed steps. Values are anything that `float` takes.

        Raises InputError for others, for a step below 0, and after `finish`. A full disk keeps them in memory.
        """
        self._file.append(step, metrics)

    def log_validation(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Metrics of an evaluation; a name without `validation/` gets it. Raises InputError as `log_step`."""
        if isinstance(metrics, Mapping):  # anything else `append` refuses
            metrics = {_VALIDATION + str(name).removeprefix(_VALIDATION): value for name, value in metrics.items()}
        self._file.append(step, metrics)

    def sync(self) -> int:
        """Sync the file to the disk and return its length, which a checkpoint records. Raises StorageError."""
        return self._file.sync()

    def finish(self, status: str = FINISHED) -> None:
        """Close the file and write the status. Raises StorageError if the disk is still full."""
        try:
            self._file.close()
        finally:
            if (self.directory / RUN_FILE).is_file():
                end_run(self.directory, status)


@dataclass
class Series:
    """One metric: `values[i]` after `steps[i]` steps, written at `times_ms[i]`. Steps are strictly increasing."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    times_ms: list[int] = field(default_factory=list)
    revision: int = field(default=0, compare=False, repr=False)  # number of changes other than appending a point
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # a cache for readers

    def put(self, step: int, value: float, time_ms: int) -> None:
        """Add a point; it replaces an earlier one of the same step."""
        if not self.steps or step > self.steps[-1]:
            self.steps.append(step)
            self.values.append(value)
            self.times_ms.append(time_ms)
            return
        self.revision += 1
        place = bisect_left(self.steps, step)
        if self.steps[place] == step:
            self.values[place], self.times_ms[place] = value, time_ms
        else:
            self.steps.insert(place, step)
            self.values.insert(place, value)
            self.times_ms.insert(place, time_ms)


@dataclass(frozen=True)
class TrainingLog:
    """The metrics and records of a run so far. `training` and `validation` map metric names to series, `system` those
    of the machine (system/cpu_utilization_percentage).

    If a run went back to an earlier step without cutting its file (a logger that was opened again, or MLflow's points),
    `superseded` has for each metric the later steps that were not logged again: they belong to the abandoned part.
    """

    path: Path
    run: dict[str, Any]  # run.json; empty for a TrainingLogger's own directory
    config: dict[str, Any]  # config.yaml; empty if there is none
    training: dict[str, Series]
    validation: dict[str, Series]
    system: dict[str, Series]
    damaged_lines: int  # skipped; 0 unless the disk failed
    model: dict[str, Any] = field(default_factory=dict)  # the network's config, and `parameters`, as far as known
    tags: dict[str, str] = field(default_factory=dict)  # of a run and its data: git_commit, train_tokens ...
    resumes: tuple[int, ...] = ()  # the steps after which it resumed
    superseded: dict[str, set[int]] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # a cache for readers


class Metrics:
    """Collects points, in the order in which they were written, as series; it notices when a run went back."""

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}
        self.superseded: dict[str, set[int]] = {}
        self.resumed_after: list[int] = []  # the steps to which the run went back
        self._last: dict[str, int] = {}  # the step of each metric that was written last

    def put(self, name: str, step: int, value: float, time_ms: int) -> None:
        if step < self._last.get(name, -1) and not name.startswith(_EVALUATION):
            self._go_back(name, step)
        self._last[name] = step
        self.series.setdefault(name, Series()).put(step, value, time_ms)
        if steps := self.superseded.get(name):
            steps.discard(step)

    def _go_back(self, name: str, step: int) -> None:
        """A repeated step of training supersedes all later points of all metrics; a repeated validation or system
        metric only its own."""
        alone = name.startswith((_VALIDATION, _SYSTEM))
        if not alone and step - 1 not in self.resumed_after[-1:]:
            self.resumed_after.append(step - 1)
        for other in [name] if alone else [one for one in self.series if not one.startswith(_EVALUATION)]:
            steps = self.series[other].steps
            self.superseded.setdefault(other, set()).update(steps[bisect_left(steps, step) :])
            self._last[other] = min(self._last[other], step)

    def log(self, **fields: Any) -> TrainingLog:
        def those(belongs: Any) -> dict[str, Series]:
            return {name: one for name, one in self.series.items() if belongs(name)}

        return TrainingLog(
            training=those(lambda name: not name.startswith((_VALIDATION, _SYSTEM))),
            validation=those(lambda name: name.startswith(_VALIDATION)),
            system=those(lambda name: name.startswith(_SYSTEM)),
            superseded={name: set(steps) for name, steps in self.superseded.items() if steps},
            **fields,
        )


class LogReader:
    """Follows a run directory: `read()` reads what is new since the last call. It writes nothing.

    An incomplete last line is left for the next call. If a resume has cut the file, everything is read again.
    """

    def __init__(self, path: Path):
        self.path = path
        self._log: TrainingLog | None = None
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._start()

    def _start(self) -> None:
        self._metrics, self.position, self._damaged = Metrics(), 0, set[int]()  # read up to `position` [bytes]

    def read(self) -> TrainingLog:
        """The log of the run; the same object if nothing has changed. Raises InputError."""
        seen = {name: self._state(name) for name in (METRICS, SUPERSEDED, RUN_FILE, TRACKING_FILE, CONFIG_FILE)}
        changed = {name for name, state in seen.items() if state != self._seen.get(name)}
        if self._log is not None and not changed:
            return self._log
        size, inode, _ = seen[METRICS]
        if self._log is not None and (SUPERSEDED in changed or inode != self._seen[METRICS][1] or size < self.position):
            self._start()
        damaged: list[int] = []
        file = self.path / METRICS
        if file.is_file():
            for entry in read_entries(file, self.position, damaged):
                for name, value in entry.metrics.items():
                    self._metrics.put(name, entry.step, value, entry.time_ms)
                self.position = entry.end
            self._damaged |= {*damaged}  # a set, since a line after the last entry is read again
        run = read_run(self.path) if (self.path / RUN_FILE).is_file() else {}
        config = load_config(self.path) if self._log is None or CONFIG_FILE in changed else self._log.config
        tracked = _tracked(self.path)
        recorded = [int(one["step"]) for one in run.get("resumes", []) if isinstance(one, dict) and "step" in one]
        self._seen = seen
        self._log = self._metrics.log(
            path=self.path,
            run=run,
            config=config,
            damaged_lines=len(self._damaged),
            model=_model_of(run, config, tracked),
            tags=_tags(tracked),
            resumes=tuple(sorted({*recorded, *self._metrics.resumed_after})),
        )
        return self._log

    def _state(self, name: str) -> tuple[int, int, int]:
        """A file's size [bytes], inode and time of change [ns], which differ whenever it has something new."""
        with suppress(OSError):
            found = (self.path / name).stat()
            return found.st_size, found.st_ino, found.st_mtime_ns
        return 0, 0, 0


def load_training_log(run: str | Path, root: str | Path = "outputs") -> TrainingLog:
    """Read the log of a run in any state, given as its directory, its metrics.jsonl, or its id below `root`.

    Where a step was logged twice (before and after a resume), the last value counts. Raises InputError if there is
    no such run, or its metrics are of another version.

    >>> logger = TrainingLogger("finished")
    >>> for step in range(1, 4):
    ...     logger.log_step(step, {"train/loss": 1 / step})
    >>> logger.finish()
    >>> log = load_training_log("finished")
    >>> log.training["train/loss"].steps, log.training["train/loss"].values
    ([1, 2, 3], [1.0, 0.5, 0.3333333333333333])
    """
    path = Path(run)
    if path.name == METRICS and path.is_file():
        path = path.parent
    if not (path / METRICS).is_file():
        if path.is_dir():
            raise InputError(f"{path} has no {METRICS}: expected the directory of a run")
        path = find_run(root, str(run)).path
    return LogReader(path).read()


def load_config(path: Path) -> dict[str, Any]:
    """The config.yaml of a run directory as plain data; empty if there is none. Raises InputError."""
    file = path / CONFIG_FILE
    if not file.is_file():
        return {}
    with suppress(OSError, ValueError, RecursionError):  # a TrainingLogger writes JSON, which needs no library
        written = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(written, dict):
            return written
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
    """Dotted keys and their values, as parameters are tracked: {"model": {"d_model": 4}} -> {"model.d_model": 4}. Lists
    become JSON, and empty mappings are left out."""
    return {
        key: json.dumps(value) if isinstance(value, list | tuple) else value
        for key, value in flattened(config)
        if not isinstance(value, Mapping)
    }


def _plain(value: Any) -> Any:
    """A config, or a part of it, as JSON knows it: what is no number, text, mapping or list becomes text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, type | bytes):
        return str(value)
    if hasattr(value, "to_dict"):  # a run's config
        value = value.to_dict()
    elif is_dataclass(value):
        value = {one.name: getattr(value, one.name) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if hasattr(value, "tolist"):  # numbers of numpy and torch
        return value.tolist()
    return [_plain(one) for one in value] if isinstance(value, Sequence | Set) else str(value)


def _tags(tracked: Mapping[str, Any]) -> dict[str, str]:
    """The tags of the run and of its datasets (train_tokens ...)."""
    found = [one.get("tags") for one in tracked.get("datasets") or [] if isinstance(one, Mapping)]
    found.append(tracked.get("tags"))
    return {str(name): str(value) for tags in found if isinstance(tags, Mapping) for name, value in tags.items()}


def _tracked(path: Path) -> dict[str, Any]:
    """The content of tracking.json; empty if it is missing or unreadable, since a run's curves do not need it."""
    with suppress(InputError):
        return read_object(path / TRACKING_FILE)
    return {}


def _model_of(run: Mapping[str, Any], config: Mapping[str, Any], tracked: Mapping[str, Any]) -> dict[str, Any]:
    """The network's config: from `model` in run.json, or from the config given to its logger, or for an older run from
    its config and its tracked parameters. Unknown keys are left out, not guessed."""
    if isinstance(run.get("model"), Mapping):
        return dict(run["model"])
    if "d_model" in config:
        return dict(config)
    sizes = config.get("model")
    if not isinstance(sizes, Mapping):
        return {}
    parameters = tracked.get("parameters") or {}
    model = dict(sizes)
    if isinstance(parameters, Mapping) and "parameters" in parameters:
        model["parameters"] = parameters["parameters"]
    for name in ("architecture", "precision", "implementation"):
        named = config.get(name)
        if isinstance(named, Mapping) and "name" in named:
            model[name] = named["name"]
    if model.get("vocab_size") is None:
        size = _tags(tracked).get("vocab_size", "")
        model["vocab_size"] = int(size) if size.isdecimal() else None
    return model
