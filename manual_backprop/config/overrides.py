"""Checks each override of a command line: can it be parsed, does its key exist, does its option exist?

A `Report` collects the mistakes. A misspelt name is replaced by the nearest right one, so that its value is checked too
and one report lists everything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from manual_backprop.common.errors import ConfigError
from manual_backprop.config.composition import Composer, is_choice, missing_extra
from manual_backprop.config.rules import SYNONYMS, Flag, Words, did_you_mean, nearest, shown
from manual_backprop.config.schema import EXPERIMENTS
from manual_backprop.config.validation import groups, is_text, keys, other_setting, suggestion

HYDRA_GROUPS = tuple(
    f"hydra/{name}" for name in ("launcher", "sweeper", "callbacks", "env", "job_logging", "hydra_logging")
)
OPEN_HYDRA_KEYS = ("hydra.sweeper", "hydra.launcher", "hydra.job.env_set", "hydra.callbacks")  # plugins' keys are below
FIXED_BY_CONFIG = {"hydra.run.dir": ".", "hydra.job.chdir": False, "hydra.output_subdir": None}  # by conf/config.yaml
# Hydra's settings that take effect in a single job, which runs without Hydra's main.
OBEYED_BY_ONE_JOB = ("hydra.mode", "hydra.verbose", "hydra.job.env_set")
READABLE_KEY = re.compile(r"(\+\+?|~)?[A-Za-z_][\w-]*([./][A-Za-z_][\w-]*)*(@\w[\w.]*(:\w[\w.]*)?)?", re.ASCII)


class Report:
    """Collects violations; it lists one that several jobs of a sweep share once."""

    def __init__(self) -> None:
        self.job: str | None = None  # the job that is being checked
        self.found: dict[str, list[str | None]] = {}
        self.unclear: set[str] = set()  # groups with an unknown option: violations of their default are not reported

    def add(self, violation: str) -> None:
        if self.job not in (jobs := self.found.setdefault(violation, [])):
            jobs.append(self.job)

    def add_all(self, violations: Sequence[str]) -> None:
        for violation in violations:
            if violation.partition("=")[0].partition(":")[0].partition(".")[0] not in self.unclear:
                self.add(violation)

    def raise_if_wrong(self, n_jobs: int) -> None:
        violations = []
        for violation, jobs in self.found.items():
            if jobs[0] is None or len(jobs) == n_jobs:
                violations.append(violation)
            else:
                violations.append(f"{violation} ({jobs[0]}{', and others' * (len(jobs) > 1)})")
        if violations:
            raise ConfigError(violations)


class RefusedError(Exception):
    """An override that is left out; the message is its violation."""


class OverrideReader:
    def __init__(self, composer: Composer, report: Report) -> None:
        self.composer = composer
        self.report = report

    def read(self, arguments: Sequence[str]) -> list[Override]:
        """The valid overrides, in the form that Hydra accepts."""
        accepted: list[Override] = []
        chosen: set[str] = set()
        for argument in _with_their_values(arguments):
            try:
                override = self._with_known_key(self._parse(argument))
                if not is_choice(key := override.key_or_group):
                    accepted.append(override)
                elif key not in chosen:
                    chosen.add(key)
                    accepted += self._with_known_options(override)
                elif argument.partition("=")[0] == key:
                    raise RefusedError(f"{shown(argument)}: {key} is given twice; leave one out")
            except RefusedError as error:
                self.report.add(str(error))
        return accepted

    def _parse(self, argument: str) -> Override:
        key, equals, value = argument.partition("=")
        if argument.startswith("-"):
            key, space, text = argument.partition(" ") if " " in argument.partition("=")[0] else (key, equals, value)
            name, given = key.lstrip("-"), text if space else None
            meant = self._meant_by_option(name, given)
            ending = other_setting(name, given) or did_you_mean(meant and shown(meant))
            raise RefusedError(f"{shown(argument)}: there is no such option{ending}")
        if not key or (not equals and not argument.startswith("~")):
            hint = did_you_mean(self._option(key) or _example(key))
            raise RefusedError(f"{shown(argument) or repr('')}: must be KEY=VALUE{hint}")
        if "_target_" in argument:
            raise RefusedError(
                f"{shown(argument)}: _target_ is not supported; choose a plugin, as in hydra/sweeper=basic"
            )
        try:
            return self.composer.parse(argument)
        except (HydraException, ValueError, RecursionError):
            named, at, _ = key.strip("+~").partition("@")
            quoted = "..." if set(value) & set("'\"\\$`!") or len(value) > 80 else shown(value)
            if READABLE_KEY.fullmatch(key):
                why = (
                    "cannot be read; a value with other characters than letters (a-z), digits and / - + . : @ % needs "
                    f"quotes inside quotes: \"{shown(key)}='{quoted}'\""
                )
            elif at and named in groups():
                why = f"a group has one place only; say {named}={shown(value)}"
            else:
                hint = did_you_mean(suggestion(named.strip("./ ")), otherwise=", as in model.d_model=64")
                why = f"must be KEY=VALUE, and {shown(key)} is not a key{hint}"
            raise RefusedError(f"{shown(argument)}: {why}") from None

    def _option(self, name: str) -> str | None:
        """GROUP=NAME, if `name` or its synonym here is an option of a group."""
        for spelling in (name, SYNONYMS.get(name.lower(), "")):
            if spelling and (group := next((one for one in groups() if spelling in self.composer.options(one)), None)):
                return f"{group}={spelling}"
        return None

    def _meant_by_option(self, name: str, value: str | None) -> str | None:
        """KEY=VALUE for an argument --NAME VALUE, as other programs have it."""
        if value is None:
            return self._option(name) or _example(name)
        meant = suggestion(name) if name else None
        if meant is not None and is_choice(meant):
            options = self.composer.options(meant)
            stem = Path(value).stem if meant == EXPERIMENTS else value
            value = stem if stem in options else nearest(stem, options) or "NAME"
        elif meant is not None and not _may_be(meant, value):
            value = "VALUE"
        return f"{meant}={value}" if meant else None

    def _with_known_key(self, override: Override) -> Override:
        key, line = override.key_or_group, str(override.input_line)
        value = line.partition("=")[2]
        if override.is_delete():
            raise RefusedError(
                f"{shown(line)}: a key cannot be deleted; every run needs every key. To change one, say KEY=VALUE"
            )
        if override.package is not None:
            raise RefusedError(f"{shown(line)}: a group has one place only; say {shown(key)}={shown(value)}")
        if key == "hydra" or override.is_hydra_override():
            self._check_hydra_key(override)
            return override
        if is_choice(key):
            if override.is_add() or override.is_force_add():
                self.report.add(f"{shown(line)}: {key} has an option already; to choose another, leave out the +")
            return self.composer.parse(f"{key}={value}")
        if key == "dataset.name" and value not in keys()[key].metadata["rule"].choices:
            key = "dataset.repository"  # dataset.name=OWNER/NAME names a dataset of the hub
        if key in keys() and key.endswith(".name"):
            group = key.partition(".")[0]
            raise RefusedError(f"{shown(line)}: the chosen option sets this key; say {group}={shown(value)}")
        if key in keys() and override.is_add():
            self.report.add(f"{shown(line)}: + adds a key, and {key} exists already; leave out the +")
        if key in keys() and isinstance(keys()[key].metadata["rule"], Words) and _is_list_of_words(override):
            value = f"[{value}]"  # a,b is one list for a key that holds a list; a sweep of it is [a],[b]
        is_tag = key.startswith("tags.") and key.count(".") == 1 and not key.endswith(".")
        if key in keys() or is_tag:
            # ++, since a file lists only the keys that its option uses; validation reports a key of another option
            return self.composer.parse(f"++{key}={value}")
        if ending := other_setting(key, value):
            raise RefusedError(f"{shown(line)}: there is no such key{ending}")
        group = key.partition("/")[0]
        meant = group if group in groups() else suggestion(key)
        violation = f"{shown(line)}: there is no such key{did_you_mean(meant)}"
        if meant is None or meant == "tags" or "/" in key or key.startswith(f"{meant}."):
            raise RefusedError(violation)
        self.report.add(violation)
        return self.composer.parse(f"{meant}={value}" if is_choice(meant) else f"++{meant}={value}")

    def _check_hydra_key(self, override: Override) -> None:
        """Raise RefusedError if there is no such setting of Hydra, or if it cannot be set here."""
        key, line = override.key_or_group, shown(override.input_line)
        if override.is_sweep_override():
            raise RefusedError(f"{line}: Hydra's own settings apply to all jobs; give one value")
        if key.startswith("hydra.sweeper.params"):
            raise RefusedError(
                f"{line}: give the values of a sweep as overrides, as in -m seed=1,2,3; hydra.sweeper.params belongs "
                "in an experiment's file"
            )
        if key in FIXED_BY_CONFIG:
            raise RefusedError(_fixed(line))
        if key == "hydra.searchpath":
            raise RefusedError(
                f"{line}: a folder of your own, with experiments/NAME.yaml in it, is given as --config-dir DIR"
            )
        if "/" in key:
            options = self.composer.options(key) if key in HYDRA_GROUPS else list(HYDRA_GROUPS)
            wanted = override.value() if key in HYDRA_GROUPS else key
            if wanted is None or wanted in options:
                return
            if key in HYDRA_GROUPS and (extra := missing_extra(f"{key}/{wanted}")):
                raise RefusedError(f"{line}: {extra}")
            hint = did_you_mean(nearest(str(wanted), options), otherwise=f"; there are {', '.join(options)}")
            raise RefusedError(f"{line}: there is no {'such option' if key in HYDRA_GROUPS else 'such group'}{hint}")
        node: Any = self.composer.compose([]).hydra
        known = "hydra"
        for part in key.split(".")[1:]:
            if not isinstance(node, DictConfig) or part not in node:
                if known.startswith(OPEN_HYDRA_KEYS):
                    return
                meant = nearest(part, list(map(str, node))) if isinstance(node, DictConfig) else None
                raise RefusedError(f"{line}: there is no such key{did_you_mean(meant and f'{known}.{meant}')}")
            known, node = f"{known}.{part}", None if OmegaConf.is_missing(node, part) else node[part]
        if key == "hydra":
            raise RefusedError(f"{line}: names all of Hydra's settings; give one of them, as in hydra.verbose=true")

    def _with_known_options(self, override: Override) -> list[Override]:
        """An override of a group with its valid options, if there are any; a misspelt one is replaced by the nearest
        right one."""
        group = override.key_or_group
        options = self.composer.options(group)
        raw = override._value
        if isinstance(raw, Glob):
            if raw.filter(options):
                return [override]
            self.report.unclear.add(group)
            raise RefusedError(f"{shown(override.input_line)}: matches none of {', '.join(options)}")
        found: list[str] = []
        for item in raw.list if isinstance(raw, ChoiceSweep) else [raw]:
            option = item.text if isinstance(item, QuotedString) else item
            if option is None and group == EXPERIMENTS:
                option = "none"
            if isinstance(option, str) and option in options:
                found.append(option)
                continue
            text = "" if isinstance(option, list | dict) else str(option)
            meant = nearest(text, options)
            hint = (other_device(text) if group == "device" else "") or did_you_mean(meant)
            self.report.add(f"{group}={shown(option)}: must be one of {', '.join(options)}{hint}")
            if meant:
                found.append(meant)
            else:
                self.report.unclear.add(group)
        return [self.composer.parse(f"{group}={','.join(found)}")] if found else []


def other_device(name: str) -> str:
    """A hint for a device that is named as in PyTorch (cuda:1, mps); empty otherwise."""
    kind, _, index = name.partition(":")
    if kind == "mps":
        return "; Apple's GPUs (mps) are not supported, use device=cpu"
    is_numbered = kind == "cuda" and index.isdecimal()
    return f"; the GPU number {index} is device=cuda device.index={index}" if is_numbered else ""


def _is_list_of_words(override: Override) -> bool:
    raw = override._value
    return isinstance(raw, ChoiceSweep) and all(isinstance(item, str | QuotedString) for item in raw.list)


def _with_their_values(arguments: Sequence[str]) -> list[str]:
    """The arguments, with an unknown option and its value (`--epochs 20`) joined into one."""
    joined: list[str] = []
    for argument in arguments:
        before = joined[-1] if joined else ""
        is_value = "=" not in argument and (not argument.startswith("-") or argument[1:2].isdigit())
        if before.startswith("-") and not set(before) & set("= ") and is_value and argument:
            joined[-1] = f"{before} {argument}"
        else:
            joined.append(argument)
    return joined


def _may_be(key: str, text: str) -> bool:
    """Whether a key can have this value; a text that is a number counts as a number."""
    value: str | float = text
    with suppress(ValueError):
        value = float(text)
    try:
        keys()[key].metadata["rule"].read(text if is_text(key) else value)
    except ValueError:
        return False
    return True


def refuse_settings_without_effect(settings: Sequence[Override], composed: DictConfig, report: Report) -> None:
    """Report Hydra settings that have no effect in a single job. `settings` are those of the command line, `composed`
    also has those of an experiment's file, whose launcher and sweeper are for sweeps only."""
    named = [str(override.key_or_group) for override in settings]
    for override, key in zip(settings, named, strict=True):
        if not f"{key}.".startswith(tuple(f"{obeyed}." for obeyed in OBEYED_BY_ONE_JOB)):
            report.add(
                f"{shown(override.input_line)}: is for the jobs of a sweep, and this is one job; add -m, or leave it "
                f"out (one job obeys {', '.join(OBEYED_BY_ONE_JOB)})"
            )
    for key, usual in FIXED_BY_CONFIG.items():
        if (value := OmegaConf.select(composed, key.removeprefix("hydra."))) != usual:
            report.add(_fixed(f"{key}={shown(value)}"))
    for group in ("hydra/job_logging", "hydra/hydra_logging"):
        if (option := composed.runtime.choices[group]) != "none" and group not in named:
            report.add(f"{group}={shown(option)}: a run writes its own log, run.log in its directory; leave it out")
    if composed.callbacks and not any(key.startswith(("hydra.callbacks", "hydra/callbacks")) for key in named):
        report.add(
            "hydra.callbacks: are called for the jobs of a sweep, and this is one job; add -m, or leave them out"
        )
    if not isinstance(composed.verbose, bool | str) and not OmegaConf.is_list(composed.verbose):
        report.add(f"hydra.verbose={shown(composed.verbose)}: must be true, false or names of loggers, as in [mlflow]")


def _fixed(setting: str) -> str:
    return (
        f"{setting}: is fixed, since every run creates its own directory below outputs/; to have outputs/ elsewhere, "
        "start the command there"
    )


def _example(key: str) -> str | None:
    """An example of how to set a key that was given without a value."""
    meant = suggestion(key) if key else None
    if meant is None:
        return None
    return f"{meant}=true" if meant in keys() and isinstance(keys()[meant].metadata["rule"], Flag) else f"{meant}=VALUE"
