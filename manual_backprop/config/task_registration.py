"""Registers a plugin's task with the configuration: its name, its keys, and the datasets that it can use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, make_dataclass
from typing import Any

from manual_backprop.common.errors import ConfigError
from manual_backprop.config import schema, task_rules, validation
from manual_backprop.config.plugins import add_name
from manual_backprop.config.rules import Rule


def add_task(
    name: str,
    network: str,
    datasets: Sequence[str],
    tokenizer: str | None,
    settings: Mapping[str, tuple[Rule, Any, str]],
) -> None:
    """Add the option task=NAME. Raises ConfigError.

    `network` is its default network, `datasets` those that it can use (("none",): it makes its own examples),
    `tokenizer` its default tokenizer (None: it reads no text). `settings` are its own keys, task.KEY: (rule, default,
    meaning).
    """
    base = validation.groups()["task"]  # the dataclass of the keys of all tasks so far
    known = {key.name for key in fields(base)}
    if taken := sorted(known & set(settings)):
        raise ConfigError([f"task {name}: task.{taken[0]} is a key already; choose another name"])
    add_name(name, schema.TASK_NAMES, "task")
    schema.DEFAULT_NETWORK[name], task_rules.DATASETS[name] = network, tuple(datasets)
    if tokenizer is not None:
        task_rules.DEFAULT_TOKENIZER[name] = tokenizer
    keys = [(key, Any, schema.setting(rule, about, only_for=(name,))) for key, (rule, _, about) in settings.items()]
    schema.RunConfig.__annotations__["task"] = make_dataclass(base.__name__, keys, bases=(base,), frozen=True)
    validation.groups.cache_clear()
    validation.keys.cache_clear()
    content: dict[str, Any] = {"name": name} | {key: value for key, (_, value, _) in settings.items()}
    if tuple(datasets) == ("none",):
        options = {"dataset": "none", "tokenizer": tokenizer or "none", "batching": "padded"}
        content["defaults"] = [{f"override /{group}@_global_.{group}": option} for group, option in options.items()]
    with suppress(ImportError):  # without Hydra nothing is composed
        from hydra.core.config_store import ConfigStore

        ConfigStore.instance().store(group="task", name=name, node=content)
