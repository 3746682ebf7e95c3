"""Repeats a run with its own config, and compares both runs bit by bit.

It names everything that has changed since: code, packages, data, machine, and what the caller overrides. If nothing has
changed and the results still differ, that is a bug.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manual_backprop.common.errors import CheckFailedError, ConfigError, Interrupted
from manual_backprop.config.rules import shown
from manual_backprop.config.schema import RunConfig
from manual_backprop.tracking.run_directory import close_dead_runs, find_run, read_run
from manual_backprop.tracking.training_log import TrainingLog, flatten, load_training_log

if TYPE_CHECKING:
    from manual_backprop.training.runner import Runner

COMPARED = ("train/loss", "gradient_norm", "validation/loss")


def rerun(which: str, overrides: Sequence[str], root: Path) -> None:
    """Repeats a run, and prints the comparison. Raises CheckFailedError if the losses differ and nothing has
    changed."""
    outputs = root / "outputs"
    then = find_run(outputs, which).path
    config = _config_of(then, overrides)

    from manual_backprop.common.interruption import Interruption
    from manual_backprop.common.origin import Origin
    from manual_backprop.tracking.run_log import warnings_to_terminal
    from manual_backprop.training.runner import Runner  # imports torch, so only after the arguments are checked

    warnings_to_terminal()
    with Interruption() as interruption:
        close_dead_runs(outputs)
        runner = Runner(config, outputs, interruption, origin=Origin(overrides=tuple(overrides)))
        changes = changes_since(then, runner)
        print(
            f"{then.name} again:" if changes else f"{then.name} again; nothing has changed since, as far as is known."
        )
        for change in changes:
            print(f"  changed since: {change}")
        print(flush=True)
        try:
            runner.run()
        except Interrupted:
            if runner.directory is not None:
                print(_verdict(then, runner.directory.path)[1])
            raise
    assert runner.directory is not None
    same, sentence = _verdict(then, runner.directory.path)
    if not same and not changes:
        raise CheckFailedError(f"\n{sentence} Nothing else differs between the two runs, so this is a bug.")
    print(f"\n{sentence}" + (f" See above for what has changed ({len(changes)})." if changes and not same else ""))


def _config_of(path: Path, overrides: Sequence[str]) -> RunConfig:
    """The run's own config with these `overrides`, its number of threads, and a tag. Raises ConfigError."""
    from manual_backprop.training import command_line

    if starts := [line for line in overrides if line.lstrip("+~").startswith("resume")]:
        raise ConfigError([f"{starts[0]}: a rerun starts at the first step; leave it out"])
    config = command_line.check(overrides, base=path).jobs[0].config
    threads = (read_run(path).get("made_with") or {}).get("threads")
    if not any(line.partition("=")[0] in ("device", "device.threads") for line in overrides):
        config = replace(config, device=replace(config.device, threads=threads or config.device.threads))
    return replace(config, tags=config.tags | {"rerun_of": path.name}, plan=False)


def changes_since(then: Path, runner: Runner) -> list[str]:
    """Everything known to differ between a run and its repetition, in sentences."""
    from manual_backprop.tracking.environment import differing, environment_of
    from manual_backprop.tracking.tracker import Tracked, environment_of_run
    from manual_backprop.training.resume import NAMES_ONLY, config_of_run

    run, tags = read_run(then), Tracked.read(then).tags
    before, now = environment_of_run(then), environment_of(runner.model.network)
    found = _code(before, now) + _packages(then) + differing(before, now)
    data = {tag.removesuffix("_digest"): digest for tag, digest in runner.task.digests.items()}
    found += differing({name: tags.get(f"{name}_digest") for name in data}, data)
    before, now = flatten(config_of_run(then).to_dict()), flatten(runner.config.to_dict())
    before["device.threads"] = now["device.threads"]  # compared above
    found += [
        f"{key}: {shown(before.get(key))} then, {shown(now.get(key))} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(NAMES_ONLY)
    ]
    for resume in run["resumes"]:
        if resume.get("changed"):
            found.append(f"the run was resumed after step {resume['step']} with other {', '.join(resume['changed'])}")
    return found


def _code(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    from manual_backprop.tracking.environment import other_version, version_in_words

    if version := other_version(then, now):
        return [f"{version}, and bits are promised within a version only"]
    if str(then.get("commit")).partition(" ")[0] != now["commit"].partition(" ")[0]:
        return [f"code: {version_in_words(then)} then, {version_in_words(now)} now; the package's files are the same"]
    return []


def _packages(then: Path) -> list[str]:
    from manual_backprop.tracking.provenance import PACKAGES, installed_packages

    def versions(text: str) -> dict[str, str]:
        pairs = [line.partition("==") for line in text.splitlines() if line]
        return {name: version for name, _, version in pairs}

    try:
        before = versions((then / PACKAGES).read_text(encoding="utf-8"))
    except OSError:
        return [f"packages: unknown then, since {then / PACKAGES} cannot be read"]
    now = versions(installed_packages())
    return [
        f"package {name}: {before.get(name, 'absent')} then, {now.get(name, 'absent')} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _verdict(then: Path, now: Path) -> tuple[bool, str]:
    """Whether everything that both runs logged is the same, and a sentence about it."""
    first, second = load_training_log(then), load_training_log(now)
    compared, differences = compare(first, second)
    if not compared:
        return False, "The two runs logged no step in common: there is nothing to compare."
    if not differences:
        return True, f"The losses of {compared} steps are bitwise the same."
    step, name, before, after = min(differences, key=lambda one: (one[0], COMPARED.index(one[1])))
    count = len({difference[0] for difference in differences})
    return False, (
        f"The losses differ in {count} of the {compared} steps that both logged, first at step {step}: {name} "
        f"{before!r} then, {after!r} now (by {abs(after - before):.3g})."
    )


def compare(then: TrainingLog, now: TrainingLog) -> tuple[int, list[tuple[int, str, float, float]]]:
    """The number of steps that both logged, and their differences: (step, metric, then, now)."""
    before, after = _points(then), _points(now)
    both = before.keys() & after.keys()
    differences = [
        (step, name, before[step, name], after[step, name])
        for step, name in sorted(both)
        if before[step, name] != after[step, name] and not (isnan(before[step, name]) and isnan(after[step, name]))
    ]
    return len({step for step, _ in both}), differences


def _points(log: TrainingLog) -> dict[tuple[int, str], float]:
    """The compared metrics of a run: {(step, metric): value}."""
    return {
        (step, name): value
        for name, series in {**log.training, **log.validation}.items()
        if name in COMPARED
        for step, value in zip(series.steps, series.values, strict=True)
    }
