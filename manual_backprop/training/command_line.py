"""The command line of a run: read by Hydra's own parser, checked for all jobs of a sweep before anything is built.

`check` composes every job and returns its RunConfig, or raises one ConfigError that lists everything that is wrong:
unknown keys and options (with the nearest that exists), bad values, and keys that contradict one another. It runs
nothing, writes nothing and does not import torch. `run.py` runs what it returns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, RangeSweep
from hydra.types import RunMode
from omegaconf import DictConfig

from manual_backprop.common.errors import ConfigError, InputError
from manual_backprop.config.composition import Composer, composer, is_choice
from manual_backprop.config.overrides import OverrideReader, Report, refuse_settings_without_effect
from manual_backprop.config.plugins import loaded_plugins
from manual_backprop.config.rules import shown
from manual_backprop.config.schema import CustomTransformerConfig, RunConfig
from manual_backprop.config.task_rules import sequence_vocabulary
from manual_backprop.training.requirements import missing_here
from manual_backprop.training.resume import job_config
from manual_backprop.training.value_sources import as_meant, planned

NOT_TRACKED = "tracking=none"  # a config that is only inspected needs no tracking
UNKNOWN_VOCABULARY = 257  # vocabulary size assumed for a tokenizer that is not trained yet
UNKNOWN_LABELS = 8  # number of classes assumed for labelled texts that are not read yet
DESCRIBE_A_NETWORK = (
    *("task", "network", "model", "architecture", "tokenizer", "precision", "kernels", "device", "seed"),
    "experiments",
)
MOST_JOBS = 1000  # of a sweep; more is probably a mistyped range


@dataclass(frozen=True)
class Job:
    overrides: tuple[str, ...]  # what sets this job apart from the defaults
    config: RunConfig
    hydra: DictConfig  # Hydra's own settings

    @property
    def runtime(self) -> DictConfig:
        """Hydra's `hydra.runtime`: the option of each group, and the folders of the files."""
        return self.hydra.runtime


@dataclass(frozen=True)
class Checked:
    """A valid command line."""

    overrides: tuple[str, ...]  # to be passed to Hydra
    multirun: bool
    jobs: tuple[Job, ...]
    swept: tuple[str, ...]  # keys with several values
    searches: bool  # the sweeper chooses jobs or values from the results so far


def check(
    arguments: Sequence[str], multirun: bool = False, base: Path | None = None, displayed: bool = False
) -> Checked:
    """Compose and validate every job that the overrides ask for. Raises ConfigError with all violations.

    `base` is the directory of a run: the overrides then change its config instead of the defaults. A config that is
    only `displayed` may have settings of Hydra that a single job ignores.
    """
    with composer() as hydra:
        return check_with(hydra, arguments, multirun, base, displayed)


def described_job(overrides: Sequence[str], command: str) -> Job:
    """The one job that overrides describe, for a command that inspects it without running it.

    Raises InputError, in one line, with everything that is wrong.
    """
    names_tracking = any(override.startswith("tracking") for override in overrides)
    try:
        jobs = check([*overrides, *([] if names_tracking else [NOT_TRACKED])]).jobs
    except ConfigError as error:
        raise InputError("; ".join(error.violations)) from None
    if len(jobs) != 1:
        raise InputError(f"these arguments describe {len(jobs)} runs; {command} takes one at a time")
    return jobs[0]


def described_network(overrides: Sequence[str], command: str) -> tuple[CustomTransformerConfig, list[str]]:
    """The network that a run with these overrides would train, and the overridden keys that do not affect it. Raises
    InputError."""
    job = described_job(overrides, command)
    run, vocab_size = job.config, job.config.tokenizer.vocab_size or UNKNOWN_VOCABULARY
    if run.task.symbols is not None:
        vocab_size = sequence_vocabulary(run.task.symbols, run.network_name)
    return run.network_config(vocab_size, **_of_examples(run)), keys_without_effect(job.overrides)


def _of_examples(run: RunConfig) -> dict[str, Any]:
    """The sizes of an encoder that depend on its examples, with assumed values: one series, UNKNOWN_LABELS classes."""
    if run.task.horizon is not None and run.task.patch is not None:
        return {"n_inputs": 2 * run.task.patch, "n_outputs": run.task.horizon, "head_loss": "squared_error"}
    return {"n_outputs": UNKNOWN_LABELS} if run.network_name == "encoder" else {}


def keys_without_effect(overrides: Sequence[str]) -> list[str]:
    """The overridden keys that say how a network is trained, and not what it is."""
    named = [override.lstrip("+").partition("=")[0] for override in overrides if override != NOT_TRACKED]
    return [
        key
        for key in named
        if (key.partition(".")[0] not in DESCRIBE_A_NETWORK and key != "training.label_smoothing")
        or key in ("model.learning_rate", "architecture.learning_rate_scale")
    ]


