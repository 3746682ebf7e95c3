"""Going on with a run: its own config, and what the command line names changed in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import RunConfig
from .errors import ConfigError, InputError
from .tracking import FoundRun, find_run
from .tracking.training_log import load_config
from .validation import groups, validate


def resumed_mapping(composed: dict[str, Any], overrides: Sequence[str], path: Path) -> dict[str, Any]:
    """The config of the run in `path`, with what `overrides` (KEY=VALUE) name taken from `composed`."""
    mapping = load_config(path)
    for override in overrides:
        key = override.partition("=")[0]
        group, _, inner = key.partition(".")
        if key == "experiments":
            raise ConfigError([f"{override}: a run is resumed with its own config; leave out experiments"])
        if inner and group in groups():
            mapping[group][inner] = composed[group].get(inner)
        elif group == "tags":
            mapping["tags"] = mapping.get("tags", {}) | composed["tags"]
        else:
            mapping[group] = composed[group]
    named = {override.partition("=")[0] for override in overrides}
    # config.yaml has values only; what follows from another key in conf/ follows from it here too
    takes_the_models = mapping["optimizer"]["name"] == "adamw"
    if takes_the_models and "model.learning_rate" in named and not named & {"optimizer", "optimizer.learning_rate"}:
        mapping["optimizer"]["learning_rate"] = mapping["model"]["learning_rate"]
    for key, other in (("max_steps", "num_epochs"), ("num_epochs", "max_steps")):
        if f"training.{key}" in named and f"training.{other}" not in named:
            mapping["training"][other] = None
    mapping["resume"] = composed["resume"]
    return mapping


def as_run_wants(composed: dict[str, Any], overrides: Sequence[str], outputs: Path) -> dict[str, Any]:
    """What the command line composed; where it resumes a run, that run's mapping instead. A run that is not there is
    the runner's to report."""
    if composed.get("resume") is None:
        return composed
    try:
        path = find_run(outputs, str(composed["resume"])).path
    except InputError:
        return composed
    return resumed_mapping(composed, overrides, path)


def resumed_config(config: RunConfig, overrides: Sequence[str], outputs: Path) -> tuple[RunConfig, FoundRun]:
    """The config to go on with, and the run. `config` is what the command line composed with today's defaults, of
    which only the keys and groups that `overrides` (KEY=VALUE) name count. Raises InputError, ConfigError.
    """
    assert config.resume is not None
    found = find_run(outputs, config.resume)
    return validate(resumed_mapping(config.to_dict(), overrides, found.path)), found
