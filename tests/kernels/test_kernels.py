"""Errors that only the fused kernels can have: in tiles, reused memory, changing shapes.

test_gradients.py tests their gradients, together with those of the reference.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from manual_backprop import kernels, ops, optim
from manual_backprop.common.batch import Batch
from manual_backprop.config.schema import ARCHITECTURES, CustomTransformerConfig
from manual_backprop.kernels import arena, cuda, table
from manual_backprop.kernels.cpu import activations, compiled, loss, normalization, optimizers, products
from manual_backprop.kernels.cuda import optimizers as cuda_optimizers
from manual_backprop.kernels.sizes import SIZES, sizes_of
from manual_backprop.models.custom import CustomTransformer
from manual_backprop.models.network import Network
from manual_backprop.models.recorder import Recorder
from manual_backprop.models.wrappers.language_model import LanguageModel
from manual_backprop.study.gradient_check import (
    ENOUGH_TO_ROUND,
    ODD,
    ROWS,
    Draw,
    cases_of,
    check_network,
    check_op,
    draw_batch,
    odd_cases,
)
from manual_backprop.study.gradient_check.measure import AUTOGRAD_BAR, LOW_PRECISION_BAR, Finding, differing, errors_of
from manual_backprop.study.gradient_check.network_case import counted
from manual_backprop.study.gradient_check.network_check import STEP, networks, set_proof_scale, step_of

pytestmark = [
    pytest.mark.usefixtures("one_thread", "as_written"),
    pytest.mark.filterwarnings("error:An output with one or more elements was resized"),  # a tile of the wrong size
]

PRECISIONS = ("fp64", "fp32", "bf16", "bf16_mixed")
PATHS = [("fp64", "none"), ("fp32", "block"), ("bf16", "none"), ("bf16_mixed", "block")]  # precision, recompute
NETWORKS = [
    pytest.param(replace(config, kernels="fused"), batch, scale, id=f"{architecture}-{name}")
    for architecture in ARCHITECTURES
    for name, config, batch, scale in odd_cases(architecture)
]


def fused(config: CustomTransformerConfig = ODD, scale: str = "proof") -> CustomTransformer:
    network = CustomTransformer(replace(config, kernels="fused"))
    if scale == "proof":
        set_proof_scale(network, config.seed)
    return network


def step(network: Network, batch: Batch) -> dict[str, Tensor]:
    """Loss and gradients of one step, by name."""
    loss, gradients = step_of(network, batch)
    return gradients | {"loss": loss}


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert differing(want, got) == 0


def assert_ok(findings: list[Finding]) -> None:
    assert findings
    over = [f"{f.subject} | {f.quantity}: {f.error:.3g}, bar {f.bar:g}" for f in findings if not f.ok]
    assert not over, "\n".join(over)


def test_names_and_signatures_are_those_of_the_reference() -> None:
    for module in (kernels, cuda):
        for name in ops.__all__:
            ours, theirs = getattr(module, name, None), getattr(ops, name)
            if inspect.isfunction(theirs) and ours is not None:
                assert parameters_of(ours) == parameters_of(theirs), name
    name = "linear_cross_entropy"
    assert parameters_of(getattr(cuda, name)) == parameters_of(getattr(kernels, name))


def parameters_of(pair: Any) -> list[inspect.Parameter]:
    """The parameters of a pair without the cache, which is private to it."""
    parameters = inspect.signature(pair, eval_str=True).parameters
    return [one.replace(annotation=Any) if name == "cache" else one for name, one in parameters.items()]


@pytest.fixture(autouse=True)
def nothing_is_too_small_to_be_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "cpu", replace(SIZES["cpu"], small=0, small_beside_weights=0))


@pytest.mark.parametrize("which", table.ROWS)
def test_the_table_serves_every_pair(which: str) -> None:
    own = {"cpu": (kernels, optimizers), "cuda": (cuda, cuda_optimizers)}
    for device, precision in (("cpu", "bf16"), ("cpu", "fp16_mixed"), ("cuda", "bf16"), ("cuda", "fp16_mixed")):
        serving = kernels.Table(replace(ODD, kernels=which, precision=precision), torch.device(device))
        textbook = which == "reference" or (device, precision) == ("cpu", "fp16_mixed")
        pairs, of_device = (ops, optim.optimizers) if textbook else own[device]
        for name in ops.__all__:
            assert getattr(serving, name) is getattr(pairs, name, getattr(ops, name))
        assert serving.serves("linear_cross_entropy") == (not textbook)
        assert (serving.AdamW, serving.SGD) == (of_device.AdamW, of_device.SGD)
        with pytest.raises(AttributeError, match=f"no row of kernels={which} serves bogus on {device}"):
            _ = serving.bogus


def test_the_first_row_of_the_table_that_fits_serves_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a kernel for one device, some precisions and some sizes, above the general kernel."""
    row = table.Row(loss.__name__, devices=("cpu",), precisions=("fp64", "bf16"), at_most={"d_head": 6, "n_blocks": 2})
    monkeypatch.setitem(table.ROWS, "reference", (row, *table.ROWS["reference"]))
    for device, module, changes in (
        ("cpu", kernels, {"precision": "bf16"}),
        ("cpu", ops, {"precision": "fp32"}),
        ("cuda", ops, {"precision": "bf16"}),
        ("cpu", ops, {"precision": "bf16", "n_blocks": 3}),
        ("cpu", ops, {"precision": "bf16", "n_heads": 2}),
    ):
        serving = kernels.Table(replace(ODD, **changes), torch.device(device))
        assert serving.linear_cross_entropy_forward is module.linear_cross_entropy_forward
        assert serving.linear_forward is ops.linear_forward
    batch = draw_batch(ODD, 2, 5)
    networks_ = [CustomTransformer(replace(ODD, precision=precision)) for precision in ("fp64", "fp32")]
    monkeypatch.setattr(
        loss, "linear_cross_entropy", lambda *args, **kwargs: (torch.ones(()), torch.zeros(2, 5, 18).double())
    )
    assert [float(network.loss_and_gradients(batch, denominator=9, step=1)) == 1 for network in networks_] == [
        True,
        False,
    ]


