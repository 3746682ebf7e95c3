"""bf16_mixed: the rounded matrices always match the parameters, whoever has changed these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from manual_backprop.common.batch import Batch
from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.kernels.cpu import compiled, optimizers, products
from manual_backprop.models.custom import CustomTransformer
from manual_backprop.models.step import HandWrittenNetwork
from manual_backprop.optim.optimizers import FlatOptimizer, Optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = CustomTransformerConfig(
    vocab_size=11, d_model=8, n_heads=2, max_seq_len=6, n_blocks=1, precision="bf16_mixed", kernels="fused"
)
TOKENS = torch.arange(12).view(2, 6) % 11
BATCH = Batch(TOKENS, TOKENS.roll(1))


def step(network: HandWrittenNetwork) -> Tensor:
    network.zero_gradients()
    return network.loss_and_gradients(BATCH, denominator=12, step=1)


def assert_reads_its_parameters(network: HandWrittenNetwork) -> None:
    """The network has the same bits as a new one with these parameters."""
    other = type(network)(network.config)
    other.load_parameters(network.export_parameters())
    assert torch.equal(step(network), step(other))
    assert torch.equal(network.flat_gradients.buffer, other.flat_gradients.buffer)
    assert torch.equal(network.predict(TOKENS), other.predict(TOKENS))


def adamw(network: HandWrittenNetwork) -> Optimizer:
    return network.adamw(weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)


def unknown_adamw(network: HandWrittenNetwork) -> Optimizer:
    """An AdamW that does not know the rounded matrices."""
    optimizer = optimizers.AdamW(network.layout, network.flat_parameters, network.flat_gradients)
    optimizer.uses_library = True
    return optimizer


def by_pytorch(network: HandWrittenNetwork, fused: bool) -> None:
    """Writes with a fused optimizer of PyTorch, which does not count writes."""
    parameters = [nn.Parameter(view) for view in network.parameters.values()]
    for parameter, gradient in zip(parameters, network.gradients.values(), strict=True):
        parameter.grad = gradient
    torch.optim.AdamW(parameters, lr=0.1, fused=fused).step()


WRITERS: dict[str, Callable[[HandWrittenNetwork], object]] = {
    "load_parameters": lambda network: network.load_parameters(
        {name: 1.1 * view for name, view in network.parameters.items()}
    ),
    "a view": lambda network: network.parameters["blocks.0.feed_forward.hidden.weight"].mul_(2),
    "the table": lambda network: network.parameters["token_embedding.weight"].mul_(2),
    "the buffer": lambda network: network.flat_parameters.buffer.mul_(1.1),
    "update_parameters": lambda network: network.update_parameters(0.5),
    "past PyTorch": lambda network: network.parameters["blocks.0.attention.output.weight"].data.mul_(2),
    "NumPy": lambda network: network.parameters["token_embedding.weight"].numpy().fill(0.25),
    "PyTorch": lambda network: by_pytorch(network, fused=False),
    "PyTorch, fused": lambda network: by_pytorch(network, fused=True),
}
OPTIMIZERS: dict[str, Callable[[HandWrittenNetwork], Optimizer]] = {
    "adamw": adamw,
    "sgd": lambda network: network.sgd(weight_decay=0.1, momentum=0.9),
    "an adamw that knows of nothing": unknown_adamw,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_products_read_what_was_written(writer: str, kernels: str) -> None:
    network = CustomTransformer(replace(CONFIG, kernels=kernels, compile="never"))
    step(network)
    before = network.flat_parameters.buffer.clone()
    WRITERS[writer](network)
    assert not torch.equal(network.flat_parameters.buffer, before)
    assert_reads_its_parameters(network)


@pytest.mark.parametrize("compile", ["never", pytest.param("always", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_products_read_what_an_optimizer_has_written(name: str, compile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step, after a non-finite step, and after a step before which other code has changed parameters."""
    monkeypatch.setattr(products, "rounds_weights", lambda *_: False)  # as on most processors
    network = CustomTransformer(replace(CONFIG, compile=compile))
    optimizer = OPTIMIZERS[name](network)
    for change in (None, "not finite", "a view", None):
        loss = step(network)
        if change == "not finite":
            loss = loss * torch.nan
        elif change is not None:
            WRITERS[change](network)
        optimizer.step(loss, 0.1, 1.0)
        if compile == "always" and name != "an adamw that knows of nothing" and change != "a view":
            assert network.rounded is not None
            assert network.rounded.is_fresh(), "the step was to write both"
        assert_reads_its_parameters(network)
    assert not compiled._failed


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_only_matrices_of_products_are_rounded(kernels: str) -> None:
    """In the other precisions there are no copies."""
    network = CustomTransformer(replace(CONFIG, kernels=kernels, compile="never"))
    narrow = {name for name, view in network.block_parameters["blocks.0"].items() if view.dtype == torch.bfloat16}
    assert narrow == {name for name, view in network.block_parameters["blocks.0"].items() if view.dim() == 2}
    assert network.head.dtype == torch.bfloat16
    assert {view.dtype for view in network.parameters.values()} == {torch.float32}
    for precision in ("fp64", "fp32", "bf16"):
        network = CustomTransformer(replace(CONFIG, kernels=kernels, precision=precision))
        assert_no_copies(network)


def assert_no_copies(network: CustomTransformer) -> None:
    assert network.rounded is None
    optimizer = adamw(network)
    assert isinstance(optimizer, FlatOptimizer)
    assert optimizer.rounded is None


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "vaswani", "llama"])
def test_products_that_round_the_weights_read_the_parameters(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They give the same bits as for matrices that are rounded already, and PyTorch multiplies nothing."""
    config = replace(CONFIG, architecture=architecture, d_model=64, d_ffn=96, compile="always")
    network, other = (CustomTransformer(config) for _ in range(2))
    if not products.rounds_weights(network.config.precision, network.device):
        assert network.rounded is not None  # on this processor PyTorch multiplies
        return
    assert_no_copies(network)
    read_by_products = {name for name in network.parameters if name.startswith(("blocks.", "head."))}
    rounded = {
        name: view.bfloat16().float() if name in read_by_products and view.dim() == 2 else view
        for name, view in network.parameters.items()
    }
    other.load_parameters(rounded)
    assert not torch.equal(network.flat_parameters.buffer, other.flat_parameters.buffer)
    for multiply in ("mm", "addmm"):
        monkeypatch.delattr(torch, multiply)
    assert torch.equal(step(network), step(other))
    assert torch.equal(network.flat_gradients.buffer, other.flat_gradients.buffer)
    assert torch.equal(network.predict(TOKENS), other.predict(TOKENS))
    assert not compiled._failed
