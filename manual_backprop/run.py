"""Train a transformer, or a sweep of them.

`python -m manual_backprop.run [KEY=VALUE ...]`, and `-m` before comma lists for one job each. The command line is
checked first (`command_line.py`), then Hydra runs each job, which the runner does; here failures are collected.
"""

from __future__ import annotations

import argparse
import math
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from manual_backprop.errors import (
    CheckFailedError,
    ConfigError,
    InputError,
    Interrupted,
    ManualBackpropError,
)

COMMAND = "python -m manual_backprop.run"


@dataclass
class Outcomes:
    """How the jobs of a command ended. Hydra would end a sweep at a job that raises, so none does."""

    sweep: bool
    expected: int  # jobs; a sweeper that chooses values as it goes may start more
    started: int = 0
    failures: list[tuple[str, BaseException]] = field(default_factory=list)

    def task(self, composed: DictConfig) -> float:
        """One job, called by Hydra. The final validation loss; NaN where the job failed."""
        from manual_backprop.composition import plain
        from manual_backprop.origin import Origin
        from manual_backprop.resume import as_run_wants
        from manual_backprop.validation import validate

        self.started += 1
        overrides = _job_overrides()
        job = f"job {self.started} ({' '.join(overrides) or 'the defaults'})"
        if self.sweep:
            print(f"\n{job} of {max(self.expected, self.started)}", flush=True)
        try:
            from manual_backprop.runner import run_job  # torch, only now

            mapping = as_run_wants(plain(composed), overrides, Path("outputs"))
            loss = run_job(validate(mapping), Path.cwd(), Origin(overrides=tuple(overrides)))
        except (Interrupted, KeyboardInterrupt) as error:
            self.failures.append((job, error))
            raise KeyboardInterrupt from error  # Hydra lets it through: the jobs after it are not started
        except (Exception, SystemExit) as error:
            self.failures.append((job, error))
            if self.sweep:
                _tell(error)
            return math.nan
        return math.nan if loss is None else loss

    def raise_failures(self) -> None:
        """A single job's failure as it is; a sweep's in one list."""
        if not self.failures:
            return
        if not self.sweep or isinstance(self.failures[-1][1], Interrupted | KeyboardInterrupt):
            raise self.failures[-1][1]
        lines = [f"{len(self.failures)} of {self.started} jobs failed:"]
        for job, error in self.failures:
            said = str(error) if isinstance(error, ManualBackpropError) else f"{type(error).__name__}: {error}"
            lines.append(f"  {job}: " + said.replace("\n", "\n    "))
        raise CheckFailedError("\n".join(lines))


def _job_overrides() -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    return [line.removeprefix("++") for line in HydraConfig.get().overrides.task]


def _tell(error: BaseException) -> None:
    if isinstance(error, ManualBackpropError):
        print(error, file=sys.stderr)
    else:
        traceback.print_exception(error)


def main(arguments: Sequence[str] | None = None) -> int | None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _read_options(given)
    if options.help:
        from manual_backprop.help_page import help_page

        print(help_page())
        return None
    if options.version:
        import hydra

        from manual_backprop import __version__

        print(f"manual_backprop {__version__} (Hydra {hydra.__version__})")
        return None

    from manual_backprop import command_line, composition

    if options.config_dir is not None:
        folder = Path(options.config_dir).resolve()
        if not folder.is_dir():
            raise InputError(f"--config-dir={options.config_dir}: there is no such folder, seen from {Path.cwd()}")
        composition.ExperimentsSearchPath.own_folder = str(folder)
    flags, silent = _hydra_flags(options)
    if silent:
        _run_hydra([*flags, *options.overrides], Outcomes(sweep=False, expected=0))
        return None
    try:
        checked = command_line.check(options.overrides, multirun=options.multirun)
    except ConfigError as error:
        raise ConfigError([_report(error.violations)]) from None
    if not options.cfg and any(job.config.plan for job in checked.jobs):
        from manual_backprop.plan import print_plan
        from manual_backprop.value_sources import sources_page

        for job in checked.jobs:
            print(sources_page(job), end="\n\n", flush=True)
            print_plan(job.config)
        return None
    outcomes = Outcomes(sweep=checked.multirun, expected=len(checked.jobs))
    try:
        _run_hydra([*flags, *checked.overrides], outcomes)
    finally:
        outcomes.raise_failures()
    return None


def _report(violations: list[str]) -> str:
    places = "1 place" if len(violations) == 1 else f"{len(violations)} places"
    listed = "\n".join(f"  {violation}" for violation in violations)
    return (
        f"The configuration is wrong in {places}; nothing was started.\n\n{listed}\n\nWhat there is: {COMMAND} --help"
    )


def _read_options(given: list[str]) -> argparse.Namespace:
    """Hydra's options that make sense here. Whatever else begins with a dash is reported with the rest."""
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
    options, rest = parser.parse_known_args(given)
    options.overrides = rest
    return options


def _hydra_flags(options: argparse.Namespace) -> tuple[list[str], bool]:
    """Those options again, for Hydra; and whether it only tells something, so that there is nothing to check."""
    if (options.resolve or options.package) and not options.cfg:
        raise InputError("--resolve and --package say how to show a config; add --cfg job")
    asked = [name for name in ("multirun", "cfg", "info", "hydra_help", "shell_completion") if getattr(options, name)]
    if len(asked) > 1:
        raise InputError(
            f"only one of {' and '.join('--' + name.replace('_', '-') for name in asked)} can be done at a time"
        )
    flags = []
    if options.multirun:
        flags = ["--multirun"]
    if options.cfg:
        flags = ["--cfg", options.cfg, *(["--resolve"] * options.resolve)]
        flags += ["--package", options.package] if options.package else []
    if options.info:
        flags = ["--info", options.info]
    if options.hydra_help:
        flags = ["--hydra-help"]
    if options.shell_completion:
        flags = ["--shell-completion"]
    return flags, bool(options.info or options.hydra_help or options.shell_completion)


def _run_hydra(arguments: list[str], outcomes: Outcomes) -> None:
    import hydra

    from manual_backprop.composition import find_experiments
    from manual_backprop.config import shipped_folder

    find_experiments()
    given = sys.argv
    sys.argv = [given[0], *arguments]
    try:
        hydra.main(config_path=str(shipped_folder("conf")), config_name="config", version_base="1.3")(outcomes.task)()
    finally:
        sys.argv = given


if __name__ == "__main__":
    from manual_backprop.exit_codes import exit_code_of

    sys.exit(exit_code_of(main))
