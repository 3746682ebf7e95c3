"""Each Triton kernel against its textbook pair, under Triton's interpreter: test_triton.py runs this file in a process
of its own, with TRITON_INTERPRET=1, which Triton reads when a kernel is defined.

The textbook runs in float64 on the same numbers. What a kernel writes may be off by the rounding of its format, no
more: inside it calculates in float32, or in float64 where that is the format.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from manual_backprop import ops, optim
from manual_backprop.config.schema import CustomTransformerConfig
from manual_backprop.kernels import sizes, table
from manual_backprop.kernels.cuda import attention, linear
from manual_backprop.kernels.cuda import triton as room
from manual_backprop.models.custom import CustomTransformer
from manual_backprop.optim.parameters import Layout
from manual_backprop.study.gradient_check import draw_batch
from manual_backprop.study.gradient_check.measure import error_of, errors_of
from manual_backprop.study.gradient_check.network_case import counted, wholly_zero
from manual_backprop.study.gradient_check.network_check import set_proof_scale

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")  # of a row that holds NaN

fp64, fp32, bf16, fp16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
FORMATS = [fp64, fp32, bf16, fp16]
MIXED = [*((dtype, dtype) for dtype in FORMATS), (fp32, bf16), (fp32, fp16)]  # the stream's, that of what is multiplied
TILES: dict[str, dict[str, int]] = {  # so small that the shapes below are several of them, and a program has several
    "normalization": {"GROUPS": 2},
    "activations": {"ROWS": 2, "COLUMNS": 16, "GROUPS": 2},
    "gate": {"ROWS": 2, "COLUMNS": 16},
    "loss": {"BLOCK": 16},
    "clipping": {"BLOCK": 16, "PROGRAMS": 4},
    "adamw": {"BLOCK": 32},
    "launching": {"SUMMED_ROWS": 1, "SUMMED_COLUMNS": 16},
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, tile in TILES.items():
        for constant, size in tile.items():
            monkeypatch.setattr(importlib.import_module(f"{room.__name__}.{name}"), constant, size)


def normal(*shape: int, dtype: torch.dtype = fp64, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, dtype=fp64)).to(dtype)


def assert_near(got: Tensor, want: Tensor, sums: int = 1) -> None:
    """`sums`: of so many numbers, each as coarse as float32 at best."""
    assert torch.isfinite(got).all()
    unit = torch.finfo(got.dtype).eps
    inside = torch.finfo(fp64 if got.dtype == fp64 else fp32).eps
    assert error_of(got, want) <= unit + 4 * sums * inside, (got.dtype, error_of(got, want))


@pytest.mark.parametrize(
    ("kind", "stream", "multiplied"),
    [*(("layer", *formats) for formats in MIXED), *(("rms", *formats) for formats in MIXED[1:5])],
)
@pytest.mark.usefixtures("small_tiles")
def test_residual_norm(kind: str, stream: torch.dtype, multiplied: torch.dtype) -> None:
    check_residual_norm(kind, stream, multiplied, 5, 37, branched=True)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("rows", "width"), [(3, 64), (1, 5)])
@pytest.mark.usefixtures("small_tiles")
def test_norm_without_a_branch(kind: str, rows: int, width: int) -> None:
    check_residual_norm(kind, fp32, bf16, rows, width, branched=False)


def check_residual_norm(
    kind: str, stream: torch.dtype, multiplied: torch.dtype, rows: int, width: int, branched: bool
) -> None:
    x, branch = normal(rows, width, dtype=stream), normal(rows, width, dtype=multiplied) if branched else None
    weight = (1 + normal(width, scale=0.3)).to(stream)
    bias = normal(width, dtype=stream) if kind == "layer" else None
    dtotal, dy = normal(rows, width, dtype=stream) if branched else None, normal(rows, width, dtype=multiplied)
    dweight, dbias = normal(width, dtype=stream), None if bias is None else normal(width, dtype=stream)
    parameters = [one.double() for one in (weight, bias) if one is not None]
    gradients = [one.double() for one in (dweight, dbias) if one is not None]

    total, y, mean, rstd = room.residual_norm(x, branch, weight, bias, 1e-3, multiplied)
    if branched:
        assert total.dtype == stream
        assert_near(total, x.double() + branch.double())  # type: ignore[union-attr]
        summed = total
    else:
        assert total.numel() == 0
        summed = x
    forward, backward = (getattr(ops, f"{kind}_norm_{way}") for way in ("forward", "backward"))
    if kind == "layer":
        assert_near(mean, summed.double().mean(1), sums=width)  # of the sum as it is kept
    want, cache = forward(summed.double(), *parameters, epsilon=1e-3)
    assert y.dtype == multiplied
    assert_near(y, want)

    dsum, rounded = room.residual_norm_backward(dtotal, dy, summed, weight, mean, rstd, dweight, dbias, multiplied)
    wanted = backward(dy.double(), cache, *gradients)
    if dtotal is not None:
        wanted = wanted + dtotal.double()
    assert dsum.dtype == stream
    assert_near(dsum, wanted, sums=rows)
    assert rounded.dtype == multiplied
    if stream == multiplied:
        assert rounded.numel() == 0
    else:
        assert_near(rounded, dsum)
    for got, gradient in zip([one for one in (dweight, dbias) if one is not None], gradients, strict=True):
        assert_near(got, gradient, sums=rows)


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [*(("gelu_tanh", dtype) for dtype in (fp32, bf16, fp16)), ("gelu", fp64), ("relu", fp32)],
)
@pytest.mark.usefixtures("small_tiles")
def test_bias_activation(activation: str, dtype: torch.dtype) -> None:
    x, dy, bias = normal(9, 37, dtype=dtype, scale=2), normal(9, 37, dtype=dtype), normal(37, dtype=fp32)
    x[0] = -bias  # where a ReLU has its corner
    dbias = normal(37, dtype=fp64 if dtype == fp64 else fp32)
    want_dbias = dbias.double()
    summed = x.double() + bias.double()
    if activation == "relu":
        want, cache = ops.relu_forward(summed)
        want_dx = ops.relu_backward(dy.double(), cache)
        want_dbias = want_dbias + want_dx.sum(0)
    else:
        want, cache = ops.bias_gelu_forward(x.double(), bias.double(), tanh=activation == "gelu_tanh")
        want_dx = ops.bias_gelu_backward(dy.double(), cache, want_dbias)
    y = room.bias_activation(x, bias, activation)
    again, dx = room.bias_activation_backward(dy, x, bias, activation, dbias)
    assert y.dtype == dx.dtype == dtype
    assert torch.equal(y, again)
    assert_near(y, want)
    assert_near(dx, want_dx)
    assert_near(dbias, want_dbias, sums=9)


def test_what_is_not_finite_stays_so() -> None:
    """A loss would be finite that should not be, and the step would count."""
    x = torch.tensor([[torch.nan, torch.inf, 1.0]])
    for activation in ("gelu_tanh", "gelu", "relu"):
        y = room.bias_activation(x, torch.zeros(3), activation)
        assert y.isnan().tolist() == [[True, False, False]], activation


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.usefixtures("small_tiles")
def test_swiglu(dtype: torch.dtype) -> None:
    x, dy = normal(5, 74, dtype=dtype, scale=2), normal(5, 37, dtype=dtype)
    want, cache = ops.swiglu_forward(x.double())
    y = room.swiglu(x)
    again, dx = room.swiglu_backward(dy, x)
    assert torch.equal(y, again)
    assert_near(y, want)
    assert_near(dx, ops.swiglu_backward(dy.double(), cache))


@pytest.mark.parametrize(
    ("width", "smoothing", "dtype"),
    [*((37, smoothing, dtype) for smoothing in (0.0, 0.1) for dtype in FORMATS), (1, 0.0, fp32), (16, 0.0, bf16)],
)
@pytest.mark.usefixtures("small_tiles")
def test_cross_entropy(width: int, smoothing: float, dtype: torch.dtype) -> None:
    """Rows lie apart, as those of padded logits; one that does not count holds anything; no logit is too large."""
    padded = torch.full((7, width + 3), 5.0, dtype=dtype)
    padded[:, :width] = normal(7, width, dtype=dtype, scale=3)
    logits, targets = padded[:, :width], torch.randint(width, (7,))
    logits[1] += 1024
    targets[0], targets[2] = 0, ops.IGNORED
    clean = logits.double().clone()
    logits[2] = torch.nan
    if width == 37 and not smoothing:
        logits[3, :33] = clean[3, :33] = -torch.inf  # more than two blocks
        targets[3] = 36
    scale = torch.tensor(0.375, dtype=fp64 if dtype == fp64 else fp32)
    _, cache = ops.cross_entropy_forward(clean, targets, 1, smoothing)
    want = [ops.cross_entropy_forward(clean[row], targets[row], 1, smoothing)[0] for row in range(7)]
    losses = room.cross_entropy_(logits, targets, scale, smoothing)
    assert losses[2] == 0
    assert_near(losses, torch.stack(want), sums=16)
    if width > 1:
        assert_near(logits, 0.375 * ops.cross_entropy_backward(1.0, cache), sums=16)
    assert (logits[2] == 0).all()
    assert (padded[:, width:] == 5).all()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.usefixtures("small_tiles")
def test_gradient_norm(dtype: torch.dtype) -> None:
    gradient = normal(100, dtype=dtype)
    assert_near(room.gradient_norm(gradient), gradient.double().norm())
    gradient[57] = torch.nan
    assert room.gradient_norm(gradient).isnan()


@pytest.mark.parametrize(("dtype", "narrow"), [(fp64, None), (fp32, None), (fp32, bf16), (fp32, fp16), (bf16, None)])
@pytest.mark.usefixtures("small_tiles")
def test_adamw(dtype: torch.dtype, narrow: torch.dtype | None) -> None:
    """Four steps of `optim.AdamW`, the third of which is not finite and changes nothing."""
    layout = Layout({"weight": (5, 7), "bias": (9,)})
    flats = [layout.allocate(kind, "cpu") for kind in (dtype, dtype, fp64, fp64)]
    parameters, gradients, want, want_gradients = flats
    parameters.buffer.copy_(normal(layout.size))
    want.buffer.copy_(parameters.buffer)
    epsilon = 1e-3  # so large that it counts
    textbook = optim.optimizers.AdamW(layout, want, want_gradients, 0.1, (0.9, 0.99), epsilon)
    wide = fp64 if dtype == fp64 else fp32
    first, second = torch.zeros(2, layout.size, dtype=wide)
    beside = None if narrow is None else torch.zeros(layout.size, dtype=narrow)
    for step, updates in enumerate([1, 2, 2, 3]):
        gradients.buffer.copy_(normal(layout.size))
        if step == 2:
            gradients.buffer[3] = torch.nan
        want_gradients.buffer.copy_(gradients.buffer)
        norm = textbook.step(torch.zeros(()), 0.01 * (step + 1), 1.0)
        clip = min(1.0, 1.0 / (float(norm) + 1e-6))
        counts = [float(step != 2), clip, 0.01 * (step + 1), 1 - 0.9**updates, (1 - 0.99**updates) ** 0.5]
        before = [one.clone() for one in (parameters.buffer, first, second)]
        numbers = torch.tensor(counts, dtype=wide)
        moments = first, second
        settings = layout.decayed_size, 0.9, 0.99, epsilon, 0.1
        room.adamw_(parameters.buffer, gradients.buffer, *moments, beside, numbers, *settings)
        if step == 2:
            assert all(torch.equal(*pair) for pair in zip(before, (parameters.buffer, *moments), strict=True))
        if dtype == bf16:
            want.buffer.copy_(parameters.buffer)  # rounded in each step: the next one starts from there
        assert_near(parameters.buffer, want.buffer, sums=2)
        for moment, name in zip(moments, textbook.moment_names, strict=True):
            assert_near(moment, textbook.moments[name].buffer, sums=2)
        if beside is not None:
            assert_near(beside, parameters.buffer)  # the interpreter cuts the digits of bfloat16 off, a GPU rounds


# A whole step


class FusedAttention:
    """In place of aten's fused attention of a kind, which a CPU does not have: the textbook's pair. What forward gives
    beside the context, backward has to get back under the names of PyTorch's schemas."""

    SAME: ClassVar = {
        "log_sumexp": "logsumexp",
        "rng_state": "philox_seed",
        "unused": "philox_offset",
        "grad_out_": "grad_out",
    }

    def __init__(self, kind: str):
        pair = (f"_scaled_dot_product_{kind}_attention{way}" for way in ("", "_backward"))
        self.schemas = [getattr(torch.ops.aten, name).default._schema for name in pair]

    def named(self, schema: Any, values: Any, settings: dict[str, Any]) -> dict[str, Any]:
        names = [self.SAME.get(argument.name, argument.name) for argument in schema.arguments]
        usual = {name: one.default_value for name, one in zip(names, schema.arguments, strict=True)}
        return usual | dict(zip(names, values, strict=False)) | settings

    def forward(self, *values: Any, **settings: Any) -> Any:
        given = self.named(self.schemas[0], values, settings)
        assert (given["dropout_p"], given.get("compute_log_sumexp", True)) == (0, True)
        query, key, value = (given[name].transpose(1, 2) for name in ("query", "key", "value"))
        shared = query.shape[2] // key.shape[2]  # by so many queries in a row
        inputs = query * self.factor(given), *(x.repeat_interleave(shared, 2) for x in (key, value))
        context, cache = ops.attention_forward(*inputs, ops.Visible(given["is_causal"]))
        made = [self.SAME.get(one.name, one.name) for one in self.schemas[0].returns]
        kept = {name: SimpleNamespace() for name in made} | {"output": context.transpose(1, 2)}
        kept["logsumexp"].call = given, kept, cache, shared
        return tuple(kept.values())

    def backward(self, *values: Any, **settings: Any) -> Any:
        given = self.named(self.schemas[1], values, settings)
        before, kept, cache, shared = given["logsumexp"].call
        for name in given.keys() & kept.keys():
            assert given[name] is kept[name], name
        for name in ("is_causal", "dropout_p", "scale"):
            assert given[name] == before[name], name
        assert torch.equal(given["out"], kept["output"])
        assert given.get("attn_bias") is None
        dquery, dkey, dvalue = ops.attention_backward(given["grad_out"].transpose(1, 2), cache)
        dkey, dvalue = (x.unflatten(2, (-1, shared)).sum(3) for x in (dkey, dvalue))
        found = [x.transpose(1, 2) for x in (dquery * self.factor(given), dkey, dvalue)]
        return found if len(self.schemas[1].returns) == 3 else [*found, None]

    @staticmethod
    def factor(given: dict[str, Any]) -> float:
        """By which the scores are another multiple than the textbook's."""
        return given["scale"] * given["query"].shape[-1] ** 0.5


