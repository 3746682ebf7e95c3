"""Steps that are made again: to the bit what a step is that runs, and not made again where that would be wrong.

With functions as they are written; with libraries in test_compiled_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from manual_backprop import kernels
from manual_backprop.config import ARCHITECTURES, CustomTransformerConfig
from manual_backprop.gradient_check import ODD, draw_batch
from manual_backprop.gradient_check.network_check import set_proof_scale
from manual_backprop.kernels.arena import Arena, kept, scratch
from manual_backprop.kernels.replay import KEPT, PLAIN, Replay
from manual_backprop.models.custom import CustomTransformer
from manual_backprop.models.network import Batch
from manual_backprop.models.recorder import Recorder

pytestmark = [pytest.mark.usefixtures("one_thread", "as_written"), pytest.mark.gradients]

B, T = 3, 9
STEPS = PLAIN + 5  # of which the last four are made again


class Plain(Replay):
    """Makes nothing again."""

    def __call__(self, work: Callable[..., Tensor], inputs: Any, course: Any) -> Tensor:
        return work(*inputs)


def network_of(replays: bool = True, **changed: Any) -> CustomTransformer:
    network = CustomTransformer(replace(ODD, **({"kernels": "fused", "compile": "always"} | changed)))
    set_proof_scale(network, seed=5)
    if not replays:
        network.replay = Plain(network.arena)
    return network


def batches(config: CustomTransformerConfig, count: int = STEPS, segments: bool = False) -> list[Batch]:
    return [draw_batch(config, B, T, seed, segments=segments) for seed in range(count)]


def step(network: CustomTransformer, batch: Batch, number: int = 1, denominator: int = B * T) -> Tensor:
    network.zero_gradients()
    return network.loss_and_gradients(batch, denominator=denominator, step=number)


def train(network: CustomTransformer, of: list[Batch]) -> list[Tensor]:
    """Of every step: its loss as it was handed out, and copies of its gradients and of the new parameters."""
    optimizer = network.adamw(weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)
    seen = []
    for number, batch in enumerate(of):
        loss = step(network, batch, number)
        seen += [loss, network.flat_gradients.buffer.clone()]
        optimizer.step(loss, 0.01 * (number + 1), max_grad_norm=1.0)
        seen.append(network.flat_parameters.buffer.clone())
    return seen


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert all(torch.isfinite(x).all() for x in want)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


# The same bits


@pytest.mark.parametrize("segments", [False, True], ids=["", "segments"])
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "bf16_mixed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_training_has_the_bits_of_one_that_repeats_nothing(architecture: str, precision: str, segments: bool) -> None:
    kind = {"architecture": architecture, "precision": precision, "recompute": "block" if segments else "none"}
    network, plain = network_of(**kind), network_of(replays=False, **kind)
    of = batches(network.config, segments=segments)
    assert_same(train(network, of), train(plain, of))
    assert network.replay.replays() == 1


def test_memory_is_poisoned_in_steps_that_are_made_again_too() -> None:
    network, plain = network_of(), network_of(replays=False)
    network.arena.poisoned = True
    of = batches(network.config)
    assert_same(train(network, of), train(plain, of))
    assert network.replay.replays() == 1


def test_gradients_are_added_to_what_is_there() -> None:
    network, plain = network_of(), network_of(replays=False)
    for batch in batches(network.config):
        for one in (network, plain):
            one.zero_gradients()
            one.flat_gradients.buffer.fill_(0.25)
            one.loss_and_gradients(batch, denominator=2 * B * T, step=1)
            one.loss_and_gradients(batch, denominator=2 * B * T, step=1)
        assert torch.equal(network.flat_gradients.buffer, plain.flat_gradients.buffer)
    assert network.replay.replays() == 1


# Other steps between


def test_steps_of_many_kinds_in_any_order() -> None:
    """Shapes, segments, denominators, evaluations; late a larger batch, for which the arena's blocks are made anew."""
    network, plain = network_of(), network_of(replays=False)
    small = [(draw_batch(ODD, rows, T, rows, segments=bool(rows % 2)), 10 + rows) for rows in (1, 2, 3, 4)]
    large = [(draw_batch(ODD, 7, T, 8), 5)]
    tapes = []
    for sort in (small * 6, large * 5, small[::-1] * 6):
        for batch, denominator in sort:
            got, want = (step(one, batch, denominator=denominator) for one in (network, plain))
            assert torch.equal(got, want)
            assert torch.equal(network.flat_gradients.buffer, plain.flat_gradients.buffer)
            assert torch.equal(network.predict(batch.tokens), plain.predict(batch.tokens))
        tapes.append(list(network.replay._tapes.values()))
    assert [len(some) for some in tapes] == [4, 1, 5]
    assert not set(tapes[0]) & set(tapes[2]), "they would keep the arena's old blocks"
    assert network.arena.allocated_bytes() == plain.arena.allocated_bytes()


