"""Every backward pass against autograd and central differences, in float64 (`pytest -m gradients`).

`mutate.py` runs these tests on broken copies of the backward passes; a copy that passes shows a missing test.
"""

from __future__ import annotations

import cmath
import inspect
import math
from dataclasses import replace

import pytest
import torch

from manual_backprop import kernels, ops
from manual_backprop.common.batch import Batch
from manual_backprop.models.custom import CustomTransformer
from manual_backprop.models.implementations import IMPLEMENTATIONS
from manual_backprop.study.gradient_check import (
    ENOUGH_TO_ROUND,
    ODD,
    ROWS,
    Draw,
    cases_of,
    check_network,
    check_network_precision,
    check_op,
    check_op_precision,
    draw_batch,
    odd_cases,
    odd_encoders,
    odd_pairs,
)
from manual_backprop.study.gradient_check.measure import Finding, differing, error_of, errors_of
from manual_backprop.study.gradient_check.network_check import STEP, networks, step_of
from manual_backprop.study.gradient_check.op_case import Case
from manual_backprop.study.gradient_check.op_check import autograd, call, upstream_of

pytestmark = [
    pytest.mark.gradients,
    pytest.mark.usefixtures("one_thread", "as_written"),
    pytest.mark.filterwarnings("error:An output with one or more elements was resized"),  # memory of the wrong size
]

ARCHITECTURES = ("gpt2", "vaswani", "llama")
PAIRS = {"reference": ops, "fused": kernels}
BOTH = pytest.mark.parametrize("which", PAIRS)
NETWORKS = [
    pytest.param(config, batch, scale, id=f"{architecture}-{kind}{name}")
    for kind, cases in {"": odd_cases, "pair-": odd_pairs, "encoder-": odd_encoders}.items()
    for architecture in ARCHITECTURES
    for name, config, batch, scale in cases(architecture)
]


def assert_ok(findings: list[Finding]) -> None:
    assert findings
    over = [f"{f.subject} | {f.quantity}: {f.error:.3g}, bar {f.bar:g}" for f in findings if not f.ok]
    assert not over, "\n".join(over)


def fresh_draw() -> Draw:
    return Draw(torch.Generator().manual_seed(0))


@BOTH
@pytest.mark.parametrize("name", ROWS)
def test_op(name: str, which: str) -> None:
    row = ROWS[name]
    for case in cases_of(row, fresh_draw()):
        assert_ok(check_op(row, case, PAIRS[which]))