def check_with(
    hydra: Composer, arguments: Sequence[str], multirun: bool = False, base: Path | None = None, displayed: bool = False
) -> Checked:
    report = Report()
    overrides = OverrideReader(hydra, report).read(arguments)
    settings = [override for override in overrides if override.is_hydra_override()]
    ours = [override for override in overrides if not override.is_hydra_override()]
    plans: list[list[Override]] = []
    jobs: list[Job] = []
    try:
        one_valued = [override for override in ours if not override.is_sweep_override()]
        master = hydra.compose(_lines([*settings, *(o for o in one_valued if is_choice(o.key_or_group))]))
        if multirun and master.hydra.mode == RunMode.RUN:
            report.add("hydra.mode=RUN: is one job, and -m makes a sweep; leave one of the two out")
        multirun = multirun or master.hydra.mode == RunMode.MULTIRUN
        if multirun:
            if parameters := master.hydra.sweeper.get("params"):
                ours = _with_planned(hydra, planned(parameters, master.hydra.runtime), ours, report)
                settings.append(hydra.parse("hydra.sweeper.params=null"))  # they are among the overrides now
            plans = _sweep(hydra, master, ours, report)
        else:
            _no_sweep(ours, report)
            plans = [one_valued]
    except ConfigError as error:
        report.add_all(error.violations)
    for number, plan in enumerate(plans):
        report.job = f"job {number + 1} of {len(plans)}" if len(plans) > 1 else None
        try:
            chosen = hydra.compose(_lines([*settings, *(o for o in plan if is_choice(o.key_or_group))]))
            values = [override for override in plan if not is_choice(override.key_or_group)]
            lines = tuple(line.removeprefix("++") for line in _lines(plan))
            composed = as_meant(hydra.with_values(chosen, values), lines, chosen.hydra.runtime)
            composed["plugins"] = sorted({*composed["plugins"], *loaded_plugins()})
            config = job_config(composed, lines, Path("outputs"), base)
        except ConfigError as error:
            report.add_all(error.violations)
            continue
        report.add_all(missing_here(config))
        if not multirun and not displayed:
            refuse_settings_without_effect(settings, chosen.hydra, report)
        jobs.append(Job(lines, config, chosen.hydra))
    report.raise_if_wrong(len(plans))
    swept = tuple(str(override.key_or_group) for override in ours if override.is_sweep_override())
    searches = multirun and not str(master.hydra.sweeper.get("_target_")).endswith(".BasicSweeper")
    return Checked(_lines([*settings, *ours]), multirun, tuple(jobs), swept, searches)


def _lines(overrides: Sequence[Override]) -> tuple[str, ...]:
    return tuple(str(override.input_line) for override in overrides)


def _no_sweep(overrides: Sequence[Override], report: Report) -> None:
    for override in overrides:
        if override.is_sweep_override():
            key, text = override.key_or_group, str(override.input_line).partition("=")[2]
            as_list = "" if is_choice(key) else f"; a list is written {key}=[{shown(text)}]"
            report.add(f"{key}={shown(text)}: several values are a sweep, one job for each; that needs -m{as_list}")


def _with_planned(
    hydra: Composer, parameters: Mapping[str, str], overrides: list[Override], report: Report
) -> list[Override]:
    """The overrides of the command line, and the sweeps of the experiment's file for keys that it does not override."""
    planned = OverrideReader(hydra, report).read([f"{key}={value}" for key, value in parameters.items()])
    return list({override.key_or_group: override for override in [*planned, *overrides]}.values())


def _sweep(hydra: Composer, master: DictConfig, wanted: list[Override], report: Report) -> list[list[Override]]:
    """The overrides of each job, split by the sweeper that comes with Hydra."""
    endless = [override for override in wanted if override.is_sweep_override() and not override.is_discrete_sweep()]
    if endless and not str(master.hydra.sweeper.get("_target_")).endswith(".BasicSweeper"):
        wanted = [override for override in wanted if override not in endless]  # their sweeper chooses the values
    elif endless:
        for override in endless:
            report.add(f"{_as_typed(override)}: has no end; give a list, as in 1,2,3, or range(START,STOP,STEP)")
        return []
    sweeps = [override for override in wanted if override.is_sweep_override()]
    n_jobs = prod(_count(override, hydra) for override in sweeps)
    if not 1 <= n_jobs <= MOST_JOBS:
        asked = " ".join(map(_as_typed, sweeps))
        report.add(f"{asked}: makes {n_jobs} jobs; a sweep must have at least 1 and at most {MOST_JOBS}")
        return []
    return [[hydra.parse(line) for line in job] for job in BasicSweeper.split_arguments(wanted, None)[0]]


def _as_typed(override: Override) -> str:
    return shown(str(override.input_line).removeprefix("++"))


def _count(override: Override, hydra: Composer) -> int:
    """The number of values of a sweep, without listing them."""
    raw = override._value
    if isinstance(raw, ChoiceSweep):
        return len(raw.list)
    if isinstance(raw, Glob):
        return len(raw.filter(hydra.options(override.key_or_group)))
    assert isinstance(raw, RangeSweep)
    assert raw.start is not None
    assert raw.stop is not None
    start, stop, step = float(raw.start), float(raw.stop), float(raw.step)
    if step == 0 or not all(abs(bound) < inf for bound in (start, stop, step)):
        return 0
    return max(0, -int((start - stop) // step))
