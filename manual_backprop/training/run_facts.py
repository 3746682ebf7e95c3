"""The facts of a run. Report, state and summary depend on these facts and not on the Runner."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.schema import RunConfig
from ..data.tokens.order import Order
from ..models.wrappers.wrapper import NetworkWrapper
from ..tasks import Task


@dataclass(frozen=True)
class RunFacts:
    """The facts of a run that are known before its first step. `model.step` counts the steps."""

    config: RunConfig
    task: Task
    model: NetworkWrapper
    order: Order
    first_step: int  # optimizer steps that earlier processes have made
    max_steps: int