@pytest.mark.parametrize("base", [None, 30.0, 500000.0])
def test_rotary_positions_turn_by_powers_of_the_base(base: float | None) -> None:
    """All implementations share this table, so it is compared with the formula itself. The angles are float32."""
    config = replace(ODD, architecture="llama", rotary_base=base)
    K, T = config.d_head, config.max_seq_len
    want = [[cmath.exp(1j * t * (base or 10000) ** (-2 * i / K)) for i in range(K // 2)] for t in range(T)]
    for rotation in (ops.rotations(T, K, base or 10000), CustomTransformer(config).position_table):
        torch.testing.assert_close(torch.complex(*rotation), torch.tensor(want), rtol=0, atol=1e-6)


def test_every_op_has_a_row() -> None:
    pairs = {name.removesuffix("_forward") for name in ops.__all__ if name.endswith("_forward")}
    assert pairs == {name.removesuffix("_backward") for name in ops.__all__ if name.endswith("_backward")}
    assert pairs == set(ROWS), (
        "a pair of manual_backprop.ops without a row in study/gradient_check/op_table.py, or a row too many"
    )


def test_every_pair_is_exported() -> None:
    """Otherwise the test before this one would miss a pair."""
    seen = set()
    for module in vars(ops).values():
        if inspect.ismodule(module) and module.__name__.startswith(f"{ops.__name__}."):
            made_here = {
                n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__
            }
            pairs = {
                name for name in made_here if name.endswith(("_forward", "_backward")) and not name.startswith("_")
            }
            assert pairs <= set(ops.__all__), module.__name__
            seen |= pairs
    assert seen == {name for name in ops.__all__ if name.endswith(("_forward", "_backward"))}


@BOTH
@pytest.mark.parametrize(("config", "batch", "scale"), NETWORKS)
def test_network(config, batch: Batch, scale: str, which: str) -> None:
    assert_ok(check_network(replace(config, kernels=which), batch, scale))


@BOTH
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_op_in_low_precision(name: str, dtype: torch.dtype, which: str) -> None:
    assert_ok(check_op_precision(ROWS[name], dtype, pairs=PAIRS[which]))


@BOTH
@pytest.mark.parametrize("scale", ["proof", "initial"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_mixed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_network_in_low_precision(architecture: str, precision: str, scale: str, which: str) -> None:
    config = replace(ENOUGH_TO_ROUND, architecture=architecture, precision=precision, kernels=which)
    assert_ok(check_network_precision(config, scale))


@BOTH
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "bf16_mixed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_target_ignored(architecture: str, precision: str, which: str) -> None:
    """Loss 0, and every gradient exactly 0."""
    config = replace(ODD, architecture=architecture, precision=precision, kernels=which)
    batch = draw_batch(config, 2, 5)
    network = CustomTransformer(config)
    nothing_counts = Batch(batch.tokens, torch.full_like(batch.targets, ops.IGNORED))
    assert network.loss_and_gradients(nothing_counts, denominator=0, step=STEP) == 0
    assert not network.flat_gradients.buffer.any()


def test_an_ignored_row_may_hold_anything() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    targets = torch.tensor([2, ops.IGNORED, 5, ops.IGNORED])
    _, clean_cache = ops.cross_entropy_forward(logits, targets, label_smoothing=0.1)
    poisoned = logits.clone()
    poisoned[1], poisoned[3] = math.nan, math.inf
    loss, cache = ops.cross_entropy_forward(poisoned, targets, label_smoothing=0.1)
    dlogits = ops.cross_entropy_backward(1.0, cache)
    assert torch.isfinite(loss)
    assert torch.equal(dlogits, ops.cross_entropy_backward(1.0, clean_cache))
    assert not dlogits[[1, 3]].any()


@BOTH
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_backward_belongs_to_one_forward(architecture: str, which: str) -> None:
    """A second forward replaces the first one; a forward allows one backward."""
    config = replace(ODD, architecture=architecture, kernels=which)
    batch, other = draw_batch(config, 2, 5), draw_batch(config, 3, 4, seed=1)
    network, mirror = networks(config)
    network.forward(other.tokens)
    logits = network.forward(batch.tokens)
    mirror.forward(batch.tokens)
    dlogits = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    network.backward(dlogits)
    mirror.backward(dlogits)
    key_biases = [name for name in network.gradients if name.endswith("key.bias")]
    assert max(errors_of(network.gradients, mirror.gradients, key_biases).values()) < 1e-12
    with pytest.raises(ValueError, match="backward needs the forward"):
        network.backward(dlogits)


@BOTH
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_future_is_not_seen(architecture: str, which: str) -> None:
    """The loss of position t sends no gradient to the embeddings of later tokens, nor to another document's."""
    config = replace(ODD, architecture=architecture, n_blocks=2, kernels=which)
    tokens = torch.arange(8)[None]  # each token once: its row of the embedding is its position's
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    targets = torch.full_like(tokens, ops.IGNORED)
    targets[0, 5] = 9
    network, _ = networks(config)
    network.head, network.dhead = network.head.clone(), torch.zeros_like(network.dhead)  # the head's share aside
    network.loss_and_gradients(Batch(tokens, targets, segments), denominator=1, step=None)
    reached = network.gradients["token_embedding.weight"].any(1).nonzero()[:, 0].tolist()
    assert reached == [3, 4, 5]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_broken_is_seen(architecture: str) -> None:
    """Tests the tester: a gradient that is wrong by one part in 10^9, in the smallest tensor, exceeds its bar."""
    config = replace(ODD, architecture=architecture)
    batch = draw_batch(config, 2, 7)
    network, mirror = networks(config)
    _, gradients = step_of(network, batch)
    _, want = step_of(mirror, batch)
    for name in gradients:
        if not name.endswith("key.bias"):
            wrong = gradients | {name: gradients[name] * (1 + 1e-9)}
            assert errors_of(wrong, want)[name] > 1e-12, name
            assert errors_of({n: g for n, g in gradients.items() if n != name}, want)[name] == math.inf


def test_errors() -> None:
    one, zero = torch.ones(3), torch.zeros(3)
    assert error_of(one, one) == 0
    assert error_of(zero, zero) == 0
    assert error_of(one, zero) == math.inf
    assert error_of(torch.ones(4), one) == math.inf
    assert error_of(1.5 * one, one) == pytest.approx(0.5)
    assert error_of(one, zero, floor=10.0) == pytest.approx(math.sqrt(3) / 10)
    assert not Finding("op", "dx", math.nan, 1.0).ok


# The weight that a gradient goes through

WITH_FEEDBACK = {  # pair: its weights, and what their feedbacks are called
    "linear": {"weight": "feedback"},
    "feed_forward": {"hidden_weight": "hidden_feedback", "output_weight": "output_feedback"},
    "gated_feed_forward": {"gated_weight": "gated_feedback", "output_weight": "output_feedback"},
    "linear_cross_entropy": {"weight": "feedback"},
}


def test_every_pair_that_multiplies_by_a_weight_says_through_which_its_gradient_goes() -> None:
    for name in ROWS:
        parameters = inspect.signature(getattr(ops, f"{name}_backward")).parameters
        feedbacks = {parameter for parameter in parameters if parameter.endswith("feedback")}
        assert feedbacks == set(WITH_FEEDBACK.get(name, {}).values()), name


@BOTH
@pytest.mark.parametrize("name", WITH_FEEDBACK)
def test_a_gradient_goes_through_the_weight_that_is_given(
    name: str, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd gives the same gradient if each product has the value of its weight but the derivative of the other
    weight. The pair's own weights do not change it."""
    row, pairs, plain_linear = ROWS[name], PAIRS[which], torch.nn.functional.linear
    for case in cases_of(row, fresh_draw()):
        draw = Draw(torch.Generator().manual_seed(3))
        own = {feedback: case.parameters[weight] for weight, feedback in WITH_FEEDBACK[name].items()}
        others = {feedback: draw.normal(*weight.shape) for feedback, weight in own.items()}
        outputs, _ = call(row, case, pairs)
        upstream = upstream_of(row, case, outputs, torch.Generator().manual_seed(4))

        def gradients(feedbacks: dict[str, torch.Tensor], case: Case = case, upstream: dict = upstream) -> dict:
            _, cache = call(row, case, pairs)
            buffers = {f"d{parameter}": torch.zeros_like(p) for parameter, p in case.parameters.items()}
            dx = getattr(pairs, f"{name}_backward")(**upstream, cache=cache, **buffers, **feedbacks)
            return buffers | {"dx": dx}

        assert differing(gradients({}), gradients(own)) == 0
        of_products = [part for feedback, b in others.items() for part in b.chunk(2 if feedback[:5] == "gated" else 1)]

        def linear(
            x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, left: list = of_products
        ) -> torch.Tensor:
            return plain_linear(x.detach(), weight, bias) + plain_linear(x - x.detach(), left.pop(0))

        with monkeypatch.context() as replaced:
            replaced.setattr(torch.nn.functional, "linear", linear)
            _, want = autograd(row, case, upstream)
        assert max(errors_of(gradients(others), want).values()) < 1e-12, case.name


# When gradients are complete


@pytest.mark.parametrize(
    ("implementation", "changed"),
    [
        *(("custom", {"kernels": which, "recompute": how}) for which in PAIRS for how in ("none", "block")),
        *(("torch", {"recompute": how}) for how in ("none", "block")),
        *(("baseline", {"compile": "never", "recompute": how}) for how in ("none", "block")),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_block_says_when_its_gradients_are_complete(architecture: str, implementation: str, changed: dict) -> None:
    """From the last block to the first, then the rest; in every step, also when similar steps are replayed."""
    config = replace(ODD, architecture=architecture, n_blocks=3, **({"compile": "always"} | changed))
    network, batch = IMPLEMENTATIONS[implementation](config), draw_batch(config, 2, 5)
    seen: list[tuple[str | None, dict[str, torch.Tensor]]] = []

    def look(block: str | None) -> None:
        mine = [name for name in network.gradients if block is None or name.startswith(f"{block}.")]
        seen.append((block, {name: network.gradients[name].clone() for name in mine}))

    def in_steps() -> None:
        for step in range(4):
            network.loss_and_gradients(batch, denominator=9, step=step)

    in_steps()
    network.on_gradients_complete = look
    network.zero_gradients()
    in_steps()
    order = ["blocks.2", "blocks.1", "blocks.0", None]
    assert [block for block, _ in seen] == order * 4
    network.backward(torch.ones_like(network.forward(batch.tokens)))
    assert [block for block, _ in seen] == order * 5
    for _, gradients in seen[-4:]:
        assert len(gradients) > 8
        assert differing(gradients, network.gradients) == 0
