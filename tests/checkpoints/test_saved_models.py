"""A CheckpointManager saves and loads a model, and what trains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from manual_backprop import CheckpointManager, CustomTransformerWrapper, EncoderDecoderWrapper
from manual_backprop.common.batch import Batch
from manual_backprop.common.errors import CheckpointError, InputError

SIZES: dict[str, Any] = {"vocab_size": 13, "d_model": 8, "n_blocks": 1, "n_heads": 2, "d_ffn": 8, "max_seq_len": 6}
IDS = torch.tensor([[1, 2, 3, 4]])


def values(model: CustomTransformerWrapper) -> torch.Tensor:
    return model.network.flat_parameters.buffer.clone()  # type: ignore[attr-defined]


def test_the_best_of_several_comes_back(tmp_path: Path) -> None:
    model, saved = CustomTransformerWrapper(**SIZES), {}
    checkpoints = CheckpointManager(tmp_path, keep=1)
    for metric in (3.0, 1.0, 2.0):
        model.train_step(IDS, IDS, learning_rate=0.1)
        path = checkpoints.save_checkpoint(model, metric=metric, state={"epoch": model.step})
        saved[path.name] = values(model)
    assert [path.name for path in checkpoints.list()] == ["step-000002", "step-000003"]  # the best, and the newest
    other = CustomTransformerWrapper(**SIZES, seed=1)
    best = checkpoints.load_checkpoint(other, checkpoints.best())
    assert torch.equal(values(other), saved["step-000002"])
    assert (other.step, best.metric, best.state["epoch"]) == (2, 1.0, 2)
    assert checkpoints.load_checkpoint(other).step == 3
    assert CustomTransformerWrapper.from_checkpoint(tmp_path).step == 3  # what the model's own method reads


def test_an_optimizer_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    def step(model: CustomTransformerWrapper, optimizer: Any) -> None:
        model.network.zero_gradients()
        loss = model.network.loss_and_gradients(Batch(IDS, IDS), denominator=4, step=1)
        optimizer.step(loss, 0.01)

    models = [CustomTransformerWrapper(**SIZES, seed=seed) for seed in (0, 1)]
    optimizers = [model.network.adamw(0.1, (0.9, 0.99), 1e-8) for model in models]
    for _ in range(3):
        step(models[0], optimizers[0])
    checkpoints = CheckpointManager(tmp_path)
    checkpoints.save_checkpoint(models[0], step=3, optimizer=optimizers[0])
    checkpoints.load_checkpoint(models[1], optimizer=optimizers[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer)
    assert torch.equal(values(models[0]), values(models[1]))
    with pytest.raises(CheckpointError, match="holds the state of another optimizer"):
        checkpoints.load_checkpoint(models[1], optimizer=models[1].network.sgd(0.1, 0.9))
    with pytest.raises(InputError, match=r"optimizer is a SGD; expected what `model.network.adamw` or `sgd` returned"):
        checkpoints.save_checkpoint(models[0], optimizer=torch.optim.SGD([IDS.float()], lr=1))  # type: ignore[arg-type]
    wider = CustomTransformerWrapper(**SIZES | {"d_model": 16}).network.adamw(0.1, (0.9, 0.99), 1e-8)
    models[1].train_step(IDS, IDS, learning_rate=0.1)
    before = values(models[1])
    with pytest.raises(CheckpointError, match="holds the state of another optimizer"):
        checkpoints.load_checkpoint(models[1], optimizer=wider)
    assert torch.equal(values(models[1]), before)
    checkpoints.save_checkpoint(models[0], step=4)
    before = values(models[1])
    models[0].train_step(IDS, IDS, learning_rate=0.1)
    with pytest.raises(CheckpointError, match="holds no optimizer"):
        checkpoints.load_checkpoint(models[1], optimizer=optimizers[1])
    assert torch.equal(values(models[1]), before)


def test_another_precision_is_told_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wide = CustomTransformerWrapper(**SIZES, precision="fp64")
    optimizer = wide.network.adamw(0.1, (0.9, 0.99), 1e-8)
    checkpoints = CheckpointManager(tmp_path)
    path = checkpoints.save_checkpoint(wide, optimizer=optimizer)
    checkpoints.load_checkpoint(wide, optimizer=optimizer)
    assert not caplog.messages
    narrow = CustomTransformerWrapper(**SIZES)
    loads = (
        lambda: checkpoints.load_checkpoint(narrow, optimizer=narrow.network.adamw(0.1, (0.9, 0.99), 1e-8)),
        lambda: narrow.load_checkpoint(path),
        lambda: CustomTransformerWrapper.from_checkpoint(path, precision="fp32"),
    )
    for load in loads:
        caplog.clear()
        load()
        (line,) = caplog.messages
        assert line.startswith(f"{path} was saved with precision=fp64 and is loaded with precision=fp32: ")
    assert torch.equal(values(narrow), values(wide).float())


def test_the_state_of_an_older_version_is_read(tmp_path: Path) -> None:
    """It repeated the step as `training_steps`."""
    model, other = (CustomTransformerWrapper(**SIZES, seed=seed) for seed in (0, 1))
    tensors, state = model.tensors_and_state()
    assert "training_steps" not in state
    CheckpointManager(tmp_path).save(5, tensors, state | {"training_steps": 5})
    assert CheckpointManager(tmp_path).load_checkpoint(other).step == other.step == 5
    assert torch.equal(values(other), values(model))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    checkpoints, model = CheckpointManager(tmp_path), CustomTransformerWrapper(**SIZES)
    for wrong in (model.network, torch.nn.Linear(2, 2), CustomTransformerWrapper):
        for use in (checkpoints.save_checkpoint, checkpoints.load_checkpoint):
            with pytest.raises(
                InputError,
                match=rf"model is a {type(wrong).__name__}; expected a wrapper such as CustomTransformerWrapper",
            ):
                use(wrong)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="state has network, which the model writes itself"):
        checkpoints.save_checkpoint(model, state={"network": {}})
    with pytest.raises(InputError, match=r"state is not JSON .*Tensor.*; expected numbers, text, None, and lists"):
        checkpoints.save_checkpoint(model, state={"loss": torch.ones(())})
    with pytest.raises(InputError, match="metric='low': expected one number"):
        checkpoints.save_checkpoint(model, metric="low")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"step=3.0: a checkpoint counts completed optimizer steps"):
        checkpoints.save_checkpoint(model, step=3.0)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoints.load_checkpoint(model)
    checkpoints.save_checkpoint(EncoderDecoderWrapper(**SIZES), step=torch.tensor(7))  # type: ignore[arg-type]
    assert [path.name for path in checkpoints.list()] == ["step-000007"]
    with pytest.raises(CheckpointError, match="network is encoder_decoder there and decoder here"):
        checkpoints.load_checkpoint(model)
