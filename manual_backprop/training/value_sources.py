"""Where each value of a run was set: by a default, the option of a group, an experiment, or the command line.

`plan=true` shows it, and every run keeps it as `config_sources.json` beside its config. A value that another key gives,
as in `learning_rate: ${model.learning_rate}`, is followed to where that one was set.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from manual_backprop.common.errors import InputError
from manual_backprop.common.json_files import flattened
from manual_backprop.common.origin import SOURCES
from manual_backprop.config.composition import EXPERIMENTS, is_choice
from manual_backprop.config.schema import RunConfig
from manual_backprop.trained_models.initial_weights import SET_HERE

COMMAND_LINE = "command line"
RESUMED = "the run that goes on"
INITIAL = "init_from"
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # ${other.key}


def value_sources(
    config: RunConfig, overrides: Sequence[str], runtime: DictConfig, outputs: Path | None = None
) -> dict[str, str]:
    """The source of every dotted key of a job. `overrides` are its KEY=VALUE, `runtime` is Hydra's `hydra.runtime`,
    which knows the option of each group and the folders that the files came from; `outputs` is where a run that goes
    on is looked for."""
    layers = _Layers(overrides, runtime)
    keys = [key for key, _ in flattened(config.to_dict())]
    sources = {key: layers.source(key) for key in keys}
    if config.init_from is not None:
        sources |= {key: INITIAL for key in SET_HERE if key in sources and not layers.is_named(key)}
    if config.resume is not None:
        kept = _kept_sources(outputs, config.resume)
        for key in keys:
            if key != "resume" and not layers.is_named(key):
                sources[key] = kept.get(key, RESUMED)
    return sources


def _kept_sources(outputs: Path | None, resume: str) -> dict[str, str]:
    """What the run that goes on wrote down when it started."""
    from manual_backprop.tracking.run_directory import find_run

    try:
        path = find_run(outputs or Path("outputs"), resume).path / SOURCES
        return {str(key): str(source) for key, source in json.loads(path.read_text(encoding="utf-8")).items()}
    except (InputError, OSError, ValueError, AttributeError):
        return {}  # an older run, or none: the run itself says what is wrong with it


class _Layers:
    """What sets values, from the last word to the first: the command line, an experiment, options, conf/config.yaml."""

    def __init__(self, overrides: Sequence[str], runtime: DictConfig):
        pairs = [override.lstrip("+").partition("=") for override in overrides]
        self.options = {key: value for key, _, value in pairs if is_choice(key)}
        self.commanded = {key: value for key, _, value in pairs if not is_choice(key)}
        self.choices = {str(group): str(option) for group, option in runtime.choices.items()}
        self.folders = tuple(Path(source.path) for source in runtime.config_sources if source.schema == "file")
        self.experiment = f"{EXPERIMENTS}={self.choices[EXPERIMENTS]}"
        content = self._file(f"{EXPERIMENTS}/{self.choices[EXPERIMENTS]}")
        self.chosen = _overridden(content)
        self.tasks = _overridden(self._file(f"task/{self.choices['task']}"))
        sweeper = (content.pop("hydra", None) or {}).get("sweeper") or {}
        self.swept = {str(key).lstrip("+") for key in sweeper.get("params") or {}}
        self.experimental = dict(flattened(content))

    def is_named(self, key: str) -> bool:
        """Whether the command line names a key or its group."""
        return key.partition(".")[0] in self.options or self._commanded(key) is not None

    def source(self, key: str, depth: int = 0) -> str:
        source, raw = self._layer(key)
        reference = _REFERENCE.search(raw) if isinstance(raw, str) else None
        if reference is None or depth > 5:  # a circle was refused when the config was composed
            return source
        return f"{source}: {reference[0]}, from {self.source(reference[1], depth + 1)}"

    def _layer(self, key: str) -> tuple[str, Any]:
        """Who set a key last, and what is written there."""
        commanded = self._commanded(key)
        if commanded is not None:
            return (f"{self.experiment}, swept" if commanded in self.swept else COMMAND_LINE), self.commanded[commanded]
        if key in self.experimental:
            return self.experiment, self.experimental[key]
        group, _, inner = key.partition(".")
        if group not in self.choices:
            return "default", dict(flattened(self._file("config"))).get(key)
        option = f"{group}={self.choices[group]}"
        if group in self.options:
            source = f"{option}, swept by {self.experiment}" if group in self.swept else option
        elif group in self.chosen:
            source = f"{option}, chosen by {self.experiment}"
        elif group in self.tasks:
            source = f"{option}, chosen by task={self.choices['task']}"
        else:
            source = f"default ({option})"
        return source, self._file(f"{group}/{self.choices[group]}").get(inner)

    def _commanded(self, key: str) -> str | None:
        """The key that the command line names: this one, or a whole mapping as in tags={note:first}."""
        return next((given for given in self.commanded if key == given or key.startswith(given + ".")), None)

    def _file(self, name: str) -> dict[str, Any]:
        return dict(_content(name, self.folders))


def _overridden(content: dict[str, Any]) -> set[str]:
    """The groups of which a file chooses the option; takes its list of defaults out of the content."""
    return {
        str(key).removeprefix("override ").removeprefix("/").partition("@")[0]
        for entry in content.pop("defaults", None) or []
        if isinstance(entry, dict)
        for key in entry
    }


@lru_cache(maxsize=256)
def _content(name: str, folders: tuple[Path, ...]) -> dict[str, Any]:
    """A file of `conf/` or `experiments/` as it is written, from the first folder that has it."""
    path = next((path for folder in folders if (path := folder / f"{name}.yaml").is_file()), None)
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path else None
    except (OSError, OmegaConfBaseException):
        content = None
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}
