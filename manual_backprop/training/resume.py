"""Resumes a run: which one, with which config, and whether it is still the same run. Refusing needs no torch.

A run resumes with its own config; the command line overrides single keys. The network, the data and their order must
not change. Settings of the remaining steps may: the learning rate and its schedule, the number of steps, weight decay
and the like, dropout, label smoothing, the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint, CheckpointManager, read_state
from ..common.errors import CheckpointError, ConfigError, InputError
from ..config.network import ARCHITECTURES, NORM_EPSILONS, ROTARY_BASE
from ..config.rules import shown
from ..config.schema import DEFAULT_NETWORK, RunConfig
from ..config.validation import groups, validate, with_defaults
from ..optim.improvement import Improvement
from ..tracking import RunDirectory, find_run, flatten
from ..tracking.run_directory import own_run_directory
from ..tracking.training_log import load_config
from ..trained_models.initial_weights import with_initial_model

# The state in every run's checkpoint, besides its tensors; run_state.py writes it. A task adds the digests of what its
# examples depend on (`Task.digests`).
STATE = {"config": dict, "network": dict, "dataset_digest": str, "metrics_length": int, "made_with": dict}
_MUST_STAY = (
    *("model.", "architecture.", "tokenizer.", "dataset.name", "precision.name", "optimizer.name", "seed", "init_from"),
    *("task.", "network", "batching.", "dataset.max_length"),
    *("training.batch_size", "training.gradient_accumulation_steps", "training.overfit_batches"),
)
_MAY_CHANGE = {
    *("model.dropout", "model.learning_rate", "architecture.learning_rate_scale"),
    "tokenizer.path",  # its content must not change, which is checked when it is loaded
}
# no result depends on these
NAMES_ONLY = ("resume", "run_name", "experiment_name", "tags.", "plan", "plugins", "tracking.")


@dataclass(frozen=True)
class Resumed:
    """A run that this process owns, and the checkpoint that it resumes from."""

    directory: RunDirectory
    checkpoint: Checkpoint


def job_config(
    composed: dict[str, Any], overrides: Sequence[str], outputs: Path, base: Path | None = None
) -> RunConfig:
    """The config of a job: what the command line composed. If it resumes a run, the run's own config with the
    `overrides` (KEY=VALUE), and the checkpoint's path as `resume`. Raises ConfigError with everything that is wrong
    with it. A missing run is reported elsewhere. `base` is the directory of a run that is repeated with its own config.
    """
    if base is not None:
        return validate(with_overrides(base, composed, overrides) | {"resume": None})
    if composed.get("resume") is None:
        return validate(with_initial_model(composed, overrides, outputs))
    try:
        found = find_run(outputs, str(composed["resume"]))
    except InputError:
        return validate(composed)
    mapping = with_overrides(found.path, composed, overrides)
    config = validate(mapping | {"resume": str(found.checkpoint or found.path)})
    try:
        checkpoint = CheckpointManager(found.path / "checkpoints").verified(found.checkpoint)
        refuse_another_run(config, found.path, checkpoint)
    except CheckpointError as error:
        raise ConfigError([f"resume={shown(composed['resume'])}: {error}"]) from error
    return config


def with_overrides(path: Path, composed: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The config of the run in `path`; the keys that `overrides` (KEY=VALUE) name have their value from `composed`."""
    mapping = config_of_run(path).to_dict()
    for override in overrides:
        key = override.partition("=")[0]
        group, _, inner = key.partition(".")
        if key == "experiments":
            raise ConfigError([f"{override}: a run resumes with its own config; leave out experiments"])
        if inner and group in groups():
            mapping[group][inner] = composed[group].get(inner)
        elif group == "tags":
            mapping["tags"] = mapping.get("tags", {}) | composed["tags"]
        else:
            mapping[group] = composed[group]
    named = {override.partition("=")[0] for override in overrides}
    # config.yaml has values only; a key that conf/ derives from another key is derived here too
    takes_the_models = mapping["optimizer"]["name"] == "adamw"
    if takes_the_models and "model.learning_rate" in named and not named & {"optimizer", "optimizer.learning_rate"}:
        mapping["optimizer"]["learning_rate"] = mapping["model"]["learning_rate"]
    for key, other in (("max_steps", "num_epochs"), ("num_epochs", "max_steps")):
        if f"training.{key}" in named and f"training.{other}" not in named:
            mapping["training"][other] = None
    return mapping


