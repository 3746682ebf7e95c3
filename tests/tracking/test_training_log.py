"""TrainingLogger and load_training_log, as somebody without the Runner uses them."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from manual_backprop.common.errors import InputError
from manual_backprop.tracking import TrainingLogger, create_run_directory, load_training_log
from manual_backprop.tracking.training_log import flatten


def test_training_and_validation_series(tmp_path: Path) -> None:
    logger = TrainingLogger(tmp_path / "my_run")
    for step in range(1, 6):
        logger.log_step(step, {"train/loss": 1 / step, "learning_rate": 1e-3})
    logger.log_validation(5, {"loss": 0.3, "validation/perplexity": math.inf})
    running = load_training_log(tmp_path / "my_run")
    logger.finish()
    finished = load_training_log(tmp_path / "my_run" / "metrics.jsonl")
    assert running.training == finished.training
    assert finished.training.keys() == {"train/loss", "learning_rate"}
    assert finished.training["train/loss"].steps == [1, 2, 3, 4, 5]
    assert finished.training["train/loss"].values == [1 / step for step in range(1, 6)]
    assert finished.training["train/loss"].times_ms == sorted(finished.training["train/loss"].times_ms)
    assert finished.validation["validation/loss"].values == [0.3]
    assert finished.validation["validation/perplexity"].values == [math.inf]
    assert (finished.config, finished.run, finished.damaged_lines) == ({}, {}, 0)


def test_the_machine_stands_apart(tmp_path: Path) -> None:
    logger = TrainingLogger(tmp_path)
    logger.log_step(1, {"train/loss": 1.0, "system/cpu_utilization_percentage": 50.0})
    log = load_training_log(tmp_path)
    assert set(log.training) == {"train/loss"}
    assert log.system["system/cpu_utilization_percentage"].values == [50.0]


def test_the_last_value_of_a_repeated_step_counts(tmp_path: Path) -> None:
    logger = TrainingLogger(tmp_path)
    for step, value in [(1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0)]:
        logger.log_step(step, {"train/loss": value})
    logger.finish()
    series = load_training_log(tmp_path).training["train/loss"]
    assert (series.steps, series.values) == ([1, 2, 3], [1.0, 20.0, 3.0])


def test_a_resume_leaves_what_a_checkpoint_does_not_remember(tmp_path: Path) -> None:
    logger = TrainingLogger(tmp_path)
    logger.log_step(1, {"x": 1})
    remembered = logger.sync()
    logger.log_step(2, {"x": 2})
    logger.finish()
    logger = TrainingLogger(tmp_path, keep=remembered)
    assert logger.length == remembered
    logger.log_step(2, {"x": 3})
    assert load_training_log(tmp_path).training["x"].values == [1, 3]
    logger.finish()


def test_a_run_is_read_by_id_with_its_config(tmp_path: Path) -> None:
    run = create_run_directory(tmp_path, "named")
    (run.path / "config.yaml").write_text(
        "model:\n  learning_rate: 0.001\noptimizer:\n  rate: ${model.learning_rate}\n"
    )
    logger = TrainingLogger(run.path)
    logger.log_step(1, {"x": 1})
    logger.finish("KILLED")
    run.release()
    log = load_training_log(run.run_id, root=tmp_path)
    assert log.path == run.path
    assert log.run["status"] == "KILLED"
    assert log.config == {"model": {"learning_rate": 0.001}, "optimizer": {"rate": 0.001}}
    assert flatten(log.config) == {"model.learning_rate": 0.001, "optimizer.rate": 0.001}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no metrics.jsonl"):
        load_training_log(tmp_path)
    with pytest.raises(InputError, match="no run 'absent'"):
        load_training_log("absent", root=tmp_path)
    TrainingLogger(tmp_path).finish()
    (tmp_path / "config.yaml").write_text("a: ${nowhere}\n")
    with pytest.raises(InputError, match=r"config.yaml is not a config"):
        load_training_log(tmp_path)
    (tmp_path / "config.yaml").write_text("!!python/object/apply:os.system ['touch executed']\n")
    with pytest.raises(InputError, match=r"config.yaml is not a config"):
        load_training_log(tmp_path)
    run = create_run_directory(tmp_path, "x")
    logger = TrainingLogger(run.path)
    with pytest.raises(ValueError, match="status='DONE'"):
        logger.finish("DONE")
    run.release()


def test_a_config_of_any_kind_is_written_whole(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    @dataclass
    class Sizes:
        d_model: int = 64
        folder: Path = Path("data")

    config: dict[object, object] = {
        "model": Sizes(),
        "optimizer": OmegaConf.create({"betas": [0.9, 0.95]}),
        "splits": ("train",),
        1: None,
    }
    config |= {"rate": np.float32(0.5), "steps": [np.int64(3), torch.tensor(4)], "type": Sizes, "edges": {(0, 1): "a"}}
    TrainingLogger(tmp_path, config=config).finish()
    assert load_training_log(tmp_path).config == {
        "model": {"d_model": 64, "folder": "data"},
        "optimizer": {"betas": [0.9, 0.95]},
        "splits": ["train"],
        "1": None,
        "rate": 0.5,
        "steps": [3, 4],
        "type": str(Sizes),
        "edges": {"(0, 1)": "a"},
    }
    for wrong in ("model=tiny", [1], 3):
        with pytest.raises(InputError, match="expected a mapping or a dataclass"):
            TrainingLogger(tmp_path, config=wrong)


def test_what_cannot_be_logged_is_named(tmp_path: Path) -> None:
    logger = TrainingLogger(tmp_path)
    logger.log_step(1, {"x": torch.tensor([2.5]), "y": np.float32(0.5)})
    for value in ("three", None, torch.ones(2)):
        with pytest.raises(InputError, match=r"x=.*: expected one number, or a tensor of one element"):
            logger.log_step(2, {"x": value})  # type: ignore[dict-item]
    for step in (-1, 1.5, "1", None, np.float32(2)):
        with pytest.raises(InputError, match=r"expected the number of completed optimizer steps"):
            logger.log_step(step, {"x": 1})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a mapping of names to numbers"):
        logger.log_step(2, 3.2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a mapping of names to numbers"):
        logger.log_validation(2, [3.2])  # type: ignore[arg-type]
    logger.log_step(np.int64(3), {"x": 1})  # type: ignore[arg-type]
    logger.finish()
    with pytest.raises(InputError, match="is closed and can take no more metrics"):
        logger.log_step(2, {"x": 1})
    assert load_training_log(tmp_path).training["x"].values == [2.5, 1]
