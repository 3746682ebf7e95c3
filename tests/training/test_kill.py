"""kill -9 at random moments and at every kind of point: after all resumes, every bit is that of an uninterrupted
run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_tools import ROOT, environment
from run_tools import assert_same_tensors, metric, newest, small, write_text

from manual_backprop.checkpoints.checkpoint import CheckpointManager, verify
from manual_backprop.tracking.metrics_file import read_entries
from manual_backprop.tracking.run_directory import list_runs, read_run

SLOW, NIGHTLY = pytest.mark.slow, pytest.mark.nightly
PROGRAM = ROOT / "tests" / "killed_runs.py"
OFTEN = ("training.save_every=4", "training.keep_checkpoints=1", "training.eval_every=30", "training.eval_batches=1")
COMPARED = ("train/loss", "gradient_norm", "learning_rate", "tokens_seen", "nonfinite_steps", "validation/loss")


def kill_and_compare(tmp_path: Path, kills: int, seed: int, max_steps: int, *options: str) -> None:
    text = write_text(tmp_path / "text.txt", sentences=60)
    overrides = small(f"dataset.path='{text}'", *OFTEN, f"training.max_steps={max_steps}", *options)
    done = subprocess.run(
        [sys.executable, PROGRAM, tmp_path, str(kills), str(seed), str(max_steps), *overrides],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert sum(counts.values()) == kills
    assert len(counts) == min(kills, 3)

    whole, killed = newest(tmp_path / "whole"), newest(tmp_path / "killed")
    assert read_run(whole)["status"] == read_run(killed)["status"] == "FINISHED"
    last = f"checkpoints/step-{max_steps:06d}"
    assert_same_tensors(whole / last, killed / last)
    for name in COMPARED:
        assert metric(whole, name) == metric(killed, name), name
    # no step twice; what was made twice lies aside, and was the same
    entries = list(read_entries(killed / "metrics.jsonl"))
    assert [(entry.step, "train/loss" in entry.metrics) for entry in entries] == [
        (entry.step, "train/loss" in entry.metrics) for entry in read_entries(whole / "metrics.jsonl")
    ]
    losses = dict(enumerate(metric(whole, "train/loss"), start=1))
    aside = [entry for entry in read_entries(killed / "superseded.jsonl") if "train/loss" in entry.metrics]
    assert aside, "no kill came between two checkpoints"
    assert all(entry.metrics["train/loss"] == losses[entry.step] for entry in aside)
    assert len(read_run(killed)["resumes"]) >= kills // 3
    for run in list_runs(tmp_path / "killed" / "outputs"):
        for path in CheckpointManager(run / "checkpoints").list():
            verify(path)
        assert read_run(run)["status"] in ("FINISHED", "KILLED")
    assert not list(killed.glob("checkpoints/.staging*"))
    assert len(CheckpointManager(killed / "checkpoints").list()) <= 2  # the newest and the best


@pytest.mark.parametrize("kills", [pytest.param(3, marks=SLOW), pytest.param(24, marks=NIGHTLY)])
def test_many_kills_in_fp32_across_epochs(kills: int, tmp_path: Path) -> None:
    """Dropout, gradient accumulation, and an epoch of 12 steps."""
    options = ("kernels=fused", "precision=fp32", "model.dropout=0.2", "training.gradient_accumulation_steps=3")
    kill_and_compare(tmp_path, kills, 1, 150 if kills < 10 else 300, *options)


FORMATS = {
    ("kernels=reference", "precision=bf16", "optimizer=sgd"): NIGHTLY,
    ("kernels=fused", "precision=bf16_mixed", "architecture=vaswani", "training.label_smoothing=0.1"): NIGHTLY,
    ("kernels=fused", "precision=fp32", "optimizer=sgd", "optimizer.momentum=0.9", "schedule=linear"): NIGHTLY,
    ("kernels=reference", "precision=bf16", "optimizer=adamw", "training.gradient_accumulation_steps=3"): SLOW,
}


@pytest.mark.parametrize(
    ("kills", "options"),
    [
        pytest.param(6 if mark is NIGHTLY else 3, options, marks=mark, id=" ".join(options))
        for options, mark in FORMATS.items()
    ],
)
def test_kills_with_either_kernels_in_other_formats(kills: int, options: tuple[str, ...], tmp_path: Path) -> None:
    kill_and_compare(tmp_path, kills, 2, 20 * kills, "model.dropout=0.2", *options)
