"""Replayed steps have the bits of eager steps, and steps are not replayed where that would be wrong.

Here with uncompiled functions; test_compiled_kernels.py has the library.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from manual_backprop import kernels
from manual_backprop.common.batch import Batch
from manual_backprop.config.schema import ARCHITECTURES, CustomTransformerConfig
from manual_backprop.kernels import replay
from manual_backprop.kernels.arena import Arena, kept, scratch
from manual_backprop.kernels.replay import MOST_STEPS, WARM_UP, Replay
from manual_backprop.kernels.sizes import SIZES
from manual_backprop.models.custom import CustomTransformer
from manual_backprop.models.recorder import Recorder
from manual_backprop.study.gradient_check import ODD, draw_batch, odd_cases
from manual_backprop.study.gradient_check.network_check import set_proof_scale

pytestmark = [pytest.mark.usefixtures("one_thread", "as_written"), pytest.mark.gradients]

B, T = 3, 9
STEPS = WARM_UP + 5  # of which the last four are replayed


class Plain(Replay):
    """A Replay that never replays."""

    def __call__(self, work: Callable[..., Tensor], inputs: Any, signature: Any) -> Tensor:
        return work(*inputs)


def network_of(replays: bool = True, **changed: Any) -> CustomTransformer:
    network = CustomTransformer(replace(ODD, **({"kernels": "fused", "compile": "always"} | changed)))
    set_proof_scale(network, seed=5)
    if not replays:
        network.replay = Plain(network.arena)
    return network


def batches(config: CustomTransformerConfig, count: int = STEPS, segments: bool = False) -> list[Batch]:
    return [draw_batch(config, B, T, seed, segments=segments) for seed in range(count)]


def step(network: CustomTransformer, batch: Batch, number: int = 1, denominator: int | Tensor = B * T) -> Tensor:
    network.zero_gradients()
    return network.loss_and_gradients(batch, denominator=denominator, step=number)


def train(network: CustomTransformer, of: Sequence[Batch]) -> list[Tensor]:
    """For every step: its loss as returned, and copies of its gradients and of the new parameters."""
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


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "bf16_mixed"])
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_training_has_the_bits_of_one_that_replays_nothing(architecture: str, precision: str, recompute: str) -> None:
    """With networks that together cover every path except dropout."""
    for name, config, batch, _ in odd_cases(architecture):
        config = replace(config, precision=precision, recompute=recompute, dropout=0.0)
        other = replace(batch, tokens=batch.tokens.flip(0, 1), targets=batch.targets.flip(0, 1))
        changed = vars(config) | {"kernels": "fused", "compile": "always"}
        network, plain = network_of(**changed), network_of(replays=False, **changed)
        of = [batch, other] * 3  # two warm up, one is recorded, three are replayed
        assert_same(train(network, of), train(plain, of))
        assert len(network.replay.recorded) == 1, name


def test_memory_is_poisoned_in_replayed_steps_too() -> None:
    network, plain = network_of(), network_of(replays=False)
    network.arena.poisoned = True
    of = batches(network.config)
    assert_same(train(network, of), train(plain, of))
    assert len(network.replay.recorded) == 1


def test_gradients_are_added_to_what_is_there() -> None:
    network, plain = network_of(), network_of(replays=False)
    for batch in batches(network.config):
        for one in (network, plain):
            one.zero_gradients()
            one.flat_gradients.buffer.fill_(0.25)
            one.loss_and_gradients(batch, denominator=2 * B * T, step=1)
            one.loss_and_gradients(batch, denominator=2 * B * T, step=1)
        assert torch.equal(network.flat_gradients.buffer, plain.flat_gradients.buffer)
    assert len(network.replay.recorded) == 1


# Other steps between


def test_steps_of_many_kinds_in_any_order() -> None:
    """Shapes, segments, denominators, evaluations; finally a larger batch, for which the arena reallocates blocks."""
    network, plain = network_of(), network_of(replays=False)
    small = [(draw_batch(ODD, rows, T, rows, segments=bool(rows % 2)), 10 + rows) for rows in (1, 2, 3)]
    large = [(draw_batch(ODD, 7, T, 8), 5)]
    recorded = []
    for sort in (small * 6, large * 5, small[::-1] * 6):
        for batch, denominator in sort:
            got, want = (step(one, batch, denominator=denominator) for one in (network, plain))
            assert torch.equal(got, want)
            assert torch.equal(network.flat_gradients.buffer, plain.flat_gradients.buffer)
            assert torch.equal(network.predict(batch.tokens), plain.predict(batch.tokens))
        recorded.append(list(network.arena.recorded_steps.values()))
    assert [len(some) for some in recorded] == [3, 1, 4]
    assert not set(recorded[0]) & set(recorded[2]), "they would keep the arena's old blocks"
    assert network.arena.allocated_bytes() == plain.arena.allocated_bytes()


def test_no_compiler_is_imported() -> None:
    """Importing one would take a second and 75 MB."""
    script = (
        "import sys, torch; from manual_backprop.kernels.arena import Arena; "
        "from manual_backprop.kernels.replay import Replay; replay = Replay(Arena()); "
        "[replay(lambda x: x + 1, (torch.ones(3),), '') for _ in range(5)]; "
        "assert len(replay.recorded) == 1; assert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_recorded_steps_are_few_and_the_least_recently_used_goes() -> None:
    network = network_of()
    kinds = [draw_batch(ODD, 2, length) for length in range(2, MOST_STEPS + 4)]
    step(network, draw_batch(ODD, 2, 9))  # the largest: the arena has its size
    for batch in kinds:
        for _ in range(STEPS):
            step(network, batch)
            step(network, kinds[0])
    assert len(network.replay.recorded) == MOST_STEPS
    lengths = [one.inputs[0].shape[1] for one in network.arena.recorded_steps.values()]
    assert lengths == [*range(MOST_STEPS + 1, MOST_STEPS + 4), 2]


def test_a_step_that_holds_too_much_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama's norm and rotary positions allocate tensors outside the arena."""
    replays = []
    for limit in (replay.MOST_BYTES, 1000):
        monkeypatch.setattr(replay, "MOST_BYTES", limit)
        network = network_of(architecture="llama")
        train(network, batches(network.config))
        replays.append(len(network.replay.recorded))
    assert replays == [1, 0]


