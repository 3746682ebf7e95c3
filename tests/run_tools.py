"""Small runs for tests: train, resume, and read what they wrote."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manual_backprop.checkpoints.checkpoint import load_checkpoint
from manual_backprop.common.origin import Origin
from manual_backprop.config.schema import RunConfig
from manual_backprop.tracking import load_training_log
from manual_backprop.tracking.run_directory import list_runs
from manual_backprop.training.command_line import check
from manual_backprop.training.runner import Runner, run_job

MODEL = ("model=tiny", "model.d_model=16", "model.n_heads=2", "model.d_ffn=24", "model.max_seq_len=8")
MODEL += ("model.learning_rate=3e-3",)  # whatever the experiments find best for tiny
TRAINING = ("training=smoke", "training.log_every=1", "training.sample_length=4", "training.eval_every=1000")
SMALL = (*MODEL, *TRAINING, "tokenizer=byte", "tracking=none", "device=cpu", "device.threads=1", "dataset=text")


def write_text(path: Path, sentences: int = 300) -> Path:
    path.write_text(" ".join(f"the {('cat', 'dog', 'owl')[n * n % 3]} saw {n % 7} mice." for n in range(sentences)))
    return path


def small(*overrides: str) -> list[str]:
    """`overrides`, and those of SMALL whose keys they do not set."""
    chosen = {override.partition("=")[0] for override in overrides}
    return [*(override for override in SMALL if override.partition("=")[0] not in chosen), *overrides]


def config_of(text: Path, *overrides: str) -> RunConfig:
    return check(small(f"dataset.path='{text}'", *overrides)).jobs[0].config


def train(root: Path, text: Path, *overrides: str) -> Path:
    run_job(config_of(text, *overrides), root)
    return newest(root)


def resume(root: Path, *overrides: str) -> float:
    """Resumes a run like the command, in the folder `root`."""
    os.chdir(root)
    return run_job(check(overrides).jobs[0].config, root, Origin(overrides=tuple(overrides)))


def newest(root: Path) -> Path:
    return list_runs(root / "outputs")[-1]


def metric(run: Path, name: str) -> list[float]:
    log = load_training_log(run)
    series = (log.validation if name.startswith("validation/") else log.training)[name]
    return list(series.values)


def assert_same_tensors(one: Path, other: Path) -> None:
    """Parameters and optimizer state of two checkpoints have the same bits."""
    first, second = load_checkpoint(one).tensors, load_checkpoint(other).tensors
    assert set(first) == set(second) == {"parameters", "optimizer"}
    for group, named in first.items():
        assert set(named) == set(second[group])
        for name, tensor in named.items():
            assert tensor.dtype == second[group][name].dtype
            assert torch.equal(tensor, second[group][name]), f"{group} {name}"


@contextmanager
def same_process() -> Iterator[None]:
    """Restores threads and log handlers, which a run sets, for the other tests in this process."""
    package, threads = logging.getLogger("manual_backprop"), torch.get_num_threads()
    handlers, propagate, folder = list(package.handlers), package.propagate, Path.cwd()
    package.handlers[:], package.propagate = [], True  # as in a process of its own, whatever ran before
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        package.handlers[:], package.propagate = handlers, propagate
        os.chdir(folder)


def stumbling(runner: Runner, steps: set[int], gradient: bool) -> None:
    """Makes the loss, or one gradient, non-finite in these steps."""
    healthy = runner.model.network.loss_and_gradients

    def loss_and_gradients(batch: Any, *, denominator: Tensor, step: int) -> Tensor:
        loss = healthy(batch, denominator=denominator, step=step)
        if step in steps and gradient:
            runner.model.network.gradients["blocks.0.attention.value.bias"][0] = math.nan
        return loss * math.inf if step in steps and not gradient else loss

    runner.model.network.loss_and_gradients = loss_and_gradients  # type: ignore[method-assign]
