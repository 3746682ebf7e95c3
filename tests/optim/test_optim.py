"""AdamW and SGD against torch.optim; a step that is not finite changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from manual_backprop.common.errors import InputError
from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.kernels.cpu import compiled
from manual_backprop.kernels.cpu.optimizers import SGD as FusedSGD
from manual_backprop.kernels.cpu.optimizers import AdamW as FusedAdamW
from manual_backprop.kernels.cpu.optimizers import adamw_step, gradient_norm, sgd_step
from manual_backprop.models.custom import CustomTransformer
from manual_backprop.optim import optimizers as optim
from manual_backprop.optim.optimizers import SGD, AdamW, FlatOptimizer
from manual_backprop.optim.parameters import Flat, Layout

SHAPES = {"first.weight": (7, 5), "first.bias": (7,), "norm.weight": (5,), "second.weight": (3, 7)}
FINITE = torch.tensor(1.0, dtype=torch.float64)


class Setup:
    """An optimizer over random parameters, with a sequence of random gradients that depends on the seed."""

    def __init__(
        self,
        make: Callable[..., FlatOptimizer],
        dtype: torch.dtype = torch.float64,
        uses_library: bool = False,
        **settings,
    ):
        self.generator = torch.Generator().manual_seed(0)
        self.layout = Layout(SHAPES)
        self.parameters, self.gradients = (self.layout.allocate(dtype, "cpu") for _ in range(2))
        self.fill(self.parameters)
        self.optimizer = make(self.layout, self.parameters, self.gradients, **settings)
        self.optimizer.uses_library = uses_library

    def fill(self, flat: Flat, scale: float = 1.0) -> None:
        for view in flat.views.values():
            view.copy_(torch.randn(view.shape, generator=self.generator, dtype=torch.float64) * scale)

    def bits(self) -> dict[str, Tensor]:
        return {"parameters": self.parameters.buffer.clone(), **self.optimizer.state()}


KINDS = [
    pytest.param(AdamW, {"weight_decay": 0.1, "betas": (0.8, 0.95), "epsilon": 1e-6}, id="adamw"),
    pytest.param(FusedAdamW, {"weight_decay": 0.1, "betas": (0.8, 0.95), "epsilon": 1e-6}, id="fused adamw"),
    pytest.param(SGD, {"weight_decay": 0.0, "momentum": 0.7}, id="sgd"),
    pytest.param(FusedSGD, {"weight_decay": 0.0, "momentum": 0.7}, id="fused sgd"),
    pytest.param(FusedSGD, {"weight_decay": 0.0, "momentum": 0.0}, id="fused sgd without momentum"),
]
ONE_PASS = [
    pytest.param(kind, settings | {"uses_library": True}, marks=pytest.mark.slow, id=f"compiled {name}")
    for kind, settings, name in (
        (FusedAdamW, {"weight_decay": 0.1, "betas": (0.8, 0.95), "epsilon": 1e-6}, "adamw"),
        (FusedSGD, {"weight_decay": 0.1, "momentum": 0.7}, "sgd"),
        (FusedSGD, {"weight_decay": 0.1, "momentum": 0.0}, "sgd without momentum"),
    )
]


def theirs(setup: Setup, make: Callable, settings: dict) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    leaves = {name: view.detach().clone().requires_grad_() for name, view in setup.parameters.views.items()}
    matrices = [leaf for leaf in leaves.values() if leaf.dim() >= 2]
    rest = [leaf for leaf in leaves.values() if leaf.dim() < 2]
    if issubclass(make, AdamW):
        adamw = {"betas": settings["betas"], "eps": settings["epsilon"]}
        groups = [{"params": matrices, "weight_decay": settings["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
        return leaves, torch.optim.AdamW(groups, lr=1.0, **adamw)
    return leaves, torch.optim.SGD([*matrices, *rest], lr=1.0, momentum=settings["momentum"])


@pytest.mark.parametrize("chunk", [1 << 18, 40], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0, 1e6])
@pytest.mark.parametrize(("make", "settings"), KINDS)
def test_steps_are_those_of_torch(make, settings, max_grad_norm, chunk, monkeypatch) -> None:
    monkeypatch.setattr(optim.FlatOptimizer, "chunk", chunk)
    ours = Setup(make, **settings)
    leaves, their_optimizer = theirs(ours, make, settings)
    for step in range(12):
        ours.fill(ours.gradients, scale=10.0 ** (step % 3 - 1))
        rate = 0.03 / (step + 1)
        for name, leaf in leaves.items():
            leaf.grad = ours.gradients.views[name].clone()
        for group in their_optimizer.param_groups:
            group["lr"] = rate
        limit = math.inf if max_grad_norm is None else max_grad_norm
        want_norm = torch.nn.utils.clip_grad_norm_(leaves.values(), limit)
        before = ours.gradients.buffer.clone()
        norm = ours.optimizer.step(FINITE, rate, max_grad_norm)
        their_optimizer.step()
        assert float(norm) == pytest.approx(float(want_norm), rel=1e-13)
        assert torch.equal(ours.gradients.buffer, before), "a step reads the gradients and leaves them alone"
        for name, leaf in leaves.items():
            torch.testing.assert_close(ours.parameters.views[name], leaf.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", [SGD, FusedSGD])
def test_sgd_decays_matrices_alone_and_decoupled(make) -> None:
    setup = Setup(make, weight_decay=0.1)
    before = {name: view.clone() for name, view in setup.parameters.views.items()}
    setup.optimizer.step(FINITE, 0.5)
    for name, view in setup.parameters.views.items():
        torch.testing.assert_close(view, before[name] * (0.95 if view.dim() >= 2 else 1.0), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("where", "value"), [("loss", math.nan), ("loss", -math.inf), ("gradient", math.nan), ("gradient", math.inf)]
)
@pytest.mark.parametrize(("make", "settings"), KINDS + ONE_PASS)
def test_a_step_that_is_not_finite_changes_no_bit(make, settings, where, value, dtype) -> None:
    """The later steps are those of a run without the non-finite step."""
    ours, other = Setup(make, dtype, **settings), Setup(make, dtype, **settings)
    for setup in (ours, other):
        setup.fill(setup.gradients)
        setup.optimizer.step(FINITE, 0.01, 1.0)
    before = ours.bits()
    gradient = ours.gradients.buffer.clone()
    loss = FINITE
    if where == "loss":
        loss = torch.tensor(value)
    else:
        ours.gradients.views["norm.weight"][2] = value
    ours.optimizer.step(loss, 0.01, 1.0)
    counts = ours.optimizer.counts.tolist()
    after = ours.bits()
    for name in before.keys() - {"counts"}:
        assert torch.equal(before[name], after[name]), name
    assert counts == [1, 1, 1, 1]

    ours.gradients.buffer.copy_(gradient)
    for _ in range(3):
        for setup in (ours, other):
            setup.fill(setup.gradients)
            setup.optimizer.step(FINITE, 0.01, 1.0)
    mine, wanted = ours.bits(), other.bits()
    for name in mine.keys() - {"counts"}:
        assert torch.equal(mine[name], wanted[name]), name
    assert ours.optimizer.counts.tolist() == [4, 1, 0, 1]


@pytest.mark.parametrize(("make", "settings"), KINDS)
def test_the_first_step_may_be_the_one_that_is_not_finite(make, settings) -> None:
    setup = Setup(make, **settings)
    before = setup.bits()
    setup.optimizer.step(torch.tensor(math.nan), 0.1)
    after = setup.bits()
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - {"counts"})


@pytest.mark.parametrize(("kernels", "kinds"), [("reference", [AdamW, SGD]), ("fused", [FusedAdamW, FusedSGD])])
def test_kernels_choose_the_optimizer(kernels: str, kinds: list[type]) -> None:
    network = CustomTransformer(CustomTransformerConfig(vocab_size=11, d_model=8, n_heads=2, kernels=kernels))
    assert [type(network.adamw(0.1, (0.9, 0.99), 1e-8)), type(network.sgd(0.1, 0.9))] == kinds


@pytest.mark.parametrize(
    ("reference", "fused", "settings"),
    [
        (AdamW, FusedAdamW, {"betas": (0.8, 0.95)}),
        (SGD, FusedSGD, {"momentum": 0.7}),
        (SGD, FusedSGD, {"momentum": 0.0}),
    ],
)
def test_both_kinds_keep_the_same_state(reference, fused, settings) -> None:
    """So a run can resume with the other kernels, and with another momentum."""
    pair = [Setup(make, weight_decay=0.1, **settings) for make in (reference, fused)]
    for loss in (1.0, math.nan, 1.0, 1.0):
        for setup in pair:
            setup.fill(setup.gradients)
            setup.optimizer.step(torch.tensor(loss), 0.01, 1.0)
    want, got = (setup.bits() for setup in pair)
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "settings"), ONE_PASS)
def test_a_compiled_step_is_as_near_to_float64_as_pytorch_s(make, settings, dtype) -> None:
    exact, one_pass, pieces = Setup(make, **settings), Setup(make, dtype, **settings), Setup(make, dtype, **settings)
    exact.parameters.buffer.copy_(one_pass.parameters.buffer)
    pieces.optimizer.uses_library = False
    with compiled.compiled_functions(True):
        assert (sgd_step if make is FusedSGD else adamw_step).compiles(
            *one_pass.optimizer._buffers(one_pass.optimizer.part)
        )
        assert gradient_norm.compiles(torch.empty(()), one_pass.gradients.buffer)
    for step in range(20):
        one_pass.fill(one_pass.gradients, scale=10.0 ** (step % 3 - 1))
        norms = []
        for setup in (exact, one_pass, pieces):
            setup.gradients.buffer.copy_(one_pass.gradients.buffer)
            norms.append(float(setup.optimizer.step(FINITE, 0.03, 1.0)))
        assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    want, got, other = exact.bits(), one_pass.bits(), pieces.bits()
    for name, tensor in want.items():
        errors = [float((one[name].double() - tensor).norm() / tensor.double().norm()) for one in (got, other)]
        assert errors[0] <= 2 * errors[1] + 1e-7, name


@pytest.mark.parametrize(
    ("make", "uses_library"),
    [(AdamW, False), (FusedAdamW, False), pytest.param(FusedAdamW, True, marks=pytest.mark.slow)],
)
def test_what_is_counted(make, uses_library, one_thread) -> None:
    setup = Setup(make, torch.float32, uses_library)
    optimizer = setup.optimizer
    for loss in (1.0, math.nan, math.nan, 2.0, math.inf, 3.0, 4.0):
        optimizer.step(torch.tensor(loss), 0.1)
    assert int(optimizer.updates) == 4
    assert int(optimizer.nonfinite_steps) == 3
    assert int(optimizer.nonfinite_in_a_row) == 0
    assert int(optimizer.nonfinite_longest) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("make", "settings"), KINDS)
def test_a_state_that_is_loaded_goes_on_where_it_was_saved(make, settings, dtype) -> None:
    ours, other = Setup(make, dtype, **settings), Setup(make, dtype, **settings)
    for loss in (1.0, math.nan, 1.0):
        ours.fill(ours.gradients)
        ours.optimizer.step(torch.tensor(loss), 0.01)
    state = ours.optimizer.state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    other.parameters.buffer.copy_(ours.parameters.buffer)
    other.optimizer.load_state(state)
    for _ in range(3):
        ours.fill(ours.gradients)
        other.gradients.buffer.copy_(ours.gradients.buffer)
        ours.optimizer.step(FINITE, 0.01)
        other.optimizer.step(FINITE, 0.01)
    mine, wanted = ours.bits(), other.bits()
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[name], wanted[name]) for name in mine)
    assert all(torch.equal(state[name], kept[name]) for name in state), "a state is a copy, not a view"


def test_a_foreign_state_is_refused_and_nothing_changes() -> None:
    setup = Setup(AdamW)
    setup.fill(setup.gradients)
    setup.optimizer.step(FINITE, 0.01)
    before = setup.bits()
    state = {name: tensor + 1 for name, tensor in setup.optimizer.state().items()}
    wrong_shape = state | {"first_moment/first.bias": torch.zeros(8)}
    missing = {name: tensor for name, tensor in state.items() if name != "second_moment/norm.weight"}
    for broken, named in (
        (wrong_shape, "first.bias"),
        (missing, "second_moment/norm.weight is missing"),
        (state | {"third_moment/x": torch.zeros(1)}, "third_moment/x is unknown"),
    ):
        with pytest.raises(InputError, match=named):
            setup.optimizer.load_state(broken)
        after = setup.bits()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_moments_of_bfloat16_parameters_are_float32() -> None:
    setup = Setup(AdamW, torch.bfloat16)
    assert {tensor.dtype for name, tensor in setup.optimizer.state().items() if name != "counts"} == {torch.float32}