class CudaOnly:
    """`torch.ops.aten` where what a CPU does not have is made of the textbook's pair of that name."""

    def __init__(self) -> None:
        self.attention = {kind: FusedAttention(kind) for kind in ("cudnn", "flash", "efficient")}
        self.used: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        for kind, pair in self.attention.items():
            if name.startswith(f"_scaled_dot_product_{kind}_attention"):
                self.used.add(kind)
                return pair.backward if name.endswith("_backward") else pair.forward
        if name == "addmm":
            return self
        return getattr(torch.ops.aten, name)

    def dtype_out(self, total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor) -> None:
        """`linear_backward`: dweight += dy^T x, added up in the wide format."""
        assert out is total
        assert left.dtype == right.dtype
        out += left.to(dtype) @ right.to(dtype)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> CudaOnly:
    """Networks on the CPU have the kernels of a GPU, all of Triton's among them; a loss is made in several chunks."""
    rows = [row._replace(devices=None) for row in table.ROWS["fused"]]
    monkeypatch.setitem(table.ROWS, "fused", tuple(rows))
    monkeypatch.setitem(sizes.SIZES, "cpu", replace(sizes.SIZES["cpu"], fewest_rows=4, logits=1))
    of_a_gpu = CudaOnly()
    for module in (attention, linear):
        monkeypatch.setattr(module, "aten", of_a_gpu)
    return of_a_gpu


