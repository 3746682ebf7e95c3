"""`RUN` on a command line: finds the run or checkpoint that it names, and loads its model.

    last                        the newest run with a sound checkpoint
    a run id, its last six characters, or its id in MLflow
    a directory                 of a run, of one of its checkpoints, of checkpoints that a program saved, or one that
                                convert has imported or exported

A run means its best checkpoint by the metric of its task, the one with the lowest validation loss for a language model
(the latest, if none was measured), and a sweep means its best run. `RUN@last`, `RUN@best` and `RUN@STEP` name other
checkpoints. `find` imports no torch; `load` does, and reads only the checkpoint, which describes its network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manual_backprop.checkpoints.checkpoint import METRIC, CheckpointManager, checkpoint_name, load_checkpoint, step_of
from manual_backprop.common.errors import CheckpointError, ConfigError, InputError
from manual_backprop.common.uris import expanded
from manual_backprop.config.plugins import missing_plugins
from manual_backprop.tracking.run_directory import RUN_FILE, SWEEPS, close_dead_runs, find_run, list_runs, read_run
from manual_backprop.trained_models.huggingface_directory import as_checkpoint, is_exported

if TYPE_CHECKING:
    from manual_backprop.config.schema import RunConfig
    from manual_backprop.data.tokens.tokenizer import Tokenizer

OUTPUTS = Path("outputs")
WORDS = str.maketrans("/_", "  ")  # validation/exact_match -> validation exact match
ATTEMPTS = 5  # to choose a checkpoint, since a run that is still training may remove the chosen one

RUN_HELP = """\
RUN is last (the newest run), a run id or its last six characters, its id in MLflow, the directory of a run or of a
checkpoint, or one that `convert` has written. A run means its best checkpoint (for a language model: the one with the
lowest validation loss), a sweep its best run; RUN@last and RUN@STEP, as in last@850, name other checkpoints."""


@dataclass(frozen=True)
class Found:
    """A checkpoint, and the run that saved it."""

    checkpoint: Path
    run: Path | None  # the run directory, if the checkpoint is in one

    @property
    def outputs(self) -> Path:
        """The outputs directory of its run, or that of the working directory."""
        if self.run is not None and self.run.parent.name == "runs":
            return self.run.parent.parent
        return OUTPUTS.absolute()


@dataclass(frozen=True)
class SavedModel:
    found: Found
    step: int
    metric: float | None  # the metric that chooses the best checkpoint; None if not measured
    implementation: str
    model: Any  # the wrapper of its kind: a LanguageModel, an EncoderDecoderWrapper or an EncoderWrapper
    state: Mapping[str, Any]  # saved by the runner in addition to the parameters
    metric_name: str = METRIC

    @property
    def line(self) -> str:
        """The first line that every command prints: a description of the model."""
        config = self.model.config
        measured = "not measured" if self.metric is None else f"{self.metric:.4f}"
        place = relative_path(self.found.checkpoint)
        return (
            f"{self.implementation} ({config.architecture}, {config.precision}): {self.model.count_parameters():,} "
            f"parameters, step {self.step:,}, {self.metric_name.translate(WORDS)} {measured} ({place})"
        )

    @property
    def task_name(self) -> str:
        """The task of the run that saved it; language_model for older runs and for models that a program saved."""
        return _recorded(self.state, "task") or "language_model"

    @property
    def usage_hint(self) -> str:
        """The command to use for a model of this task, for the error of a command that cannot use it."""
        from manual_backprop.tasks import task_named

        command, option, example = task_named(self.task_name).inference_command
        named = self.found.checkpoint if self.found.run is None else self.found.run.name
        return (
            f"it was trained with task={self.task_name}; use it with python -m manual_backprop.{command} {named} "
            f'{option} "{example}"'
        )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of a language model. Raises InputError for other models and those without one."""
        from manual_backprop.data.tokens.tokenizer import FILE_NAME, load_tokenizer
        from manual_backprop.tasks import task_named

        path = self.found.checkpoint
        if task_named(self.task_name).inference_command[1] != "--prompt":
            raise InputError(f"{path} does not continue texts: {self.usage_hint}")
        if not (path / FILE_NAME).is_file():
            raise InputError(
                f"{path} has no {FILE_NAME}: it was saved by a program, not by a run, and reads token ids. Load it in "
                "Python, with CustomTransformerWrapper.from_checkpoint."
            )
        tokenizer = load_tokenizer(path)
        if tokenizer.vocab_size > self.model.config.vocab_size:
            raise CheckpointError(
                f"{path} is inconsistent: its tokenizer has {tokenizer.vocab_size} tokens, its network "
                f"{self.model.config.vocab_size}"
            )
        return tokenizer

    def config(self) -> RunConfig:
        """The config of the run that saved it, with paths relative to the working directory. Raises InputError."""
        from manual_backprop.config.validation import validate, with_defaults

        saved = self.state.get("config")
        if not isinstance(saved, Mapping) and "imported_from" in self.state:
            raise InputError(
                f"{self.found.checkpoint} was imported and has no training data: fine-tune it with "
                f"init_from={relative_path(self.found.checkpoint)}, and name that run"
            )
        if not isinstance(saved, Mapping):
            raise InputError(
                f"{self.found.checkpoint} was saved by a program, not by a run: its training data and settings are not "
                "recorded"
            )
        try:
            return self._located(validate(with_defaults(saved)))
        except ConfigError as error:
            raise InputError(
                f"The config in {self.found.checkpoint} is not one of this version: {'; '.join(error.violations[:3])}"
            ) from error

    def _located(self, config: RunConfig) -> RunConfig:
        root, dataset, tokenizer = self.found.outputs.parent, config.dataset, config.tokenizer

        def seen_from(path: str | None) -> str | None:
            return None if path is None else str(root / expanded(path))

        has_test_file = dataset.path is not None and dataset.name != "saved"  # saved has named splits
        has_test_file &= dataset.format not in ("saved", "hub")
        test = seen_from(dataset.test) if has_test_file else dataset.test
        is_file = has_test_file and isinstance(dataset.validation, str)
        validation = seen_from(str(dataset.validation)) if is_file else dataset.validation
        path = dataset.path if dataset.format == "hub" else seen_from(dataset.path)
        return replace(
            config,
            dataset=replace(dataset, path=path, test=test, validation=validation),
            tokenizer=replace(tokenizer, path=seen_from(tokenizer.path), source_path=seen_from(tokenizer.source_path)),
        )


