"""Composing a config from `conf/` and `experiments/` with Hydra, without its job directories, logging and launchers."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from antlr4 import CommonTokenStream, InputStream
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.overrides_visitor import HydraOverrideVisitor
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from manual_backprop.common.errors import ConfigError
from manual_backprop.config.rules import Word, shown
from manual_backprop.config.schema import EXPERIMENTS, model_sizes, shipped_folder
from manual_backprop.config.validation import groups, is_text, keys

# Launchers and sweepers that an extra of this package installs -> the name of the extra.
EXTRAS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit", "optuna": "optuna"}
_RESOLVER = re.compile(r"(?<!\\)\$\{[^${}]*:")  # ${oc.env:HOME}, ${now:%Y}


class ExperimentsSearchPath(SearchPathPlugin):
    """Makes `experiments/` a config group, and adds the user's folder from `--config-dir`."""

    own_folder: str | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("manual_backprop", str(shipped_folder(EXPERIMENTS).parent))
        if self.own_folder is not None:
            search_path.prepend("command-line", self.own_folder)


def find_experiments() -> None:
    """Tell Hydra where `experiments/` is. Call this before the first composition."""
    Plugins.instance().register(ExperimentsSearchPath)


class _Typed(HydraOverrideVisitor):
    """Parses an override, keeping numbers, true and false as the text that was typed."""

    def visitPrimitive(self, ctx: OverrideParser.PrimitiveContext) -> Any:
        value = super().visitPrimitive(ctx)
        return QuotedString(ctx.getText().strip(), Quote.single) if isinstance(value, int | float) else value


def _as_value(value: Any) -> str:
    """A parsed value as text for the right side of an override."""
    if not isinstance(value, ChoiceSweep):
        return Override._get_value_element_as_str(value)
    texts = [QuotedString(item, Quote.single) if isinstance(item, str) else item for item in value.list]
    listed = ",".join(map(Override._get_value_element_as_str, value.list if value.simple_form else texts))
    text = listed if value.simple_form else f"choice({listed})"
    return f"shuffle({text})" if value.shuffle else text