@pytest.mark.parametrize(
    ("architecture", "precision", "kind", "bar"),
    [
        ("llama", "fp32", "efficient", 1e-5),
        ("vaswani", "fp32", "efficient", 1e-5),
        ("gpt2", "bf16_mixed", "cudnn", 0.1),
        ("llama", "fp16_mixed", "flash", 0.02),  # whose heads share keys
    ],
)
def test_a_step_with_all_of_them(
    architecture: str, precision: str, kind: str, bar: float, monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: CudaOnly
) -> None:
    """Loss, gradients and updated parameters, beside those of the textbook in float64."""
    monkeypatch.setattr(attention, "_has_fast_cudnn", lambda device: kind == "cudnn")
    called: set[str] = set()
    for name in room.FILES:
        own = getattr(room, name)
        told = lambda *inputs, name=name, own=own: called.add(name) or own(*inputs)  # noqa: E731
        monkeypatch.setattr(room, name, told, raising=False)
    config = CustomTransformerConfig(
        vocab_size=17, d_model=24, n_blocks=1, n_heads=3, d_ffn=22, max_seq_len=7, architecture=architecture,
        precision=precision, kernels="fused", n_kv_heads=1 if kind == "flash" else None,
    )  # fmt: skip
    exact = replace(config, precision="fp64", kernels="reference")
    networks = [CustomTransformer(one) for one in (config, exact)]
    networks[0].uses_library = True
    if networks[0].loss_scale is not None:
        networks[0].loss_scale.factor.fill_(64)  # at which nothing of so small a batch overflows
    set_proof_scale(networks[0])
    networks[1].load_parameters(networks[0].parameters)
    optimizers = [network.adamw(0.1, (0.9, 0.99), 1e-8) for network in networks]
    losses = []
    for network, optimizer in zip(networks, optimizers, strict=True):
        batch = draw_batch(network.config, 2, 7)
        network.zero_gradients()
        losses.append(network.loss_and_gradients(batch, denominator=counted(batch), step=1))
        optimizer.step(losses[-1], 1e-3, 1.0)
    assert abs(losses[0] - losses[1]) <= bar * losses[1]
    for what in ("gradients", "parameters"):
        got, want = (getattr(network, what) for network in networks)
        errors = errors_of(got, want, wholly_zero(config, batch))
        assert all(map(math.isfinite, errors.values()))
        assert max(errors.values()) <= bar, (what, max(errors, key=errors.__getitem__), max(errors.values()))
    activation = "swiglu" if architecture == "llama" else "bias_activation"
    both = {name for pair in (activation, "residual_norm") for name in (pair, f"{pair}_backward")}
    assert called >= {"adamw_", "cross_entropy_"} | both
    assert as_on_a_gpu.used == {kind}


