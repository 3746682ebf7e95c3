"""recompute=block with autograd: the same numbers as a step that keeps everything, with less memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manual_backprop.config.schema import ARCHITECTURES, CustomTransformerConfig
from manual_backprop.models.implementations import IMPLEMENTATIONS, build_network
from manual_backprop.study.gradient_check import ODD, draw_batch
from manual_backprop.study.gradient_check.network_check import step_of

pytestmark = pytest.mark.usefixtures("one_thread")

AUTOGRAD = [name for name in IMPLEMENTATIONS if name != "custom"]


@pytest.mark.parametrize("precision", ["fp64", "bf16_mixed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("implementation", AUTOGRAD)
def test_a_recomputed_block_has_the_same_bits(implementation: str, architecture: str, precision: str) -> None:
    """Dropout has the masks of the first time, although later blocks have drawn their masks in between."""
    config = replace(
        ODD, architecture=architecture, n_blocks=3, dropout=0.3, precision=precision, compile="never", recompute="block"
    )
    batch = draw_batch(config, 3, 7)
    kept, recomputed = (build_network(implementation, replace(config, recompute=how)) for how in ("none", "block"))
    for step in (1, 2):
        losses = [one.loss_and_gradients(batch, denominator=9, step=step) for one in (kept, recomputed)]
        assert torch.equal(*losses)
        gradients = recomputed.gradients
        assert all(torch.equal(gradient, gradients[name]) for name, gradient in kept.gradients.items())
        assert all(bool(gradient.any()) for name, gradient in gradients.items() if "key.bias" not in name)
    logits = [one.forward(batch.tokens, step=3) for one in (kept, recomputed)]
    assert torch.equal(*logits)
    for one in (kept, recomputed):
        one.zero_gradients()
        one.backward(torch.ones_like(logits[0]))
    gradients = recomputed.gradients
    assert all(torch.equal(gradient, gradients[name]) for name, gradient in kept.gradients.items())
    assert torch.equal(kept.predict(batch.tokens), recomputed.predict(batch.tokens))


class Living(TorchDispatchMode):
    """The peak of the bytes of all live tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, operation: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.known:
                storage = leaf.untyped_storage()
                self.known[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._end, storage._cdata)
        self.peak = max(self.peak, self.now)
        return made

    def _end(self, place: int) -> None:
        self.now -= self.known.pop(place)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("implementation", AUTOGRAD)
def test_less_is_alive_at_the_peak_of_a_step(implementation: str, architecture: str) -> None:
    """For six blocks: the tensors of one block and six inputs, instead of the tensors of six blocks."""
    config = CustomTransformerConfig(
        vocab_size=16,
        d_model=32,
        n_blocks=6,
        n_heads=4,
        d_ffn=64,
        max_seq_len=32,
        architecture=architecture,
        compile="never",
        dropout=0.1,
    )
    batch, peaks = draw_batch(config, 8, 32), {}
    for how in ("none", "block"):
        network = build_network(implementation, replace(config, recompute=how))
        with Living() as living:
            step_of(network, batch)
        peaks[how] = living.peak
    assert peaks["block"] < peaks["none"] / 2.5


@pytest.mark.nightly
def test_a_compiled_step_recomputes_with_the_same_dropout() -> None:
    """The compiler draws its own masks, so the gradient is compared with the loss along one direction."""
    config = replace(ODD, dropout=0.3, compile="always", recompute="block")
    network, batch = build_network("baseline", config), draw_batch(config, 3, 7)

    def loss() -> float:
        return float(network.loss_and_gradients(batch, denominator=9, step=1))

    loss()
    gradients = {name: gradient.clone() for name, gradient in network.gradients.items()}
    generator = torch.Generator().manual_seed(0)
    way = {name: torch.randn(g.shape, generator=generator, dtype=g.dtype) for name, g in gradients.items()}
    losses = []
    for size in (1e-6, -2e-6):
        for name, parameter in network.parameters.items():
            parameter.add_(way[name], alpha=size)
        losses.append(loss())
    slope = sum(float((gradients[name] * way[name]).sum()) for name in way)
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)
