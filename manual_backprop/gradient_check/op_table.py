"""One row for each op: its pair, the same thing in plain torch for autograd, and the cases that it is tried on.

An op without a row fails a test. The mirrors share no line with `ops` but the dropout mask, whose randomness is no part
of the calculus. `op_check.py` says what is measured on a case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import IGNORED, Dropout, keep_mask


@dataclass(frozen=True)
class Draw:
    """Random tensors of the sizes of a case, all of them different (DESIGN.md, 4: what the letters mean)."""

    generator: torch.Generator
    dtype: torch.dtype = torch.float64
    B: int = 2
    T: int = 5
    D: int = 6
    H: int = 3
    F: int = 11
    V: int = 13

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(self.dtype)

    def weight(self, outputs: int, inputs: int) -> Tensor:
        return self.normal(outputs, inputs, scale=2 / math.sqrt(inputs))

    def gain(self, size: int) -> Tensor:
        return 1 + self.normal(size, scale=0.3)

    def bias(self, size: int) -> Tensor:
        return self.normal(size, scale=0.3)

    def x(self, scale: float = 1.0) -> Tensor:
        return self.normal(self.B, self.T, self.D, scale=scale)

    def ids(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def resized(self, B: int | None = None, T: int | None = None) -> Draw:
        return replace(self, B=B or self.B, T=T or self.T)


@dataclass(frozen=True)
class Case:
    """Arguments of one call. Gradients flow to inputs and parameters; settings are everything else."""

    name: str
    inputs: dict[str, Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()  # outputs that nothing reads: None is what backward gets for them
    upstream: dict[str, Any] = field(default_factory=dict)  # instead of random numbers

    def strided(self) -> Case:
        """The same values, in tensors whose memory has another order."""
        inputs = {name: _strided(tensor) for name, tensor in self.inputs.items()}
        parameters = {name: _strided(tensor) for name, tensor in self.parameters.items()}
        settings = {
            name: _strided(value) if isinstance(value, Tensor) else value for name, value in self.settings.items()
        }
        return Case("non-contiguous", inputs, parameters, settings, self.unused, self.upstream)


def _strided(tensor: Tensor) -> Tensor:
    if tensor.dim() < 2:
        return torch.stack([tensor, tensor], -1)[..., 0] if tensor.dim() else tensor
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


@dataclass(frozen=True)
class Row:
    name: str  # of the pair: name_forward, name_backward
    outputs: tuple[str, ...]  # what forward returns; backward takes a gradient for each, with a d before its name
    returns: tuple[str, ...]  # the inputs whose gradient backward returns (one tensor, for all of them)
    mirror: Callable[..., Any]
    cases: Callable[[Draw], Iterator[Case]]  # the first is the typical one


ROWS: dict[str, Row] = {}


def row(name: str, mirror: Callable[..., Any], outputs: str = "y", returns: str = "x") -> Callable[[Any], Any]:
    """Enters a function that yields cases as the row of the op `name`."""

    def enter(cases: Callable[[Draw], Iterator[Case]]) -> Callable[[Draw], Iterator[Case]]:
        assert name not in ROWS, f"{name} has a row already"
        ROWS[name] = Row(name, tuple(outputs.split()), tuple(returns.split()), mirror, cases)
        return cases

    return enter


def cases_of(row: Row, draw: Draw) -> list[Case]:
    """Its cases, and the typical one again in another order of memory."""
    cases = list(row.cases(draw))
    return [*cases, cases[0].strided()]


# Embedding


def token_embedding_mirror(tokens: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    return F.embedding(tokens, weight) * scale


@row("token_embedding", token_embedding_mirror, returns="")
def token_embedding_cases(draw: Draw) -> Iterator[Case]:
    weight = {"weight": draw.weight(draw.V, draw.D)}
    yield Case("scaled", {}, weight, {"tokens": draw.ids(draw.V, draw.B, draw.T), "scale": math.sqrt(draw.D)})
    yield Case(
        "unscaled, in the weight's format",
        {},
        weight,
        {"tokens": draw.ids(draw.V, draw.B, draw.T)},
    )
    yield Case(
        "one token again and again", {}, weight, {"tokens": torch.full((draw.B, draw.T), draw.V - 1), "scale": 0.5}
    )
    yield Case("B=1 T=1", {}, weight, {"tokens": draw.ids(draw.V, 1, 1), "scale": 3.0})


@row("learned_positions", lambda x, weight: x + weight[: x.shape[1]])
def learned_positions_cases(draw: Draw) -> Iterator[Case]:
    weight = {"weight": draw.normal(draw.T + 3, draw.D)}
    yield Case("T below max_seq_len", {"x": draw.x()}, weight)
    yield Case("T = max_seq_len", {"x": draw.resized(T=draw.T + 3).x()}, weight)
    yield Case("B=1 T=1", {"x": draw.resized(B=1, T=1).x()}, weight)


@row("sinusoidal_positions", lambda x, table: x + table[: x.shape[1]].to(x.dtype))
def sinusoidal_positions_cases(draw: Draw) -> Iterator[Case]:
    yield Case("T below max_seq_len", {"x": draw.x()}, settings={"table": draw.normal(draw.T + 3, draw.D).double()})


# Normalization


def residual_layer_norm_mirror(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x if branch is None else x + branch
    return total, layer_norm_mirror(total, weight, bias)


def layer_norm_mirror(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def norm_parameters(draw: Draw) -> dict[str, Tensor]:
    return {"weight": draw.gain(draw.D), "bias": draw.bias(draw.D)}


@row("layer_norm", layer_norm_mirror)
def layer_norm_cases(draw: Draw) -> Iterator[Case]:
    yield Case("typical", {"x": draw.x(2)}, norm_parameters(draw))
    yield Case("B=1 T=1", {"x": draw.resized(B=1, T=1).x()}, norm_parameters(draw))
    yield Case("one row", {"x": draw.normal(draw.D)}, norm_parameters(draw))
    yield Case("far from zero", {"x": draw.x() + 100}, norm_parameters(draw))
    yield Case("nearly constant: epsilon counts", {"x": draw.x(1e-3)}, norm_parameters(draw))
    constant = torch.cat([draw.x()[:1], torch.ones(1, draw.T, draw.D, dtype=draw.dtype)])
    yield Case("constant rows", {"x": constant}, norm_parameters(draw))


@row("residual_layer_norm", residual_layer_norm_mirror, outputs="total y", returns="x branch")
def residual_layer_norm_cases(draw: Draw) -> Iterator[Case]:
    yield Case("both outputs used", {"x": draw.x(), "branch": draw.x()}, norm_parameters(draw))
    yield Case("total not used", {"x": draw.x(), "branch": draw.x()}, norm_parameters(draw), unused=("total",))
    yield Case("no branch yet", {"x": draw.x()}, norm_parameters(draw), {"branch": None})
    yield Case("no branch, total not used", {"x": draw.x()}, norm_parameters(draw), {"branch": None}, ("total",))


@row("rms_norm", lambda x, weight: rms_norm_mirror(x, weight))
def rms_norm_cases(draw: Draw) -> Iterator[Case]:
    gain = {"weight": draw.gain(draw.D)}
    yield Case("typical", {"x": draw.x(2)}, gain)
    yield Case("B=1 T=1", {"x": draw.resized(B=1, T=1).x()}, gain)
    yield Case("one row", {"x": draw.normal(draw.D)}, gain)
    yield Case("far from zero", {"x": draw.x() + 100}, gain)
    yield Case("nearly zero: epsilon counts", {"x": draw.x(1e-3)}, gain)
    zeros = torch.cat([draw.x()[:1], torch.zeros(1, draw.T, draw.D, dtype=draw.dtype)])
    yield Case("rows of zeros", {"x": zeros}, gain)


def rms_norm_mirror(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def residual_rms_norm_mirror(x: Tensor, branch: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x if branch is None else x + branch
    return total, rms_norm_mirror(total, weight)


@row("residual_rms_norm", residual_rms_norm_mirror, outputs="total y", returns="x branch")
def residual_rms_norm_cases(draw: Draw) -> Iterator[Case]:
    gain = {"weight": draw.gain(draw.D)}
    yield Case("both outputs used", {"x": draw.x(), "branch": draw.x()}, gain)
    yield Case("total not used", {"x": draw.x(), "branch": draw.x()}, gain, unused=("total",))
    yield Case("no branch yet", {"x": draw.x()}, gain, {"branch": None})
    yield Case("no branch, total not used", {"x": draw.x()}, gain, {"branch": None}, ("total",))


# Linear


@row("linear", lambda x, weight, bias=None: F.linear(x, weight, bias))
def linear_cases(draw: Draw) -> Iterator[Case]:
    weight, bias = {"weight": draw.weight(draw.F, draw.D)}, {"bias": draw.bias(draw.F)}
    yield Case("with bias", {"x": draw.x()}, weight | bias)
    yield Case("no bias", {"x": draw.x()}, weight)
    yield Case("B=1 T=1", {"x": draw.resized(B=1, T=1).x()}, weight | bias)
    yield Case("rows alone", {"x": draw.normal(draw.T, draw.D)}, weight | bias)


# Softmax, dropout, attention


@row("softmax", lambda x: F.softmax(x, dim=-1))
def softmax_cases(draw: Draw) -> Iterator[Case]:
    x = draw.normal(draw.B, draw.H, draw.T, draw.T)
    yield Case("typical", {"x": x})
    yield Case("masked", {"x": x.masked_fill(~torch.ones(draw.T, draw.T).tril().bool(), -math.inf)})
    yield Case("thousands", {"x": x * 1000 + 5000})
    yield Case("one entry", {"x": draw.normal(draw.B, draw.T, 1)})


def dropout_mirror(x: Tensor, dropout: Dropout | None) -> Tensor:
    if dropout is None:
        return x
    return x * keep_mask(tuple(x.shape), dropout, x.device).to(x.dtype) * (1 / (1 - dropout.probability))


@row("dropout", dropout_mirror)
def dropout_cases(draw: Draw) -> Iterator[Case]:
    yield Case("first rows", {"x": draw.x()}, settings={"dropout": Dropout(0.3, 2**63 + 5)})
    yield Case("later rows", {"x": draw.x()}, settings={"dropout": Dropout(0.6, 12345678901234567, first_row=7)})
    yield Case("none", {"x": draw.x()}, settings={"dropout": None})
    yield Case("probability 0", {"x": draw.x()}, settings={"dropout": Dropout(0.0, 3)})


def attention_mirror(
    qkv: Tensor, n_heads: int, segments: Tensor | None = None, dropout: Dropout | None = None
) -> Tensor:
    """Head by head, with a mask that is added."""
    batch, length, width = qkv.shape
    query, key, value = (
        part.reshape(batch, length, n_heads, -1).transpose(1, 2) for part in qkv.split(width // 3, dim=-1)
    )
    place = torch.arange(length)
    hidden = place[None, :, None] < place[None, None, :]  # the future
    if segments is not None:
        hidden = hidden | (segments.unsqueeze(2) != segments.unsqueeze(1))
    penalty = torch.zeros(hidden.shape, dtype=qkv.dtype).masked_fill(hidden, -math.inf)[:, None]
    probabilities = F.softmax(torch.einsum("bhtk,bhsk->bhts", query, key) * query.shape[-1] ** -0.5 + penalty, dim=-1)
    context = torch.einsum("bhts,bhsk->bhtk", dropout_mirror(probabilities, dropout), value)
    return context.transpose(1, 2).reshape(batch, length, width // 3)


@row("attention", attention_mirror, outputs="context", returns="qkv")
def attention_cases(draw: Draw) -> Iterator[Case]:
    qkv, n_heads = draw.normal(draw.B, draw.T, 3 * draw.D), draw.H
    yield Case("one segment", {"qkv": qkv}, settings={"n_heads": n_heads})
    place = torch.arange(draw.T)
    documents = torch.stack([(place > 1).long(), (place > 2).long() * 4] + [place * 0] * (draw.B - 2))
    padded = torch.where(place < draw.T - 2, documents, -1)
    dropout = Dropout(0.4, 987654321987654321, first_row=3)
    yield Case("documents", {"qkv": qkv}, settings={"n_heads": n_heads, "segments": documents})
    yield Case(
        "documents, padding, dropout",
        {"qkv": qkv},
        settings={"n_heads": n_heads, "segments": padded, "dropout": dropout},
    )
    yield Case("dropout", {"qkv": qkv}, settings={"n_heads": n_heads, "dropout": dropout})
    yield Case("one head", {"qkv": qkv}, settings={"n_heads": 1})
    yield Case("heads of width 1", {"qkv": qkv}, settings={"n_heads": draw.D})
    yield Case("B=1", {"qkv": draw.normal(1, draw.T, 3 * draw.D)}, settings={"n_heads": n_heads})
    yield Case("T=1", {"qkv": draw.normal(draw.B, 1, 3 * draw.D)}, settings={"n_heads": n_heads})
    yield Case("sharp", {"qkv": qkv * 20}, settings={"n_heads": n_heads})


# Rotary positions and shared keys and values: K = 4, so that a head has two pairs


def rotary_mirror(qkv: Tensor, rotation: Tensor, n_turned: int) -> Tensor:
    """A pair is a complex number, and turning it a product."""
    d_head = 2 * rotation.shape[-1]
    wide = qkv.float() if qkv.dtype == torch.bfloat16 else qkv
    cosine, sine = rotation[:, : qkv.shape[1]].to(wide.dtype).unsqueeze(2)
    first, second = wide.reshape(*qkv.shape[:2], -1, 2, d_head // 2).unbind(3)  # (B, T, H + 2G, K / 2)
    turned = torch.view_as_real(torch.complex(first, second) * torch.complex(cosine, sine))
    heads = torch.cat((turned[..., 0], turned[..., 1]), -1)
    kept = wide.reshape(*qkv.shape[:2], -1, d_head)
    return torch.cat((heads[:, :, :n_turned], kept[:, :, n_turned:]), 2).reshape(qkv.shape).to(qkv.dtype)


def repeat_heads_mirror(qkv: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """Head by head."""
    heads = qkv.reshape(*qkv.shape[:2], n_heads + 2 * n_kv_heads, -1).unbind(2)
    order = [
        *range(n_heads),
        *(n_heads + head * n_kv_heads // n_heads for head in range(n_heads)),
        *(n_heads + n_kv_heads + head * n_kv_heads // n_heads for head in range(n_heads)),
    ]
    return torch.cat([heads[place] for place in order], -1)


def rotary_attention_mirror(
    qkv: Tensor,
    rotation: Tensor,
    n_heads: int,
    n_kv_heads: int,
    segments: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    turned = rotary_mirror(qkv, rotation, n_heads + n_kv_heads)
    return attention_mirror(repeat_heads_mirror(turned, n_heads, n_kv_heads), n_heads, segments, dropout)


def rotation_of(draw: Draw, pairs: int = 2) -> Tensor:
    """Cosines and sines of random angles, for more positions than there are."""
    angle = draw.normal(draw.T + 2, pairs).double()
    return torch.stack((angle.cos(), angle.sin()))


@row("rotary", rotary_mirror, returns="qkv")
def rotary_cases(draw: Draw) -> Iterator[Case]:
    rotation = rotation_of(draw)
    yield Case("queries and keys", {"qkv": draw.normal(draw.B, draw.T, 20)}, {}, {"rotation": rotation, "n_turned": 4})
    yield Case("all", {"qkv": draw.normal(draw.B, draw.T, 12)}, {}, {"rotation": rotation, "n_turned": 3})
    one = rotation_of(draw, pairs=1)
    yield Case("one pair", {"qkv": draw.normal(draw.B, draw.T, 6)}, {}, {"rotation": one, "n_turned": 2})
    yield Case("B=1 T=1", {"qkv": draw.normal(1, 1, 12)}, {}, {"rotation": rotation, "n_turned": 2})


@row("repeat_heads", repeat_heads_mirror, returns="qkv")
def repeat_heads_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, B: int, T: int, n_heads: int, n_kv_heads: int) -> Case:
        width = 5 * (n_heads + 2 * n_kv_heads)
        settings = {"n_heads": n_heads, "n_kv_heads": n_kv_heads}
        return Case(name, {"qkv": draw.normal(B, T, width)}, settings=settings)

    yield case("6 heads share 2", draw.B, draw.T, 6, 2)
    yield case("all share 1", draw.B, draw.T, 3, 1)
    yield case("none is shared", draw.B, draw.T, 3, 3)
    yield case("B=1 T=1", 1, 1, 4, 2)


@row("rotary_attention", rotary_attention_mirror, outputs="context", returns="qkv")
def rotary_attention_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, B: int, T: int, n_heads: int, n_kv_heads: int, **settings: Any) -> Case:
        qkv = draw.normal(B, T, 4 * (n_heads + 2 * n_kv_heads))
        heads = {"n_heads": n_heads, "n_kv_heads": n_kv_heads}
        return Case(name, {"qkv": qkv}, settings={"rotation": rotation, **heads, **settings})

    rotation = rotation_of(draw)
    place = torch.arange(draw.T)
    padded = torch.where(place < draw.T - 1, torch.stack([(place > b).long() for b in range(draw.B)]), -1)
    dropout = Dropout(0.4, 987654321987654321, first_row=3)
    yield case("6 heads share 2", draw.B, draw.T, 6, 2)
    yield case("documents, padding, dropout", draw.B, draw.T, 4, 2, segments=padded, dropout=dropout)
    yield case("all share 1", draw.B, draw.T, 3, 1)
    yield case("none is shared", draw.B, draw.T, 3, 3)
    yield case("T=1", draw.B, 1, 4, 2)


# Activations and the feed-forward network


def kinks(draw: Draw) -> Tensor:
    """Zeros, where a slope jumps, and values so large that an exponential over- or underflows."""
    return torch.tensor([0.0, -0.0, 1e-8, -1e-8, 5, -5, 40, -40, 1e4, -1e4], dtype=draw.dtype)


def activation_cases(draw: Draw) -> Iterator[Case]:
    yield Case("typical", {"x": draw.x(2)})
    yield Case("extremes", {"x": kinks(draw)})


row("relu", lambda x: F.relu(x))(activation_cases)
row("gelu", lambda x: F.gelu(x))(activation_cases)
row("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))(activation_cases)


def bias_gelu_mirror(x: Tensor, bias: Tensor, tanh: bool = True) -> Tensor:
    return F.gelu(x + bias, approximate="tanh" if tanh else "none")


@row("bias_gelu", bias_gelu_mirror)
def bias_gelu_cases(draw: Draw) -> Iterator[Case]:
    yield Case("tanh", {"x": draw.x(2)}, {"bias": draw.bias(draw.D)})
    yield Case("exact", {"x": draw.x(2)}, {"bias": draw.bias(draw.D)}, {"tanh": False})
    yield Case("B=1 T=1", {"x": draw.resized(B=1, T=1).x(2)}, {"bias": draw.bias(draw.D)})
    yield Case("extremes", {"x": kinks(draw)}, {"bias": draw.bias(10)})


def feed_forward_mirror(
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    activation: str = "gelu_tanh",
) -> Tensor:
    hidden = F.linear(x, hidden_weight, hidden_bias)
    if activation == "relu":
        return F.linear(F.relu(hidden), output_weight, output_bias)
    return F.linear(
        F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none"), output_weight, output_bias
    )


@row("feed_forward", feed_forward_mirror)
def feed_forward_cases(draw: Draw) -> Iterator[Case]:
    parameters = {
        "hidden_weight": draw.weight(draw.F, draw.D),
        "hidden_bias": draw.bias(draw.F),
        "output_weight": draw.weight(draw.D, draw.F),
        "output_bias": draw.bias(draw.D),
    }
    yield Case("tanh", {"x": draw.x()}, parameters)
    for activation in ("gelu_tanh", "gelu", "relu"):
        yield Case(activation, {"x": draw.x()}, parameters, {"activation": activation})
    yield Case("B=1 T=1", {"x": draw.resized(B=1, T=1).x()}, parameters)


@row("swiglu", lambda x: F.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1])
def swiglu_cases(draw: Draw) -> Iterator[Case]:
    yield Case("typical", {"x": draw.normal(draw.B, draw.T, 2 * draw.F, scale=2)})
    yield Case("extremes", {"x": torch.cat((kinks(draw), draw.normal(10)))})
    yield Case("B=1 T=1", {"x": draw.normal(1, 1, 2 * draw.F)})


def gated_feed_forward_mirror(x: Tensor, gated_weight: Tensor, output_weight: Tensor) -> Tensor:
    gate_weight, hidden_weight = gated_weight.chunk(2)
    return F.linear(F.silu(F.linear(x, gate_weight)) * F.linear(x, hidden_weight), output_weight)


@row("gated_feed_forward", gated_feed_forward_mirror)
def gated_feed_forward_cases(draw: Draw) -> Iterator[Case]:
    parameters = {"gated_weight": draw.weight(2 * draw.F, draw.D), "output_weight": draw.weight(draw.D, draw.F)}
    yield Case("typical", {"x": draw.x()}, parameters)
    yield Case("B=1 T=1", {"x": draw.resized(B=1, T=1).x()}, parameters)
    yield Case("rows alone", {"x": draw.normal(draw.T, draw.D)}, parameters)


# Loss


def cross_entropy_mirror(
    logits: Tensor, targets: Tensor, denominator: int | Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    total = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        targets.reshape(-1),
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return total / max(int((targets != IGNORED).sum() if denominator is None else denominator), 1)


def linear_cross_entropy_mirror(x: Tensor, weight: Tensor, targets: Tensor, **settings: Any) -> Tensor:
    return cross_entropy_mirror(F.linear(x, weight), targets, **settings)


def loss_cases(draw: Draw) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], tuple[int, int]]]:
    """Name, settings, upstream gradient and (B, T) of each case of a loss."""
    shape = (draw.B, draw.T)
    targets = draw.ids(draw.V, *shape)
    some = targets.masked_fill(draw.ids(3, *shape) == 0, IGNORED)
    some[0, 0], some[-1, -1] = IGNORED, draw.V - 1
    yield "some ignored", {"targets": some}, {}, shape
    yield "all count", {"targets": targets}, {"dloss": 1.0}, shape
    yield "another denominator", {"targets": some, "denominator": 29}, {"dloss": 0.7}, shape
    yield "denominator on the device", {"targets": some, "denominator": torch.tensor(31)}, {}, shape
    yield "label smoothing", {"targets": some, "label_smoothing": 0.15}, {}, shape
    yield (
        "smoothing and denominator",
        {"targets": targets, "label_smoothing": 0.3, "denominator": 17},
        {"dloss": -2.5},
        shape,
    )
    yield "all ignored", {"targets": torch.full(shape, IGNORED)}, {}, shape
    yield "all ignored, denominator 0", {"targets": torch.full(shape, IGNORED), "denominator": 0}, {"dloss": 1.0}, shape
    yield "B=1 T=1", {"targets": draw.ids(draw.V, 1, 1)}, {}, (1, 1)


@row("cross_entropy", cross_entropy_mirror, outputs="loss", returns="logits")
def cross_entropy_cases(draw: Draw) -> Iterator[Case]:
    for name, settings, upstream, shape in loss_cases(draw):
        yield Case(name, {"logits": draw.normal(*shape, draw.V)}, settings=settings, upstream=upstream)
    targets = draw.ids(draw.V, draw.B, draw.T)
    yield Case("thousands", {"logits": draw.normal(draw.B, draw.T, draw.V, scale=2000)}, settings={"targets": targets})


@row("linear_cross_entropy", linear_cross_entropy_mirror, outputs="loss")
def linear_cross_entropy_cases(draw: Draw) -> Iterator[Case]:
    for name, settings, upstream, shape in loss_cases(draw):
        yield Case(
            name,
            {"x": draw.normal(*shape, draw.D)},
            {"weight": draw.weight(draw.V, draw.D)},
            settings,
            upstream=upstream,
        )