def test_a_step_that_fails_while_it_is_recorded_fails_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, plain = network_of(), network_of(replays=False)
    of = batches(network.config)
    train(network, of[:WARM_UP])
    train(plain, of[:WARM_UP])
    with monkeypatch.context() as broken:
        broken.setattr(
            replay, "_is_replayable_operator", lambda function, given: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            step(network, of[0])
    assert len(network.replay.recorded) == 0
    assert_same(train(network, of), train(plain, of))


# What is not replayed


@pytest.mark.parametrize(
    "changed",
    [{"dropout": 0.2}, {"kernels": "reference"}, {"compile": "never"}],
    ids=["masks are drawn", "the reference", "as it is written"],
)
def test_never(changed: dict[str, Any]) -> None:
    network = network_of(**changed)
    losses = [step(network, batches(network.config, 1)[0], number).item() for number in range(STEPS)]
    assert len(network.replay.recorded) == 0
    assert len(set(losses)) == (STEPS if "dropout" in changed else 1)


def test_large_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of()
    monkeypatch.setitem(SIZES, "cpu", replace(SIZES["cpu"], replayed=B * T * network.config.d_model - 1))
    train(network, batches(network.config))
    assert len(network.replay.recorded) == 0


def test_the_denominator_may_change() -> None:
    network = network_of()
    (batch,) = batches(network.config, 1)
    want = step(network, batch, denominator=1).item()
    for denominator in (1, 2, 4, 8, 16, 32, torch.tensor(3), torch.tensor(5), torch.tensor(64)):
        assert step(network, batch, denominator=denominator).item() * float(denominator) == pytest.approx(want)
    assert len(network.replay.recorded) == 1


def test_modes_and_profilers_see_every_call() -> None:
    network = network_of()
    of = batches(network.config)
    train(network, of)
    assert len(network.replay.recorded) == 1
    with FlopCounterMode(display=False) as counted:
        step(network, of[0])
    with FlopCounterMode(display=False) as wanted:
        step(network_of(replays=False), of[0])
    assert counted.get_total_flops() == wanted.get_total_flops() > 0
    with torch.profiler.profile() as profiled:
        step(network, of[0])
    assert any("transpose" in event.key for event in profiled.key_averages()), "views are made"
    seen = []

    class Seeing(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Seeing():
        step(network, of[0])
    assert torch.bmm in seen
    network.recorder = Recorder("embedding.output")
    step(network, of[0])
    assert "embedding.output" in network.recorder.tensors


@pytest.mark.parametrize("place", ["pairs", "parameters", "settings", "activation"])
def test_who_changes_a_network_sees_it(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of()
    (batch,) = batches(network.config, 1)
    losses = [step(network, batch).item() for _ in range(STEPS)]
    if place == "pairs":
        written = kernels.feed_forward_forward

        def twice(*args: Any, **kwargs: Any) -> Any:
            y, cache = written(*args, **kwargs)
            return 2 * y, cache

        monkeypatch.setattr(kernels, "feed_forward_forward", twice)
    elif place == "settings":
        network.config = replace(network.config, label_smoothing=0.1)
    elif place == "activation":
        network.activation = "relu"
    else:
        network.load_parameters({name: 2 * x for name, x in network.export_parameters().items()})
    assert abs(step(network, batch).item() - losses[-1]) > 1e-3
    assert len(set(losses)) == 1


def is_replayed(work: Callable[[Tensor], Tensor]) -> bool:
    """Whether steps of `work` are replayed; it also checks that all of them are right in either case."""
    arena = Arena()
    replaying = Replay(arena)
    for number in range(STEPS):
        torch.manual_seed(number)
        x = torch.arange(6.0).view(2, 3) + number
        with arena.step():
            got = replaying(work, (x,), "")
        torch.manual_seed(number)
        with Arena().step():
            assert torch.equal(got, work(x.clone()))
    return len(replaying.recorded) == 1


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
        return ordered[place].sum() + y.sum() + torch.tensor(3.0) * x.reshape(-1)[1]

    assert is_replayed(work)


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
        lambda x: torch.ones(6).unsqueeze_(0)[0] * x.view(-1),
    ],
    ids=["a number", "a branch", "drawn numbers", "a mask", "places", "a constant that changes", "sizes", "a form"],
)
def test_what_depends_on_numbers_is_not_replayed(work: Callable[[Tensor], Tensor]) -> None:
    assert not is_replayed(work)
