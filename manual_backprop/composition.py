"""How Hydra composes `conf/` and `experiments/`, without its job directories, logging and launchers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from manual_backprop.config import model_sizes, shipped_folder
from manual_backprop.errors import ConfigError
from manual_backprop.rules import Word
from manual_backprop.validation import groups, keys

EXPERIMENTS = "experiments"


class ExperimentsSearchPath(SearchPathPlugin):
    """Makes `experiments/` a config group, and lets `--config-dir` add a folder of one's own."""

    own_folder: str | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("manual_backprop", f"file://{shipped_folder(EXPERIMENTS).parent}")
        if self.own_folder is not None:
            search_path.prepend("command-line", f"file://{self.own_folder}")


def find_experiments() -> None:
    """Tells Hydra where `experiments/` is; before its first composition."""
    Plugins.instance().register(ExperimentsSearchPath)


class Composer:
    """Reads overrides and composes configurations. What was composed for the same choices is kept."""

    def __init__(self, loader: ConfigLoaderImpl) -> None:
        self.loader = loader
        once: Any = CachingConfigRepository(loader.repository)  # each file is read once, for all jobs
        loader.repository = once
        self.parser = OverridesParser.create(config_loader=loader)
        self.composed: dict[tuple[str, ...], DictConfig] = {}

    def parse(self, line: str) -> Override:
        """Raises HydraException or ValueError where it is no override."""
        return self.parser.parse_overrides([line])[0]

    def options(self, group: str) -> list[str]:
        """The options of a group: models by their size, others as their rule lists them, experiments by name."""
        names = [name for name in self.loader.get_group_options(group) if not name.startswith("_")]
        if group == "model":
            sizes = model_sizes()
            return sorted(names, key=lambda name: (sizes.get(name, {}).get("d_model") or 0, name))
        rule = keys()[f"{group}.name"].metadata["rule"] if f"{group}.name" in keys() else None
        order = rule.choices if isinstance(rule, Word) else ("none",)
        return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))

    def compose(self, choices: Sequence[str]) -> DictConfig:
        """What an option for each group, and overrides of Hydra's own settings, make. Not to be changed."""
        key = tuple(choices)
        if key not in self.composed:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Hydra says them again when it runs the job
                    self.composed[key] = self.loader.load_configuration(
                        "config", list(choices), RunMode.RUN, validate_sweep_overrides=False
                    )
            except Exception as error:  # Hydra's merging lets AttributeError, AssertionError and others through
                raise ConfigError([in_words(error)]) from error
        return self.composed[key]

    def with_values(self, base: DictConfig, values: Sequence[Override], number: int = 0) -> dict[str, Any]:
        """The mapping that a job gets: what its choices make, changed by its values; every ${...} resolved."""
        try:
            with read_write(base.hydra), open_dict(base.hydra.job):
                base.hydra.job.num, base.hydra.job.id = number, str(number)
            HydraConfig.instance().set_config(base)  # where ${hydra:...} looks
            ours = OmegaConf.masked_copy(base, [str(key) for key in base if key != "hydra"])
            ConfigLoaderImpl._apply_overrides_to_config(list(values), ours)
            return plain(ours)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError([in_words(error)]) from error


@contextmanager
def composer() -> Iterator[Composer]:
    find_experiments()
    with initialize_config_dir(str(shipped_folder("conf")), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        assert isinstance(hydra.config_loader, ConfigLoaderImpl)
        try:
            yield Composer(hydra.config_loader)
        finally:
            HydraConfig.instance().cfg = None


def plain(composed: DictConfig) -> dict[str, Any]:
    """What Hydra composed, without Hydra's own settings, every ${...} resolved."""
    ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    resolved = OmegaConf.to_container(ours, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def in_words(error: BaseException) -> str:
    """What Hydra or OmegaConf has to say, in one line and with the key; their later lines show their own insides."""
    cause: BaseException | None = error
    while cause is not None:
        told = str(getattr(cause, "msg", None) or cause).strip()
        if isinstance(cause, OmegaConfBaseException) and told:
            key = cause.full_key or ""
            return f"{key}: {told.splitlines()[0]}" if key else told.splitlines()[0]
        if cause.__cause__ is None or isinstance(cause.__cause__, type(cause)):
            return " ".join(line.strip() for line in told.splitlines()[:2]) or type(cause).__name__
        cause = cause.__cause__
    return str(error)


def is_choice(key: str) -> bool:
    """Whether a key chooses an option of a group of `conf/`, or an experiment."""
    return key in groups() or key == EXPERIMENTS
