"""The facts of a run, the content of its checkpoint, and how a run is restored from it.

Report and state depend on the facts and not on the Runner.

The tensors are the parameters and the whole state of the optimizer. Config and step determine the rest: the next
windows, the learning rate, the dropout masks. The state records what is not in the config: digests of the data, the
length of metrics.jsonl, and the number of threads, on which sums depend.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..config.rules import shown
from ..config.schema import RunConfig
from ..config.validation import validate, with_defaults
from ..data.tokens.order import Order
from ..models.wrappers.wrapper import NetworkWrapper
from ..optim.improvement import Improvement
from ..optim.optimizers import Optimizer
from ..optim.schedule import build_schedule, max_steps
from ..tasks import Task
from ..tracking import RunDirectory
from ..tracking.environment import differing, environment_of, other_version
from ..tracking.tracker import environment_of_run
from .resume import changed_settings

log = logging.getLogger(__name__)

HIGHER = 1.1  # times the rate of the checkpoint's own schedule: a next rate above that is reported as a jump


@dataclass(frozen=True)
class RunFacts:
    """The facts of a run that are known before its first step. `model.step` counts the steps."""

    config: RunConfig
    task: Task
    model: NetworkWrapper
    order: Order
    first_step: int  # optimizer steps that earlier processes have made
    max_steps: int
    peak_rate: float  # of matrix products alone, of all processes together [FLOP/s]


def tensors_of(model: NetworkWrapper, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint, not copied: a save ends before the next step begins."""
    return {"parameters": dict(model.network.parameters), "optimizer": optimizer.state_views()}


def state_of(facts: RunFacts, metrics_length: int, improvement: Improvement) -> dict[str, Any]:
    """The state with the keys of `resume.STATE`, and the task's digests. `network` is for readers without the
    config."""
    return {
        "config": facts.config.to_dict(),
        "network": asdict(facts.model.config),
        **facts.task.digests,
        **({} if facts.task.signature is None else {"signature": dict(facts.task.signature)}),
        "metrics_length": metrics_length,
        "improvement": improvement.state(),
        "made_with": environment_of(facts.model.network),
    }


def restore(model: NetworkWrapper, optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    """Restores parameters, optimizer and step. Raises InputError if the checkpoint belongs to another network or
    optimizer."""
    model.network.load_parameters(checkpoint.tensors["parameters"])
    optimizer.load_state(checkpoint.tensors["optimizer"])
    optimizer.reset_longest_nonfinite()
    model.step = checkpoint.step


def report_changes(facts: RunFacts, checkpoint: Checkpoint, directory: RunDirectory) -> None:
    """Reports what has changed in a resumed run, on the terminal and in run.json."""
    settings = changed_settings(facts.config, checkpoint)
    now = environment_of(facts.model.network)
    environment = differing(checkpoint.state["made_with"], now)
    version = other_version(environment_of_run(directory.path) | checkpoint.state["made_with"], now)
    if settings:
        changes = (f"{key}={shown(now)} (was {shown(before)})" for key, (before, now) in settings.items())
        log.warning("From step %d on: %s.", facts.first_step + 1, ", ".join(changes))
    if jump := _jump_of_the_rate(facts, checkpoint):
        log.warning("%s", jump)
    if version:
        log.warning("Another version resumes this run; bitwise the same results need the same version: %s.", version)
    if environment:
        log.warning("The last bits will differ from those of an uninterrupted run: %s.", "; ".join(environment))
    environment += [version] if version else []
    changed = {key: list(pair) for key, pair in settings.items()} | ({"made_with": environment} if environment else {})
    directory.resume(facts.first_step, changed)


def _jump_of_the_rate(facts: RunFacts, checkpoint: Checkpoint) -> str | None:
    """A warning if the learning rate jumps up, as when a schedule that had ended is extended; else None."""
    saved, step = validate(with_defaults(checkpoint.state["config"])), facts.first_step
    steps_before = max_steps(saved.training, facts.order)
    before, now = build_schedule(saved, steps_before), build_schedule(facts.config, facts.max_steps)
    if step < 1 or now(step + 1) <= HIGHER * before(min(step + 1, steps_before)):
        return None
    longer = f", since the schedule has {facts.max_steps} steps now and had {steps_before}"
    low = before(step) / facts.config.architecture.learning_rate_scale
    return (
        f"The learning rate rises from {before(step):.3g} in step {step} to {now(step + 1):.3g} in step {step + 1}"
        f"{longer * (facts.max_steps != steps_before)}; the loss may rise with it. To keep the low rate: "
        f"schedule=constant schedule.warmup_ratio=0 optimizer.learning_rate={low:.6g}"
    )