def test_a_device_has_its_own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "meta", replace(SIZES["cpu"], queries=7))
    assert [sizes_of(torch.ones(1, device=device)).queries for device in ("cpu", "meta")] == [128, 7]
    monkeypatch.delitem(SIZES, "meta")
    assert sizes_of(torch.ones(1, device="meta")) is SIZES["cpu"]


# Tiles of attention and chunks of the loss: at the sizes of these tests everything would be one tile


@pytest.fixture(params=["one query at a time", "probabilities kept", "sequences in twos", "chunks of 4 rows"])
def in_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes so small that 5 to 9 positions of 2 to 8 sequences are split into several pieces, whose lengths differ by
    one, and that every vocabulary counts as large."""
    block, tile, longest_kept, chunk = {
        "one query at a time": (1, 1, 0, 1),
        "probabilities kept": (4, 1, 100, 3),
        "sequences in twos": (3, 200, 6, 5),
        "chunks of 4 rows": (2, 1 << 20, 7, 4),
    }[request.param]
    piece = 1 if chunk == 1 else 100
    small = {"queries": block, "scores": tile, "longest_kept": longest_kept, "piece": piece, "fewest_rows": chunk}
    monkeypatch.setitem(SIZES, "cpu", replace(SIZES["cpu"], logits=1, large_vocabulary=1, **small))


@pytest.mark.gradients
@pytest.mark.parametrize("pairs", [ops, kernels], ids=["reference", "fused"])
@pytest.mark.parametrize("wide", [False, True], ids=["its own format", "a wider sum"])
def test_a_gradient_is_added_to_that_of_other_readers(pairs: Any, wide: bool) -> None:
    """x itself does not change: the other products read it later."""
    dtype = torch.bfloat16 if wide else torch.float64
    x, dy, weight = torch.randn(2, 5, 7).to(dtype), torch.randn(2, 5, 3).to(dtype), torch.randn(3, 7).to(dtype)
    arena = kernels.Arena()
    with arena.step():
        _, cache = pairs.linear_forward(x, weight)
        dx = torch.ones(2, 5, 7, dtype=torch.float32 if wide else dtype)
        before = x.clone()
        assert pairs.linear_backward(dy, cache, torch.zeros_like(weight), dx=dx) is dx
    torch.testing.assert_close(dx.to(dtype), 1 + dy @ weight)
    assert torch.equal(x, before)


@pytest.mark.gradients
@pytest.mark.parametrize(
    "name",
    [
        "attention",
        "self_attention",
        "cross_attention",
        "rotary_attention",
        "linear_cross_entropy",
        "feed_forward",
        "gated_feed_forward",
    ],
)
@pytest.mark.usefixtures("in_pieces")
def test_op_in_pieces(name: str) -> None:
    for case in cases_of(ROWS[name], Draw(torch.Generator().manual_seed(0), T=7, B=5)):
        assert_ok(check_op(ROWS[name], case, kernels))


@pytest.mark.gradients
@pytest.mark.parametrize(
    ("config", "batch", "scale"),
    [case for case in NETWORKS if str(case.id).endswith(("-plain", "-segments, dropout", "-8 rows"))],
)
@pytest.mark.usefixtures("in_pieces")
def test_network_in_pieces(config: CustomTransformerConfig, batch: Batch, scale: str) -> None:
    findings = check_network(config, batch, scale)
    assert_ok([finding for finding in findings if "by name" not in finding.quantity])

    # What is above the diagonal is never computed, so only what is below can be as the reference records it.
    recorded = []
    for name in ("fused", "reference"):
        network = CustomTransformer(replace(config, kernels=name))
        if scale == "proof":
            set_proof_scale(network, config.seed)
        network.recorder = recorder = Recorder()
        step(network, batch)
        recorded.append({n: t.tril() if "attention" in n and t.dim() == 4 else t for n, t in recorder.tensors.items()})
    assert max(errors_of(*recorded).values()) <= AUTOGRAD_BAR


# What runs compiled only, here as it is written, in float64


@pytest.fixture
def as_if_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.CompiledFunction, "compiles", lambda self, *args: True)


@pytest.mark.gradients
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("name", ["residual_layer_norm", "residual_rms_norm", "linear_cross_entropy"])
@pytest.mark.usefixtures("as_if_compiled")
def test_op_as_if_compiled(name: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with sizes at which rows are split into chunks, and the vocabulary is padded."""
    if size == "large":
        monkeypatch.setitem(SIZES, "cpu", replace(SIZES["cpu"], large_vocabulary=1, small=0))
    for case in cases_of(ROWS[name], Draw(torch.Generator().manual_seed(0))):
        assert_ok(check_op(ROWS[name], case, kernels))