def find(which: str, outputs: Path = OUTPUTS) -> Found:
    """The checkpoint that `RUN` names. Raises InputError, which lists what exists."""
    named, at = _split(which)
    path = expanded(named)
    if path.is_dir() and (path.name.startswith("step-") or (path / "manifest.json").is_file()):
        if at is not None:
            raise InputError(f"{which}: {named} is one checkpoint already; leave out @{at}")
        return Found(path.absolute(), _run_of(path.absolute()))
    if is_exported(path):
        if at is not None:
            raise InputError(f"{which}: {named} holds one model; leave out @{at}")
        return Found(path.absolute(), None)
    if path.name.startswith("step-"):
        there = ", ".join(one.name for one in CheckpointManager(path.parent).list()) or "none"
        raise InputError(f"there is no checkpoint {named}; beside it there are: {there}")
    if path.is_dir() and named and not (path / RUN_FILE).is_file():
        run, folder = None, path / "checkpoints" if (path / "checkpoints").is_dir() else path
        if not CheckpointManager(folder).list():
            raise InputError(f"{named} is neither a run nor a checkpoint: it holds no {RUN_FILE} and no step-NNNNNN")
    else:
        if named in ("last", "best") and not list_runs(outputs):
            raise InputError(
                f"{which}: there is no run in {outputs.absolute() / 'runs'}; train one (python -m manual_backprop.run) "
                "or give this command in the folder where one was started"
            )
        run = find_run(outputs, named).path
        if run.parent.name == SWEEPS:
            run = _best_run(run)
        folder = run / "checkpoints"
    for _ in range(ATTEMPTS):
        chosen = _choose(CheckpointManager(folder), at, run)
        if chosen.is_dir():
            break
    return Found(chosen.absolute(), run)


def _best_run(sweep: Path) -> Path:
    best = read_run(sweep).get("best")
    if not isinstance(best, Mapping):
        raise InputError(f"{sweep} is a sweep without a best run yet: name a run")
    return find_run(sweep.parent.parent, str(best.get("run_id"))).path


def names_a_run(word: str) -> bool:
    """Whether an argument names a run rather than being KEY=VALUE: a path and the name of a run may contain a =."""
    meant = [named for named in (word, word.rpartition("@")[0]) if named]
    return any(expanded(named).is_dir() or (OUTPUTS / "runs" / named).is_dir() for named in meant)


