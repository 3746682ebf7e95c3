"""Train a transformer, or a sweep of them.

`python -m manual_backprop.run [KEY=VALUE ...]`; with `-m`, lists of values with commas give one job for each
combination. The command line is composed and checked (`training.command_line`) before anything runs. Hydra's own `main`
is called only to start the jobs of a sweep (`training.sweeps`) and to show a config (`--cfg`, `--info`).
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take a while
    from manual_backprop.common.interruption import exit_on_signal

    exit_on_signal()

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manual_backprop.common.errors import ConfigError, InputError
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.common.processes import Place
from manual_backprop.config.plugins import load_plugins

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from manual_backprop.training.command_line import Checked, Job

COMMAND = "python -m manual_backprop.run"


def main(arguments: Sequence[str] | None = None) -> int | None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    place = Place.found()
    if place is not None and place.rank:  # the first of torchrun's processes reports for all
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    options = _read_options(given)
    load_plugins(options.plugin)
    if options.help:
        from manual_backprop.config.help_page import help_page

        print(help_page(COMMAND))
        return None
    if options.version:
        import hydra

        from manual_backprop import __version__

        print(f"manual_backprop {__version__} (Hydra {hydra.__version__})")
        return None

    from manual_backprop.config import composition
    from manual_backprop.training import command_line

    if options.config_dir is not None:
        folder = Path(options.config_dir).resolve()
        if not folder.is_dir():
            raise InputError(
                f"--config-dir={options.config_dir}: there is no such folder (working directory: {Path.cwd()})"
            )
        composition.ExperimentsSearchPath.own_folder = str(folder)
    flags, silent = _hydra_flags(options)
    if silent:
        _show(flags, options.overrides)
        return None
    with _violations_listed():
        checked = command_line.check(options.overrides, options.multirun, displayed=options.cfg is not None)
    if options.cfg:
        _show(flags, checked.overrides)
    elif place is not None and (checked.multirun or checked.jobs[0].config.sweep.resume is not None):
        raise InputError(
            "a sweep starts its own processes: start it without torchrun; its jobs may use device.processes=N"
        )
    elif any(job.config.plan for job in checked.jobs):
        from manual_backprop.training.plan import print_plans

        print_plans(checked.jobs)
    elif checked.jobs[0].config.sweep.resume is not None:
        _resume_sweep(checked, options)
    elif checked.multirun:
        from manual_backprop.training.sweeps.sweep import start_sweep

        start_sweep(checked, Path.cwd(), partial(_run_sweep, flags), composition.ExperimentsSearchPath.own_folder)
    else:
        with _called_with(given):
            _run_one(checked.jobs[0])
    return None


def _run_one(job: Job) -> None:
    """Run a single job, with the Hydra settings that apply to it."""
    from hydra.core.utils import configure_log, env_override

    from manual_backprop.common.origin import Origin
    from manual_backprop.training.value_sources import value_sources

    sources = value_sources(job.config, job.overrides, job.runtime)
    with env_override(job.hydra.job.env_set):
        configure_log(job.hydra.job_logging, job.hydra.verbose)
        from manual_backprop.training.runner import run_job  # imports torch, so only after the arguments are checked

        run_job(job.config, Path.cwd(), Origin(overrides=job.overrides, sources=sources))


def _resume_sweep(asked: Checked, options: argparse.Namespace) -> None:
    """Resume a sweep (sweep.resume=DIRECTORY) with its own command line."""
    from manual_backprop.config import composition
    from manual_backprop.tracking.run_directory import find_sweep
    from manual_backprop.training import command_line
    from manual_backprop.training.sweeps.sweep import given_to, resume_sweep

    if len(asked.overrides) > 1 or options.multirun or options.config_dir is not None:
        raise InputError("sweep.resume: a sweep resumes with its own command line; leave out everything else")
    sweep = find_sweep(Path("outputs"), str(asked.jobs[0].config.sweep.resume))
    overrides, composition.ExperimentsSearchPath.own_folder = given_to(sweep)
    with _violations_listed():
        checked = command_line.check(overrides, multirun=True)
    resume_sweep(sweep, checked, Path.cwd(), partial(_run_sweep, ["--multirun"]))


@contextmanager
def _violations_listed() -> Iterator[None]:
    """Replaces a ConfigError within this context by one with a line for each violation."""
    try:
        yield
    except ConfigError as error:
        count = len(error.violations)
        places = "1 place" if count == 1 else f"{count} places"
        listed = "\n".join(f"  {violation}" for violation in error.violations)
        report = f"The configuration is wrong in {places}; nothing was started.\n\n{listed}\n\nSee {COMMAND} --help"
        raise ConfigError([report]) from None


def _read_options(given: list[str]) -> argparse.Namespace:
    """The supported options of Hydra, and ours. Other arguments with a dash are reported with the overrides."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog=COMMAND)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--package", "-p")
    parser.add_argument(
        "--info",
        "-i",
        const="all",
        nargs="?",
        choices=["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"],
    )
    parser.add_argument("--hydra-help", action="store_true")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--plugin", action="append", default=[])
    options, rest = parser.parse_known_args(given)
    options.overrides = rest
    return options


def _hydra_flags(options: argparse.Namespace) -> tuple[list[str], bool]:
    """The options for Hydra; and whether it only prints information, so that there is nothing to check."""
    if (options.resolve or options.package) and not options.cfg:
        raise InputError("--resolve and --package control how a config is shown; add --cfg job")
    package = ["--package", options.package] if options.package else []
    flags = {
        "multirun": ["--multirun"],
        "cfg": ["--cfg", options.cfg, *["--resolve"] * options.resolve, *package],
        "info": ["--info", options.info],
        "hydra_help": ["--hydra-help"],
        "shell_completion": ["--shell-completion"],
    }
    asked = [name for name in flags if getattr(options, name)]
    if len(asked) > 1:
        raise InputError(f"only one of {' and '.join('--' + name.replace('_', '-') for name in asked)} can be given")
    return flags[asked[0]] if asked else [], bool(asked) and asked[0] not in ("multirun", "cfg")


def _show(flags: Sequence[str], overrides: Sequence[str]) -> None:
    """Let Hydra print a configuration or information about itself, without calling a job."""

    def no_job(composed: DictConfig) -> None: ...

    _run_hydra([*flags, *overrides], no_job)


def _run_hydra(arguments: Sequence[str], task: Callable[[DictConfig], Any]) -> None:
    import hydra

    from manual_backprop.config.composition import find_experiments
    from manual_backprop.config.schema import shipped_folder

    find_experiments()
    with _called_with(arguments):
        hydra.main(config_path=str(shipped_folder("conf")), config_name="config", version_base="1.3")(task)()


@contextmanager
def _called_with(arguments: Sequence[str]) -> Iterator[None]:
    """Set sys.argv within this context: Hydra reads it, and a run records it as its command."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before


def _run_sweep(flags: list[str], overrides: list[str], task: Callable[[DictConfig], Any]) -> None:
    """Let Hydra run a sweep. Exceptions of its launcher or sweeper are raised, instead of Hydra's own error report."""
    from hydra.core.utils import env_override

    with env_override({"HYDRA_FULL_ERROR": "1"}):
        _run_hydra([*flags, *overrides], task)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
