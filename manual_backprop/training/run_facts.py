"""What a run is, for those who report, save and summarize it: they know these facts, and no Runner."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.schema import RunConfig
from ..data.tokens.order import Order
from ..models.wrappers.wrapper import NetworkWrapper
from ..tasks import Task


@dataclass(frozen=True)
class RunFacts:
    """Known before the first step. How far the run has come is the model's to say: `model.step`."""

    config: RunConfig
    task: Task
    model: NetworkWrapper
    order: Order
    first_step: int  # optimizer steps that earlier processes have made
    max_steps: int
