"""A step waits for nothing, and copies nothing from the host to its device except the batch.

PyTorch's device `meta` replaces a GPU. Its tensors have no numbers: code that reads a number fails, and copies from the
CPU are recorded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run_tools import config_of
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from manual_backprop import CustomTransformer, CustomTransformerConfig
from manual_backprop.common.batch import Batch
from manual_backprop.common.interruption import Interruption
from manual_backprop.models.autograd import AutogradNetwork, summed_loss
from manual_backprop.ops import cross_entropy_backward, cross_entropy_forward
from manual_backprop.optim.optimizers import AdamW
from manual_backprop.training.runner import Runner

OF_PYTHONS_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor)


class HostCopies(TorchFunctionMode):
    """Records the calls that copy numbers from the host to the device `meta`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)]
        if "meta" in made and ("cpu" in given or (function in OF_PYTHONS_NUMBERS and "meta" not in given)):
            self.found.append(function.__name__)
        return result


def network_on_meta(monkeypatch: pytest.MonkeyPatch, **more: Any) -> CustomTransformer:
    monkeypatch.setattr(CustomTransformerConfig, "get_device", lambda config: torch.device("meta"))
    sizes = {"vocab_size": 11, "d_model": 8, "n_blocks": 2, "n_heads": 2, "d_ffn": 14, "max_seq_len": 5}
    return CustomTransformer(CustomTransformerConfig(**sizes, compile="never", **more))


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
@pytest.mark.parametrize("architecture", ["gpt2", "vaswani", "llama"])
@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_a_step(
    kernels: str, architecture: str, precision: str, segments: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_on_meta(
        monkeypatch, kernels=kernels, architecture=architecture, precision=precision, label_smoothing=0.1
    )
    # the textbook's: PyTorch's fused kernels, which the other one calls, do not know this device
    optimizer = AdamW(network.layout, network.flat_parameters, network.flat_gradients, 0.1)
    tokens = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    batch = Batch(tokens, tokens, tokens if segments else None)
    for count in (10, network.on_device(10)):
        with HostCopies() as copies:
            network.zero_gradients()
            loss = network.loss_and_gradients(batch, denominator=count, step=1)
            optimizer.step(loss, 1e-3, 1.0)
        assert copies.found == []


def test_a_copy_is_found() -> None:
    with HostCopies() as copies:
        torch.as_tensor(10, device="meta")
        torch.ones(2).to("meta")
        torch.full((), 10, device="meta")
        torch.ones(2, device="meta") * 3
    assert copies.found == ["as_tensor", "to"]


def test_the_loss_alone_and_by_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(2, 5, 7, device="meta")
    targets = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    network = network_on_meta(monkeypatch)
    with HostCopies() as copies:
        for denominator in (None, 3, network.on_device(3)):
            _, cache = cross_entropy_forward(logits, targets, denominator, 0.1)
            cross_entropy_backward(0.5, cache)
        summed_loss(logits, targets, 0.1, AutogradNetwork.on_device(network, 3))  # type: ignore[arg-type]
    assert copies.found == []


@pytest.mark.parametrize("implementation", ["custom", "torch", "baseline"])
def test_all_batches_of_a_step_are_given_one_denominator_on_the_device(
    implementation: str, text: Path, tmp_path: Path
) -> None:
    """The same tensor: a Python number would be filled in for each batch, and would be constant in a recorded step."""
    config = config_of(text, f"implementation={implementation}", "training.gradient_accumulation_steps=3")
    with Interruption() as interruption:
        runner = Runner(config, tmp_path / "outputs", interruption)
    given: list[Any] = []
    real = runner.model.network.loss_and_gradients

    def loss_and_gradients(batch: Batch, *, denominator: Any, step: int | None) -> Tensor:
        given.append(denominator)
        return real(batch, denominator=denominator, step=step)

    runner.model.network.loss_and_gradients = loss_and_gradients  # type: ignore[method-assign]
    runner.train_step()
    assert len(given) == 3
    assert isinstance(given[0], Tensor)
    assert all(one is given[0] for one in given)
    assert int(given[0]) == runner.order.tokens_per_step
