"""Where each value of a run was set: by a default, the option of a group, an experiment, or the command line.

`plan=true` shows it, and every run keeps it as `config_sources.json` beside its config. A value that refers to another
key, as in `learning_rate: ${model.learning_rate}`, has the source of that key.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from manual_backprop.common.errors import InputError
from manual_backprop.common.json_files import flattened
from manual_backprop.common.origin import SOURCES
from manual_backprop.config.composition import is_choice
from manual_backprop.config.schema import EXPERIMENTS, RunConfig
from manual_backprop.config.validation import groups, is_text, keys
from manual_backprop.trained_models.initial_weights import SET_HERE

COMMAND_LINE = "command line"
RESUMED = "the resumed run"
INITIAL = "init_from"
LENGTHS = ("training.max_steps", "training.num_epochs")  # a run has one of them
_PARAMETERS = "hydra.sweeper.params."
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # ${other.key}


def value_sources(
    config: RunConfig, overrides: Sequence[str], runtime: DictConfig, outputs: Path | None = None
) -> dict[str, str]:
    """The source of every dotted key of a job. `overrides` are its KEY=VALUE. `runtime` is Hydra's `hydra.runtime`,
    with the option of each group and the folders of the files. `outputs` is the folder in which a resumed run is
    found."""
    layers = _Layers(overrides, runtime)
    keys = [key for key, _ in flattened(config.to_dict())]
    sources = {key: layers.source(key) for key in keys}
    if config.resume is None and (outranked := layers.other_length()) is not None:
        sources[outranked[0]] = f"null, since {outranked[1]} was given: {sources[outranked[1]]}"
    if config.init_from is not None:
        sources |= {key: INITIAL for key in SET_HERE if key in sources and not layers.is_named(key)}
    if config.resume is not None:
        kept = _kept_sources(outputs, config.resume)
        for key in keys:
            if key != "resume" and not layers.is_named(key):
                sources[key] = kept.get(key, RESUMED)
    return sources


def as_meant(composed: Mapping[str, Any], overrides: Sequence[str], runtime: DictConfig) -> dict[str, Any]:
    """What Hydra composed for a job, with two corrections. Keys that are text get the text of their file (YAML reads
    2024_01_15 as a number). And of max_steps and num_epochs only the one with the stronger source remains: the command
    line overrides an experiment, for example, and an experiment a default."""
    layers = _Layers(overrides, runtime)
    mapping = {name: dict(value) if isinstance(value, Mapping) else value for name, value in composed.items()}
    for key in _text_keys(mapping):
        group, _, inner = key.partition(".")
        place, name = (mapping[group], inner) if inner else (mapping, group)
        raw = layers.written(key)
        if isinstance(raw, str | list) and _REFERENCE.search(str(raw)) is None and name in place:
            place[name] = raw
    if (outranked := layers.other_length()) is not None:
        mapping["training"][outranked[0].partition(".")[2]] = None
    return mapping


def _text_keys(mapping: Mapping[str, Any]) -> list[str]:
    """The keys of a mapping whose values are text; tags one by one."""
    tags = mapping.get("tags")
    inner = [f"tags.{name}" for name in tags] if isinstance(tags, Mapping) else []
    own = [key for key in keys() if key != "tags" and is_text(key)]
    return inner + [key for key in own if "." not in key or isinstance(mapping.get(key.partition(".")[0]), Mapping)]


def planned(parameters: Mapping[str, Any], runtime: DictConfig) -> dict[str, str]:
    """What the experiment sweeps (`hydra.sweeper.params`), as written in its file."""
    there = _Layers((), runtime).parameters
    return {str(key): str(there.get(key, value)) for key, value in parameters.items()}


def _kept_sources(outputs: Path | None, resume: str) -> dict[str, str]:
    """The sources that the resumed run recorded when it started."""
    from manual_backprop.tracking.run_directory import find_run

    try:
        path = find_run(outputs or Path("outputs"), resume).path / SOURCES
        return {str(key): str(source) for key, source in json.loads(path.read_text(encoding="utf-8")).items()}
    except (InputError, OSError, ValueError, AttributeError):
        return {}  # an older run, or a missing one, which is reported elsewhere


class _Layers:
    """The layers that set values, strongest first: the command line, an experiment, options, conf/config.yaml."""

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
        self.parameters = {str(key): value for key, value in (sweeper.get("params") or {}).items()}
        self.swept = {key.lstrip("+") for key in self.parameters}
        self.experimental = dict(flattened(content))

    def is_named(self, key: str) -> bool:
        """Whether the command line names a key or its group."""
        return key.partition(".")[0] in self.options or self._commanded(key) is not None

    def written(self, key: str) -> Any:
        """The value of a key as written in a file; None if the command line sets it."""
        return None if self._commanded(key) is not None else self._layer(key)[1]

    def other_length(self) -> tuple[str, str] | None:
        """(the overridden length, the overriding length) of max_steps and num_epochs; None if there is no conflict."""
        places = [2 if self._commanded(key) is not None else int(key in self.experimental) for key in LENGTHS]
        values = [self._layer(key)[1] for key in LENGTHS]
        if places[0] == places[1] or any(value is None or value == "null" for value in values):
            return None
        return (LENGTHS[0], LENGTHS[1]) if places[0] < places[1] else (LENGTHS[1], LENGTHS[0])

    def source(self, key: str, depth: int = 0) -> str:
        source, raw = self._layer(key)
        reference = _REFERENCE.search(raw) if isinstance(raw, str) else None
        if reference is None or depth > 5:  # composing the config has refused cycles
            return source
        return f"{source}: {reference[0]}, from {self.source(reference[1], depth + 1)}"

    def _layer(self, key: str) -> tuple[str, Any]:
        """The layer that set a key last, and the value written there."""
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
        """The key on the command line that sets this one: itself, or a whole mapping as in tags={note:first}."""
        return next((given for given in self.commanded if key == given or key.startswith(given + ".")), None)

    def _file(self, name: str) -> dict[str, Any]:
        return dict(_content(name, self.folders))


def _overridden(content: dict[str, Any]) -> set[str]:
    """The groups whose option a file chooses; removes its list of defaults from the content."""
    return {
        str(key).removeprefix("override ").removeprefix("/").partition("@")[0]
        for entry in content.pop("defaults", None) or []
        if isinstance(entry, dict)
        for key in entry
    }


@lru_cache(maxsize=256)
def _content(name: str, folders: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a file of `conf/` or `experiments/`, from the first folder that has it."""
    path = next((path for folder in folders if (path := folder / f"{name}.yaml").is_file()), None)
    try:
        if path is None:
            return {}
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, OmegaConfBaseException, yaml.YAMLError):
        return {}
    group = name.partition("/")[0]
    return _with_text(content, node, f"{group}." if group in groups() else "") if isinstance(content, dict) else {}


def _with_text(content: dict[Any, Any], node: Any, prefix: str) -> dict[str, Any]:
    """A mapping read from YAML, with the written text for keys that are text."""
    nodes = {key.value: value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}
    read = {}
    for key, value in content.items():
        name, inner = f"{prefix}{key}", nodes.get(str(key))
        if isinstance(value, dict):
            value = _with_text(value, inner, f"{name}.")
        elif is_text(name) or name.startswith(_PARAMETERS):
            value = _as_written(value, inner)
        read[str(key)] = value
    return read


def _as_written(value: Any, node: Any) -> Any:
    if isinstance(value, list) and isinstance(node, yaml.SequenceNode):
        return [_as_written(item, inner) for item, inner in zip(value, node.value, strict=True)]
    is_number = isinstance(value, int | float) and isinstance(node, yaml.ScalarNode)
    return node.value if is_number else value