class _ReadOnce(CachingConfigRepository):
    """Reads each file once for all jobs. Hydra copies its repository for every composition and would lose its cache.
    `load_config` returns a copy, since compositions merge into it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_ReadOnce":
        return self

    def load_config(self, config_path: str) -> ConfigResult | None:
        return copy.deepcopy(super().load_config(config_path))


class Composer:
    """Parses overrides and composes configurations; it caches the result for each set of choices."""

    def __init__(self, loader: ConfigLoaderImpl) -> None:
        self.loader = loader
        once: Any = _ReadOnce(loader.repository)
        loader.repository = once
        self.parser = OverridesParser.create(config_loader=loader)
        self.composed: dict[tuple[str, ...], DictConfig] = {}
        self.ours: dict[int, Any] = {}  # id of a composed config -> its part without Hydra's own settings
        self.listed: dict[str, list[str]] = {}

    def parse(self, line: str) -> Override:
        """The parsed override. Raises HydraException or ValueError if the line is not one.

        A key that holds text keeps its value as it was typed, as if quoted: `resume=12e345` is not a number.
        """
        override = self.parser.parse_overrides([line])[0]
        if not is_choice(key := override.key_or_group) and not is_text(key):
            return override
        try:
            value = self._as_typed(line)
            if value == override._value:
                return override
            return self.parser.parse_overrides([f"{override.get_key_element()}={_as_value(value)}"])[0]
        except (HydraException, TypeError):  # a function of numbers, as in range(1,3)
            return override

    def _as_typed(self, line: str) -> Any:
        """The value of a valid line as the text that was typed."""
        parser = OverrideParser(CommonTokenStream(OverrideLexer(InputStream(line))))
        return _Typed(self.parser.functions).visit(parser.override())._value

    def options(self, group: str) -> list[str]:
        """A group's options: models sorted by size, experiments by name, others in the order of the rule's choices."""
        if group not in self.listed:
            self.listed[group] = self._options(group)
        return self.listed[group]

    def _options(self, group: str) -> list[str]:
        names = [name for name in self.loader.repository.get_group_options(group) if not name.startswith("_")]
        if group == "model":
            sizes = model_sizes()
            return sorted(names, key=lambda name: (sizes.get(name, {}).get("d_model") or 0, name))
        rule = keys()[f"{group}.name"].metadata["rule"] if f"{group}.name" in keys() else None
        order = rule.choices if isinstance(rule, Word) else ("none",)
        return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))

    def compose(self, choices: Sequence[str]) -> DictConfig:
        """The config for these options of groups and overrides of Hydra's own settings. It is cached: do not change it.
        Raises ConfigError."""
        key = tuple(choices)
        if key not in self.composed:
            try:
                self.composed[key] = self.loader.load_configuration(
                    "config", list(choices), RunMode.RUN, validate_sweep_overrides=False
                )
            except Exception as error:  # Hydra's merging lets AttributeError, AssertionError and others through
                raise ConfigError([missing_extra(str(error)) or in_words(error)]) from error
        return self.composed[key]

    def with_values(self, base: DictConfig, values: Sequence[Override]) -> dict[str, Any]:
        """The mapping of one job: the composed config with `values` set and ${...} resolved. Raises ConfigError."""
        if id(base) not in self.ours:
            ours = OmegaConf.masked_copy(base, [str(key) for key in base if key != "hydra"])
            self.ours[id(base)] = OmegaConf.to_container(ours, resolve=False)
        try:
            changed = OmegaConf.create(self.ours[id(base)])
            ConfigLoaderImpl._apply_overrides_to_config(list(values), changed)
            refuse_resolvers(changed)
            return _resolved(changed)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError([in_words(error)]) from error


@contextmanager
def composer() -> Iterator[Composer]:
    """A Composer of `conf/` and `experiments/`, while Hydra is initialized for it."""
    find_experiments()
    with initialize_config_dir(str(shipped_folder("conf")), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        assert isinstance(hydra.config_loader, ConfigLoaderImpl)
        yield Composer(hydra.config_loader)


def plain(composed: DictConfig) -> dict[str, Any]:
    """A composed config without Hydra's own settings, with every ${...} resolved."""
    return _resolved(OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"]))


def _resolved(ours: DictConfig) -> dict[str, Any]:
    resolved = OmegaConf.to_container(ours, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def refuse_resolvers(composed: DictConfig) -> None:
    """Raise ConfigError for each value that uses a resolver, such as ${oc.env:HOME}; ${another.key} is allowed.

    A value from the environment would make the same files describe different runs, and the runs' records would hold it.
    """
    violations = []
    pending: list[tuple[str, Any]] = [("", OmegaConf.to_container(composed, resolve=False))]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{key}.{name}" if key else str(name), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            pending += [(key, inner) for inner in value]
        elif isinstance(value, str) and _RESOLVER.search(value):
            violations.append(
                f"{key}={shown(value)}: a value can refer only to a key, as in ${{model.d_model}}; give the value "
                'itself (the shell fills in "$HOME")'
            )
    if violations:
        raise ConfigError(sorted(violations))


def missing_extra(text: str) -> str | None:
    """What to install, if `text` names a launcher or a sweeper whose plugin is not installed."""
    found = re.search(rf"hydra/(launcher|sweeper)/({'|'.join(EXTRAS)})\b", text)
    if found is None:
        return None
    extra = EXTRAS[found[2]]
    return f"the {found[1]} {found[2]} is not installed; pip install 'manual-backprop[{extra}]'"


def in_words(error: BaseException) -> str:
    """The message of Hydra or OmegaConf in one line, with the key. Its later lines, about internals, are left out."""
    cause: BaseException | None = error
    while cause is not None:
        message = str(getattr(cause, "msg", None) or cause).strip()
        if isinstance(cause, OmegaConfBaseException) and message:
            key = cause.full_key or ""
            return f"{key}: {message.splitlines()[0]}" if key else message.splitlines()[0]
        if cause.__cause__ is None or isinstance(cause.__cause__, type(cause)):
            return " ".join(line.strip() for line in message.splitlines()[:2]) or type(cause).__name__
        cause = cause.__cause__
    return str(error)


def is_choice(key: str) -> bool:
    """Whether a key selects an option of a group of `conf/`, or an experiment."""
    return key in groups() or key == EXPERIMENTS