def _split(which: str) -> tuple[str, str | None]:
    """The parts of `RUN@WHICH`. An existing path may contain an @ itself."""
    named, separator, at = which.rpartition("@")
    if not separator or expanded(which).exists():
        return which, None
    if at not in ("last", "best") and not at.isdecimal():
        raise InputError(f"{which}: after @, give last, best or the number of a step, as in {named or 'last'}@100")
    return named, at


def _choose(checkpoints: CheckpointManager, at: str | None, run: Path | None) -> Path:
    there = checkpoints.list()
    if not there:
        ended = f", and the run is {read_run(run)['status']}" if run is not None else ""
        raise InputError(f"{run or checkpoints.directory} has no checkpoint: nothing was saved{ended}")
    if at == "last":
        return there[-1]
    if at is not None and at != "best":
        path = checkpoints.directory / checkpoint_name(int(at))
        if path not in there:
            steps = ", ".join(str(step_of(path)) for path in there)
            raise InputError(f"{run or checkpoints.directory} has no checkpoint of step {at}; there are: {steps}")
        return path
    best = checkpoints.best()
    if best is None and at == "best":
        raise InputError(f"no checkpoint of {run or checkpoints.directory} has a validation loss; use @last")
    return best or there[-1]


def _run_of(checkpoint: Path) -> Path | None:
    """The run directory of RUN/checkpoints/step-NNNNNN, or of a superseded checkpoint one level below."""
    return next((folder for folder in list(checkpoint.parents)[1:3] if (folder / RUN_FILE).is_file()), None)


def relative_path(path: Path) -> str:
    """The path relative to the working directory if it is below that, otherwise the path itself."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def load(which: str, outputs: Path = OUTPUTS, device: str = "auto") -> SavedModel:
    """The model of `RUN`, on `device`, after comparing every byte of its checkpoint with the manifest.

    Runs in `outputs` whose process has died are marked KILLED. Raises InputError; and CheckpointError for a checkpoint
    that is damaged, is not one of this project's, or is from a newer version.
    """
    close_dead_runs(outputs)
    return load_found(find(which, outputs), device)


def load_found(found: Found, device: str = "auto") -> SavedModel:
    """Load the model that `find` has found. It writes nothing. Raises CheckpointError."""
    from manual_backprop.common.machine import compute_capabilities

    if device == "cuda" and not compute_capabilities():
        raise InputError("--device cuda: no NVIDIA GPU can be used on this machine; leave it out")
    manager = CheckpointManager(found.checkpoint.parent)
    lies_in_a_run = found.run is not None and found.checkpoint.parent.name == "checkpoints"
    if is_exported(found.checkpoint):
        saved = as_checkpoint(found.checkpoint)
    else:
        saved = manager.load(found.checkpoint) if lies_in_a_run else load_checkpoint(found.checkpoint)

    config = saved.state.get("config")
    if missing := missing_plugins(config.get("plugins") if isinstance(config, Mapping) else None):
        raise InputError(f"{found.checkpoint}: {missing[0]}")

    from manual_backprop.models.implementations import IMPLEMENTATIONS
    from manual_backprop.models.wrappers.building import build_wrapper
    from manual_backprop.models.wrappers.wrapper import saved_network

    implementation = _recorded(saved.state, "implementation") or "custom"  # the latter if a program saved the model
    if implementation not in IMPLEMENTATIONS:
        raise CheckpointError(
            f"{found.checkpoint} was trained with implementation={implementation}, which this version does not have; "
            f"it has {', '.join(IMPLEMENTATIONS)}"
        )
    model = build_wrapper(implementation, replace(saved_network(saved), device=device))
    try:
        model.restore(saved)
    except CheckpointError:
        raise
    except InputError as error:
        raise CheckpointError(f"{found.checkpoint} is inconsistent: {error}") from error
    return SavedModel(found, saved.step, saved.metric, implementation, model, saved.state, saved.metric_name)


def _recorded(state: Mapping[str, Any], group: str) -> str | None:
    """The name that the run's config has in a group; None for a model that a program saved."""
    config = state.get("config")
    chosen = config.get(group) if isinstance(config, Mapping) else None
    return str(chosen.get("name")) if isinstance(chosen, Mapping) else None