def config_of_run(path: Path) -> RunConfig:
    """The config of the run in `path`. Raises ConfigError."""
    mapping = load_config(path)
    try:
        return validate(with_defaults(mapping))
    except ConfigError as error:
        why = error.violations if mapping else ["it is missing or empty"]
        raise ConfigError([f"{path / 'config.yaml'} is not the config of a run: {'; '.join(why)}"]) from error


def open_resumed(config: RunConfig, outputs: Path, owned: bool = True) -> Resumed:
    """Takes ownership of the run that `config.resume` names, and loads its checkpoint. `owned=False`: another process
    of the run owns it.

    Raises RunInUseError while another process owns it, CheckpointError and ConfigError if it cannot be resumed.
    """
    assert config.resume is not None
    found = find_run(outputs, config.resume)
    directory = own_run_directory(found.path) if owned else RunDirectory(found.path, None)
    try:
        checkpoint = CheckpointManager(directory.checkpoints).load(found.checkpoint)
        refuse_another_run(config, directory.path, checkpoint.path)
        if set(checkpoint.tensors) != {"parameters", "optimizer"}:
            raise CheckpointError(f"{checkpoint.path} was not saved by a run: it lacks parameters or optimizer")
    except BaseException:
        directory.release()
        raise
    return Resumed(directory, checkpoint)


def refuse_another_run(config: RunConfig, run: Path, checkpoint: Path) -> None:
    """Raises ConfigError with every difference that prevents resuming, as far as it shows without building the run;
    CheckpointError if the checkpoint, though intact, was not saved by a run, or not by this one."""
    content = read_state(checkpoint)
    state = content["state"]
    if wrong := sorted(name for name, kind in STATE.items() if not isinstance(state.get(name), kind)):
        raise CheckpointError(
            f"{checkpoint} was not saved by a run of this version: its state lacks {', '.join(wrong)}"
        )
    try:
        Improvement.of(state.get("improvement"))
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint} is not a run's: {error}") from error
    before, now = flatten(with_defaults(state["config"])), flatten(config.to_dict())
    before["model.vocab_size"] = state["network"].get("vocab_size")
    if now.get("model.vocab_size") is None:
        now["model.vocab_size"] = before["model.vocab_size"]  # set by the tokenizer: checked when that is loaded
    as_in = f"as in {checkpoint.name} of {run.name}; for another one start a new run"
    differences = [
        f"{name.removesuffix('.name')}={shown(now.get(name))}: must stay {shown(before.get(name))}, {as_in}"
        for name in _differing(before, now)
        if name.startswith(_MUST_STAY) and name not in _MAY_CHANGE
    ]
    if differences:
        raise ConfigError(differences)
    _check_metrics(run, state["metrics_length"])


def changed_settings(config: RunConfig, checkpoint: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """The settings that change for the remaining steps: {key: (before, now)}."""
    before, now = flatten(with_defaults(checkpoint.state["config"])), flatten(config.to_dict())
    return {
        name: (before.get(name), now.get(name)) for name in _differing(before, now) if not name.startswith(NAMES_ONLY)
    }


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys whose meaning differs between two flat configs; null equals the value that it stands for."""
    meant_before, meant_now = _meant(before), _meant(now)
    return [
        name
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and meant_before.get(name) != meant_now.get(name)
    ]


def _meant(flat: dict[str, Any]) -> dict[str, Any]:
    usual = {"model.n_kv_heads": flat.get("model.n_heads"), "architecture.rotary_base": ROTARY_BASE}
    usual["task.name"] = RunConfig.task.name  # runs of versions without tasks
    usual["network"] = DEFAULT_NETWORK.get(flat.get("task.name") or RunConfig.task.name)
    if traits := ARCHITECTURES.get(flat.get("architecture.name", "")):
        usual["architecture.norm_epsilon"] = NORM_EPSILONS[traits.norm]
    return flat | {name: value for name, value in usual.items() if flat.get(name) is None}


def _check_metrics(run: Path, length: int) -> None:
    """Raises an error unless metrics.jsonl has the length that the checkpoint recorded; changes nothing."""
    file = run / "metrics.jsonl"
    try:
        with file.open("rb") as metrics:
            metrics.seek(max(0, length - 1))
            if length > 0 and metrics.read(1) == b"\n":
                return
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}): a run resumes with its own metrics"
        ) from error
    raise CheckpointError(
        f"{file} has no line that ends at byte {length}, the length that the checkpoint recorded: it is not the file "
        "of this checkpoint's run"
    )