def test_tapes_are_few() -> None:
    network = network_of()
    batch = batches(network.config, 1)[0]
    for denominator in range(1, KEPT + 4):
        for _ in range(STEPS):
            step(network, batch, denominator=denominator)
    assert network.replay.replays() == KEPT


# What is not made again


@pytest.mark.parametrize(
    "changed",
    [{"dropout": 0.2}, {"kernels": "reference"}, {"compile": "never"}],
    ids=["masks are drawn", "the reference", "as it is written"],
)
def test_never(changed: dict[str, Any]) -> None:
    network = network_of(**changed)
    losses = [step(network, batches(network.config, 1)[0], number).item() for number in range(STEPS)]
    assert network.replay.replays() == 0
    assert len(set(losses)) == (STEPS if "dropout" in changed else 1)


def test_large_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of()
    monkeypatch.setattr(kernels, "LARGEST_REPLAYED", B * T * network.config.d_model - 1)
    train(network, batches(network.config))
    assert network.replay.replays() == 0


def test_a_denominator_on_the_device_may_change() -> None:
    network = network_of()
    for denominator in (1, 2, 4, 8, 16, 32):
        loss = step(network, batches(network.config, 1)[0], denominator=torch.tensor(denominator))  # type: ignore[arg-type]
        assert loss.item() * denominator == pytest.approx(step(network, batches(network.config, 1)[0], 1, 1).item())


def test_who_looks_on_sees_every_call() -> None:
    network = network_of()
    of = batches(network.config)
    train(network, of)
    assert network.replay.replays() == 1
    with FlopCounterMode(display=False) as counted:
        step(network, of[0])
    with FlopCounterMode(display=False) as wanted:
        step(network_of(replays=False), of[0])
    assert counted.get_total_flops() == wanted.get_total_flops() > 0
    network.recorder = Recorder("embedding.output")
    step(network, of[0])
    assert "embedding.output" in network.recorder.tensors


@pytest.mark.parametrize("place", ["pairs", "parameters"])
def test_who_changes_a_network_sees_it(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another function in the place of one of the kernels, other numbers in the parameters."""
    network = network_of()
    of = batches(network.config)
    losses = [step(network, of[0]).item() for _ in range(STEPS)]
    if place == "pairs":
        written = kernels.feed_forward_forward

        def twice(*args: Any, **kwargs: Any) -> Any:
            y, cache = written(*args, **kwargs)
            return 2 * y, cache

        monkeypatch.setattr(kernels, "feed_forward_forward", twice)
    else:
        network.load_parameters({name: 2 * x for name, x in network.export_parameters().items()})
    assert abs(step(network, of[0]).item() - losses[-1]) > 1e-3
    assert len(set(losses)) == 1


def made_again(work: Callable[[Tensor], Tensor]) -> bool:
    """Whether steps of `work` are; that all of them are right, in either case."""
    arena = Arena()
    repeating = Replay(arena)
    for number in range(STEPS):
        torch.manual_seed(number)
        x = torch.arange(6.0).view(2, 3) + number
        with arena.step():
            got = repeating(work, (x,), "")
        torch.manual_seed(number)
        with Arena().step():
            assert torch.equal(got, work(x.clone()))
    return repeating.replays() == 1


def test_memory_views_copies_and_tuples() -> None:
    def work(x: Tensor) -> Tensor:
        largest, place = x.max(1)
        table = torch.full((2, 3), 0.5)
        table.T[1] += largest  # a view of something new that is changed
        with scratch((2, 3), x) as product:
            torch.mul(x, table, out=product)
            y = kept((3, 2), x).copy_(product.T)
        new = torch.empty_like(y).copy_(y)
        ordered, _ = torch.cat([new, x.view(3, 2)]).sort(0)
        return ordered[place].sum() + torch.tensor(3.0) * x.reshape(-1)[1]

    assert made_again(work)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x * x.sum().item(),
        lambda x: x if x.sum() < 30 else 2 * x,
        lambda x: x * torch.rand(3),
        lambda x: x[x > 5].sum(),
        lambda x: x.nonzero().sum(),
        lambda x: torch.tensor(0.5).add_(x.sum()),
        lambda x: x.unique().sum(),
    ],
    ids=["a number", "a branch", "drawn numbers", "a mask", "places", "a constant that changes", "sizes"],
)
def test_what_depends_on_numbers_is_no_tape(work: Callable[[Tensor], Tensor]) -> None:
    assert not made_again(work)