@pytest.mark.gradients
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("way", ["pytorch", "as_if_compiled"])
def test_logits_become_their_loss_and_their_gradient(
    way: str, label_smoothing: float, request: pytest.FixtureRequest
) -> None:
    """A row that does not count may contain anything, large logits do not overflow, and -inf is allowed."""
    if way == "as_if_compiled":
        request.getfixturevalue(way)
    logits, target = torch.randn(7, 11, dtype=torch.float64), torch.randint(10, (7,))
    target[0], target[2] = 0, ops.IGNORED
    logits[1] += 1024
    if not label_smoothing:
        logits[3, 10] = -torch.inf
    want, cache = ops.cross_entropy_forward(logits.clone(), target, 6, label_smoothing)
    want_gradient = ops.cross_entropy_backward(0.25, cache)
    logits[2, 3] = torch.nan
    losses, scale = torch.empty(2, 7, dtype=torch.float64)
    loss._loss_and_gradient_(logits, losses, scale, target, 6, 0.25, label_smoothing)
    torch.testing.assert_close(losses.sum(), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits * scale[:, None], want_gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.gradients
@pytest.mark.parametrize(
    ("config", "batch", "scale"), [case for case in NETWORKS if str(case.id).endswith(("-plain", "-segments, dropout"))]
)
@pytest.mark.usefixtures("as_if_compiled")
def test_network_as_if_compiled(config: CustomTransformerConfig, batch: Batch, scale: str) -> None:
    assert_ok(check_network(config, batch, scale))


@pytest.mark.gradients
@pytest.mark.parametrize("narrow", [torch.float64, torch.float32])
def test_a_product_is_added_in_the_format_of_the_sum(narrow: torch.dtype) -> None:
    left, right = (torch.arange(6.0, dtype=narrow).view(*shape) for shape in ((2, 3), (3, 2)))
    total = torch.full((2, 2), 0.5, dtype=torch.float64)
    products.add_product(total, left, right)
    assert torch.equal(total, left.double() @ right.double() + 0.5)  # numbers that nothing rounds


@pytest.mark.gradients
@pytest.mark.parametrize("rows", [6, 8, 9, 11])
@pytest.mark.parametrize("narrow", [torch.float64, torch.float32])
def test_a_product_of_many_rows_is_added_in_two(
    rows: int, narrow: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "cpu", replace(SIZES["cpu"], even_rows=4, many_rows=6, product=3))
    left, right = torch.arange(2.0 * rows, dtype=narrow).view(2, rows).T, torch.arange(6.0, dtype=narrow).view(2, 3)
    total = torch.full((rows, 3), 0.5, dtype=torch.float64)
    products.add_product(total, left, right)
    assert torch.equal(total, left.double() @ right.double() + 0.5)  # numbers that nothing rounds


# Memory that is reused


def test_what_is_given_back_is_handed_out_again() -> None:
    """A tensor can be given back while later ones stay, only once, and not across a `reuse`."""
    memory, like = arena.Arena(), torch.empty(1)
    with memory.step():
        first, second = arena.kept((4,), like), arena.kept((4,), like)
        arena.give_back(torch.empty(4))  # nobody's
        third = arena.kept((4,), like)
        arena.give_back(second)
        arena.give_back(second)
        with memory.reuse():
            inside = arena.kept((2,), like)
            arena.give_back(arena.kept((4,), like))
        again, other = arena.kept((4,), like), arena.kept((4,), like)
    assert second.data_ptr() == inside.data_ptr() == again.data_ptr()
    assert len({x.data_ptr() for x in (first, second, third, other)}) == 4


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["bf16", "bf16_mixed"])
def test_a_branch_keeps_no_memory_after_it_is_added(precision: str, compiles: bool, norm: str) -> None:
    """A block's two branches, (N, D) each in bfloat16, are overwritten by their sum or their memory is used again."""
    memory, like = arena.Arena(), torch.empty(1, dtype=torch.bfloat16)
    x = torch.zeros(4, 8, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    weights = torch.ones(2 if norm == "layer" else 1, 8, dtype=x.dtype)
    forward = getattr(normalization, f"residual_{norm}_norm_forward")
    with compiled.compiled_functions(compiles), memory.step():
        branch = arena.kept((4, 8), like).zero_()
        (total, _), _ = forward(x, branch, *weights, dtype=torch.bfloat16)
        after = arena.kept((4, 8), like)
    assert branch.data_ptr() in (total.data_ptr(), after.data_ptr())


@pytest.fixture
def fresh_memory_is_poisoned() -> Iterator[None]:
    """`torch.empty` and similar functions return NaN."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


def three_steps(network: CustomTransformer, batch: Batch) -> list[dict[str, Tensor]]:
    """Three steps; the second has another batch, so that the third one finds foreign numbers in its memory."""
    flipped = replace(batch, tokens=batch.tokens.flip(0, 1), targets=batch.targets.flip(0, 1))
    return [step(network, one) for one in (batch, flipped, batch)]


@pytest.mark.parametrize(("precision", "recompute"), PATHS)
@pytest.mark.parametrize(("config", "batch", "scale"), NETWORKS)
@pytest.mark.usefixtures("fresh_memory_is_poisoned")
def test_nothing_is_read_before_it_is_written(
    config: CustomTransformerConfig, batch: Batch, scale: str, precision: str, recompute: str
) -> None:
    config = replace(config, precision=precision, recompute=recompute)
    clean, poisoned = fused(config, scale), fused(config, scale)
    torch.utils.deterministic.fill_uninitialized_memory = False
    want = three_steps(clean, batch)
    poisoned.arena.poisoned = torch.utils.deterministic.fill_uninitialized_memory = True
    for got, wanted in zip(three_steps(poisoned, batch), want, strict=True):
        assert all(torch.isfinite(tensor).all() for tensor in wanted.values())
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("as_if_compiled", "fresh_memory_is_poisoned")
def test_nothing_is_read_before_it_is_written_as_if_compiled(architecture: str, recompute: str) -> None:
    """The norm's output is in a ping-pong buffer, and a post-norm block also reads it as the residual stream."""
    config = replace(ODD, architecture=architecture, recompute=recompute)
    poisoned, batch = fused(config), draw_batch(config, 3, 9)
    poisoned.arena.poisoned = True
    for got in three_steps(poisoned, batch):
        assert all(torch.isfinite(tensor).all() for tensor in got.values())


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.usefixtures("in_pieces", "fresh_memory_is_poisoned")
def test_nothing_is_read_before_it_is_written_in_pieces(precision: str) -> None:
    for architecture in ARCHITECTURES:
        config = replace(ODD, architecture=architecture, precision=precision)
        poisoned = fused(config)
        poisoned.arena.poisoned = True
        for got in three_steps(poisoned, draw_batch(config, 5, 9, segments=True)):
            assert all(torch.isfinite(tensor).all() for tensor in got.values())


@pytest.mark.gradients
@pytest.mark.parametrize("kernels", ["reference", "fused"])
@pytest.mark.parametrize(("config", "batch", "scale"), NETWORKS)
def test_blocks_that_run_twice_give_the_same_bits(
    config: CustomTransformerConfig, batch: Batch, scale: str, kernels: str
) -> None:
    for precision in PRECISIONS:
        once, twice = (
            CustomTransformer(replace(config, kernels=kernels, precision=precision, recompute=recompute))
            for recompute in ("none", "block")
        )
        assert_same_bits(step(twice, batch), step(once, batch))


def test_attention_of_one_sequence_to_another_in_a_step() -> None:
    """Keys and values in a ping-pong buffer, like the output of a wide product, are still valid in backward; a
    contiguous input is overwritten by its gradient."""
    generator = torch.Generator().manual_seed(0)
    query, x, weight, dcontext = (
        torch.randn(shape, generator=generator) for shape in ((2, 5, 3, 4), (2, 8, 12), (24, 12), (2, 5, 3, 4))
    )

    def calculate(query: Tensor) -> tuple[Tensor, ...]:
        packed, _ = kernels.linear_forward(x, weight)
        key, value = packed.unflatten(2, (2, 3, 4)).unbind(2)
        context, cache = kernels.attention_forward(query, key, value, ops.Visible(causal=False))
        for _ in range(2):
            kernels.linear_forward(x + 1, weight)  # the ping-pong buffers are overwritten
        return (context.clone(), *kernels.attention_backward(dcontext, cache))

    want = calculate(query)
    with arena.Arena(poisoned=True).step():
        given = query.clone()
        got = calculate(given)
        assert got[1] is given
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_a_kernel_that_reads_before_it_writes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = activations.ACTIVATIONS["gelu_tanh"]

    def adds(y: Tensor, x: Tensor, bias: Tensor) -> None:
        stale = y * 0  # invisible, but where memory is poisoned
        forward(y, x, bias)
        y += stale

    monkeypatch.setitem(activations.ACTIVATIONS, "gelu_tanh", (adds, backward))
    network, batch = fused(), draw_batch(ODD, 2, 7)
    network.arena.poisoned = True
    assert step(network, batch)["loss"].isnan()


@pytest.mark.gradients
@pytest.mark.parametrize("vocab_size", [5, 100], ids=["few tokens", "more tokens than there are"])
def test_a_narrow_gradient_of_the_embedding_is_rounded_once(vocab_size: int) -> None:
    """Both when the table (V, D) is smaller, and when the sums of the tokens that occur are."""
    tokens = torch.tensor([[0, 3, 3, 4, 0, 0], [2, 4, 3, 0, 0, 4]]) * (vocab_size // 5)
    dy, before = torch.randn(2, 6, 8).bfloat16(), torch.randn(vocab_size, 8).bfloat16()
    dweight = before.clone()
    kernels.token_embedding_backward(dy, (tokens, 1.5), dweight)
    want = before.double().index_add(0, tokens.flatten(), dy.double().flatten(0, 1), alpha=1.5)
    torch.testing.assert_close(dweight.double(), want, rtol=2.0**-8, atol=1e-6)
    there = torch.isin(torch.arange(vocab_size), tokens)
    assert torch.equal(dweight[~there], before[~there])


def test_what_a_network_hands_out_is_a_tensor_and_nothing_else(tmp_path: Path) -> None:
    """Outside of a step nothing is recomputed, so logits keep neither a function nor hidden states alive."""
    network, batch = fused(replace(ODD, vocab_size=8192)), draw_batch(ODD, 2, 7)
    for logits in (network.predict(batch.tokens), network.forward(batch.tokens)):
        assert not vars(logits)
        torch.save(logits, tmp_path / "logits.pt")


@pytest.mark.skipif(not products.onednn_is_exact(), reason="products are those of PyTorch here")
def test_the_setting_of_products_is_the_process_s_and_is_put_back() -> None:
    """The first context changes the setting, and the last one, in any thread, restores it."""
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.get_float32_matmul_precision()
    first, second = products.fastest_products(), products.fastest_products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    second.__exit__(None, None, None)
    assert (torch.backends.mkldnn.matmul.fp32_precision, torch.get_float32_matmul_precision()) == before


def test_a_step_that_was_broken_off_leaves_nothing_behind() -> None:
    """After an exception in the middle of a step, here in the recorder, the next step is that of a new network."""
    network, batch = fused(), draw_batch(ODD, 2, 7)

    class Interrupting(Recorder):
        def __call__(self, name: str, tensor: Tensor) -> None:
            if name == "blocks.0.feed_forward.dactivated":
                raise KeyboardInterrupt

    silent = network.recorder
    network.recorder = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        step(network, batch)
    network.recorder = silent
    for _ in range(2):
        assert_same_bits(step(network, batch), step(fused(), batch))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recording_changes_no_bit(architecture: str, precision: str) -> None:
    config = replace(ODD, architecture=architecture, precision=precision, dropout=0.2)
    batch, recorded = draw_batch(config, 3, 7, segments=True), fused(config)
    recorded.recorder = Recorder()
    assert_same_bits(step(recorded, batch), step(fused(config), batch))
    assert len(recorded.recorder.tensors) > 20


# Other shapes from step to step


def shapes(config: CustomTransformerConfig) -> list[Batch]:
    """A full batch, the last one of an epoch, a short one, one row, one token."""
    sizes = ((4, 9), (3, 9), (4, 5), (1, 9), (1, 1))
    return [draw_batch(config, B, T, seed, segments=seed == 2) for seed, (B, T) in enumerate(sizes)]


@pytest.mark.parametrize(("precision", "recompute"), PATHS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_does_not_depend_on_what_was_before(architecture: str, precision: str, recompute: str) -> None:
    """After other shapes, an evaluation, a generation, or `forward` and `backward`, a step is that of a new network."""
    config = replace(ODD, architecture=architecture, precision=precision, recompute=recompute, dropout=0.2)
    network, batches = fused(config), shapes(config)
    for batch in (*batches, batches[0]):
        want = fused(config)
        assert_same_bits(step(network, batch), step(want, batch))
        other = batches[2]
        logits = network.forward(other.tokens, other.segments, step=STEP)
        copy = logits.clone()
        assert torch.equal(network.predict(batch.tokens), want.predict(batch.tokens))
        assert_same_bits(step(network, batch), step(want, batch))  # between forward and its backward
        assert torch.equal(logits, copy)
        assert torch.equal(logits, want.forward(other.tokens, other.segments, step=STEP))
        for one in (network, want):
            one.zero_gradients()
            one.backward(torch.ones_like(logits))
        assert_same_bits(network.gradients, want.gradients)
        texts = [LanguageModel(one).generate(batch.tokens[:, :3], max_length=4, seed=1) for one in (network, want)]
        assert torch.equal(*texts)


def test_what_is_small_beside_its_weight_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query, key and value with fewer rows than the width are kept: one product less in each block."""
    N, D = 5, ODD.d_model
    counts = []
    for share in (0, 1):
        monkeypatch.setitem(SIZES, "cpu", replace(SIZES["cpu"], small_beside_weights=share))
        network = fused()
        with FlopCounterMode(display=False) as counted:
            step(network, draw_batch(ODD, 1, N))
        counts.append(counted.get_total_flops())
    assert counts[0] - counts[1] == ODD.n_blocks * 2 * N * D * 3 * D
    assert arena.is_small(6, torch.ones(1), weights=6)
    assert not arena.is_small(7, torch.ones(1), weights=6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_alternating_shapes_take_no_more_memory(architecture: str) -> None:
    """A block has the size of its largest request, so all shapes together need less memory than the sum over shapes."""
    config = replace(ODD, architecture=architecture)
    network, batches = fused(config), shapes(config)
    alone = 0
    for batch in batches:
        one = fused(config)
        step(one, batch)
        alone += one.arena.allocated_bytes()
        step(network, batch)
    once = network.arena.allocated_bytes()
    assert 0 < once <= alone
    for number in range(20):
        step(network, batches[number * 3 % len(batches)])
    assert network.arena.allocated_bytes() == once


# The same every time, and as near to float64 as autograd


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_bits(precision: str, threads: int) -> None:
    """At a size where PyTorch divides sums and products among threads."""
    config = CustomTransformerConfig(
        vocab_size=700, d_model=96, n_blocks=1, n_heads=4, d_ffn=200, max_seq_len=96, precision=precision, dropout=0.1
    )
    torch.set_num_threads(threads)
    batch = draw_batch(config, 8, 90)
    assert_same_bits(step(fused(config), batch), step(fused(config), batch))


def losses_of(network: Network, batches: list[Batch], steps: int, pieces: int = 1) -> Tensor:
    """The losses of a training with AdamW, with the batch of each step in `pieces` pieces."""
    optimizer = network.adamw(weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)
    losses = []
    for number in range(steps):
        batch = batches[number % len(batches)]
        network.zero_gradients()
        total = torch.zeros((), dtype=torch.float64)
        rows = len(batch.tokens) // pieces
        for start in range(0, len(batch.tokens), rows):
            part = slice(start, start + rows)
            piece = Batch(batch.tokens[part], batch.targets[part], first_row=batch.first_row + start)
            total += network.loss_and_gradients(piece, denominator=counted(batch), step=number)
        optimizer.step(total, 1e-3, 1.0)
        losses.append(total)
    return torch.stack(losses)


def distances(config: CustomTransformerConfig, steps: int, pieces: int) -> tuple[float, float]:
    """The root mean square over the steps of the losses' errors against float64: by hand, and of the mirror."""
    by_hand, mirror = networks(config, "initial")
    exact = fused(replace(config, precision="fp64"), "initial")
    exact.flat_parameters.buffer.copy_(by_hand.flat_parameters.buffer)
    batches = [draw_batch(config, 8, 8, seed) for seed in range(3)]
    want = losses_of(exact, batches, steps)
    assert want[-1] < want[0] - 0.3, "it has to learn for the comparison to mean anything"
    ours, theirs = (
        float((losses_of(network, batches, steps, pieces) - want).square().mean().sqrt())
        for network in (by_hand, mirror)
    )
    return ours, theirs


TWO_HUNDRED_STEPS = {
    ("gpt2", "fp32", 1): pytest.mark.nightly,
    ("gpt2", "bf16", 1): pytest.mark.nightly,
    ("gpt2", "bf16", 2): pytest.mark.nightly,
    ("gpt2", "bf16_mixed", 2): pytest.mark.slow,
    ("vaswani", "bf16", 1): pytest.mark.nightly,
    ("llama", "fp32", 1): pytest.mark.nightly,
}


@pytest.mark.parametrize(
    ("architecture", "precision", "pieces"),
    [pytest.param(*case, marks=mark) for case, mark in TWO_HUNDRED_STEPS.items()],
)
def test_two_hundred_steps_stay_as_near_to_float64_as_the_mirror(
    architecture: str, precision: str, pieces: int
) -> None:
    """With whole batches or halves: the error of the losses is at most twice autograd's."""
    config = replace(
        ENOUGH_TO_ROUND, architecture=architecture, precision=precision, kernels="fused", n_blocks=1, dropout=0.1
    )
    ratios = [ours / theirs for ours, theirs in (distances(replace(config, seed=s), 200, pieces) for s in range(3))]
    assert median(ratios) <= LOW_PRECISION_BAR, ratios


@pytest.mark.gradients
@pytest.mark.parametrize("dloss", [3.0, torch.tensor(0.25, dtype=torch.float64)], ids=["number", "tensor"])
def test_a_loss_whose_gradient_is_scaled_scales_all_gradients(dloss: float | Tensor) -> None:
    """As in loss scaling: the loss itself does not change."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 6), (11, 6)))
    targets = torch.randint(11, (2, 5), generator=generator)
    dweight, want = torch.zeros_like(weight), torch.zeros_like(weight)
    total, dx = loss.linear_cross_entropy(x.clone(), weight, targets, 7, 0.1, dweight, dloss=dloss)
    textbook, cache = ops.linear_cross_entropy_forward(x, weight, targets, 7, 0.1)
    torch.testing.assert_close(dx, ops.linear_cross_entropy_backward(dloss, cache, want))
    torch.testing.assert_close(dweight, want)
    torch.testing.assert_close(total, textbook)
