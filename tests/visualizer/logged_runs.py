"""Runs for the tests of the visualizer: real directories, written as runs write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manual_backprop.tracking import FINISHED, TrainingLog, TrainingLogger, create_run_directory, load_training_log

RATE = 1e9  # FLOPs a step, by default


def write_run(
    root: Path,
    name: str = "a run",
    losses: Sequence[float] = (5.0, 4.0, 3.0),
    every: int = 10,
    validation: Mapping[int, float] | None = None,
    rate: float | None = RATE,
    status: str | None = FINISHED,
    config: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """Writes a run with a training row every `every` steps and evaluations at the steps in `validation`. `status` None:
    it is still running. `settings` are its tracked parameters, `fields` go into run.json."""
    directory = create_run_directory(root / "outputs", name)
    logger = TrainingLogger(directory.path, config=config)
    measured = dict({every * len(losses): losses[-1]} if validation is None and losses else validation or {})
    for number, loss in enumerate(losses, start=1):
        step = every * number
        for at in sorted(one for one in measured if one < step):
            logger.log_validation(at, {"loss": measured.pop(at)})
        row = {"train/loss": loss, "learning_rate": 1e-3, "tokens_seen": 100 * step}
        logger.log_step(step, row | ({} if rate is None else {"flops": rate * step}))
    for at, value in sorted(measured.items()):
        logger.log_validation(at, {"loss": value})
    if tags or settings:
        content = {"tags": dict(tags or {}), "parameters": dict(settings or {})}
        (directory.path / "tracking.json").write_text(json.dumps(content))
    if fields:
        directory.update(**fields)
    if status is not None:
        logger.finish(status)
    directory.release()
    return directory.path


def log_of(root: Path, *arguments: Any, **named: Any) -> TrainingLog:
    return load_training_log(write_run(root, *arguments, **named))


def by_legend(figure: Any) -> dict[str, Any]:
    """The trace of each run in the legend."""
    return {trace.name: trace for trace in figure.data if trace.showlegend}