# Of all of them


def calls() -> dict[str, Any]:
    """A call of each, by name."""
    x, width = torch.ones(3, 8), torch.ones(8)
    flat, statistics = torch.ones(32), torch.ones(3)
    return {
        "adamw_": lambda: room.adamw_(flat, flat + 1, flat + 2, flat + 3, None, torch.ones(5), 9, 0.9, 0.9, 1e-8, 0.1),
        "bias_activation": lambda: room.bias_activation(x, width, "gelu"),
        "bias_activation_backward": lambda: room.bias_activation_backward(x, x, width, "relu", width + 1),
        "cross_entropy_": lambda: room.cross_entropy_(x + 1, torch.zeros(3, dtype=torch.int64), torch.ones(()), 0.0),
        "gradient_norm": lambda: room.gradient_norm(flat),
        "residual_norm": lambda: room.residual_norm(x, None, width, None, 1e-5, bf16),
        "residual_norm_backward": lambda: room.residual_norm_backward(
            None, x, x, width, statistics, statistics, width + 1, width + 2, bf16
        ),
        "swiglu": lambda: room.swiglu(x),
        "swiglu_backward": lambda: room.swiglu_backward(torch.ones(3, 4), x),
    }


def test_launches_are_as_many_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    modules = [importlib.import_module(f"{room.__name__}.{name}") for name in {*room.FILES.values(), "launching"}]
    for module in modules:
        monkeypatch.setattr(module, "launch", lambda kernel, *arguments, **constants: launched.append(kernel))
    assert calls().keys() == room.LAUNCHES.keys() == room.FILES.keys()
    for name, call in calls().items():
        launched.clear()
        call()
        assert len(launched) == room.LAUNCHES[name], name


def test_of_fake_tensors_the_shapes_are_those_of_real_ones() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def shapes(result: Any) -> list[Any]:
        results = result if isinstance(result, tuple) else (result,)
        return [(one.shape, one.dtype) for one in results if one is not None]

    real = {name: shapes(call()) for name, call in calls().items()}
    with FakeTensorMode():
        assert {name: shapes(call()) for name, call in calls().items()} == real
