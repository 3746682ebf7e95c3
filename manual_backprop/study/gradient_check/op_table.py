"""One row for each op: its pair, its mirror in plain torch (`op_mirrors.py`), and its test cases.

A test fails while an op has no row. `op_check.py` checks a case.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops import IGNORED, Dropout, Visible
from . import op_mirrors
from .op_case import Case, Draw


@dataclass(frozen=True)
class Row:
    name: str  # of the pair: name_forward, name_backward
    outputs: tuple[str, ...]  # of forward; backward takes a gradient for each, named with a d before
    returns: tuple[str, ...]  # the inputs whose gradients backward returns: one tensor for all, or one for each
    mirror: Callable[..., Any]
    cases: Callable[[Draw], Iterator[Case]]  # the first is the typical one

    def named(self, output: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What forward or its mirror returned, by name."""
        return dict(zip(self.outputs, output if isinstance(output, tuple) else (output,), strict=True))


ROWS: dict[str, Row] = {}


def row(name: str, outputs: str = "y", returns: str = "x") -> Callable[[Any], Any]:
    """Registers a function that yields cases as the row of the op `name`."""

    def enter(cases: Callable[[Draw], Iterator[Case]]) -> Callable[[Draw], Iterator[Case]]:
        assert name not in ROWS, f"{name} has a row already"
        ROWS[name] = Row(
            name, tuple(outputs.split()), tuple(returns.split()), getattr(op_mirrors, f"{name}_mirror"), cases
        )
        return cases

    return enter


def cases_of(row: Row, draw: Draw) -> list[Case]:
    """The cases of a row, and the typical one again in another memory layout."""
    cases = list(row.cases(draw))
    return [*cases, cases[0].strided()]


# Embedding


@row("token_embedding", returns="")
def token_embedding_cases(draw: Draw) -> Iterator[Case]:
    weight = {"weight": draw.weight(draw.V, draw.D)}
    yield Case("scaled", {}, weight, {"tokens": draw.ids(draw.V, draw.B, draw.T), "scale": math.sqrt(draw.D)})
    yield Case("unscaled, in the weight's format", {}, weight, {"tokens": draw.ids(draw.V, draw.B, draw.T)})
    yield Case(
        "one token again and again", {}, weight, {"tokens": torch.full((draw.B, draw.T), draw.V - 1), "scale": 0.5}
    )
    yield Case("B=1 T=1", {}, weight, {"tokens": draw.ids(draw.V, 1, 1), "scale": 3.0})


@row("learned_positions")
def learned_positions_cases(draw: Draw) -> Iterator[Case]:
    weight = {"weight": draw.normal(draw.T + 3, draw.D)}
    yield Case("T below max_seq_len", {"x": draw.x()}, weight)
    yield Case("T = max_seq_len", {"x": draw.normal(draw.B, draw.T + 3, draw.D)}, weight)
    yield Case("B=1 T=1", {"x": draw.normal(1, 1, draw.D)}, weight)


@row("sinusoidal_positions")
def sinusoidal_positions_cases(draw: Draw) -> Iterator[Case]:
    yield Case("T below max_seq_len", {"x": draw.x()}, settings={"table": draw.normal(draw.T + 3, draw.D).double()})


# Normalization


def gain(draw: Draw) -> dict[str, Tensor]:
    return {"weight": draw.gain(draw.D)}


def gain_and_bias(draw: Draw) -> dict[str, Tensor]:
    return {"weight": draw.gain(draw.D), "bias": draw.bias(draw.D)}


def norm_cases(draw: Draw, drawn: Callable[[Draw], dict[str, Tensor]], removed: float) -> Iterator[Case]:
    """`removed`: a row of nothing but this number is normalized to zeros."""
    parameters = drawn(draw)
    yield Case("typical", {"x": draw.x(2)}, parameters)
    yield Case("B=1 T=1", {"x": draw.normal(1, 1, draw.D)}, parameters)
    yield Case("one row", {"x": draw.normal(draw.D)}, parameters)
    yield Case("far from zero", {"x": draw.x() + 100}, parameters)
    yield Case("nearly zero: epsilon counts", {"x": draw.x(1e-3)}, parameters)
    empty = torch.full((1, draw.T, draw.D), removed, dtype=draw.dtype)
    yield Case("nothing left but epsilon", {"x": torch.cat([draw.x()[:1], empty])}, parameters)
    yield Case("another epsilon", {"x": draw.x()}, parameters, {"epsilon": 0.3})


def residual_norm_cases(draw: Draw, drawn: Callable[[Draw], dict[str, Tensor]]) -> Iterator[Case]:
    parameters = drawn(draw)
    yield Case("both outputs used", {"x": draw.x(), "branch": draw.x()}, parameters)
    yield Case("total not used", {"x": draw.x(), "branch": draw.x()}, parameters, unused=("total",))
    yield Case("no branch yet", {"x": draw.x()}, parameters, {"branch": None})
    yield Case("no branch, total not used", {"x": draw.x()}, parameters, {"branch": None}, ("total",))
    yield Case("another epsilon", {"x": draw.x(), "branch": draw.x()}, parameters, {"epsilon": 0.3})


row("layer_norm")(partial(norm_cases, drawn=gain_and_bias, removed=1.0))
row("residual_layer_norm", "total y", "x branch")(partial(residual_norm_cases, drawn=gain_and_bias))
row("rms_norm")(partial(norm_cases, drawn=gain, removed=0.0))
row("residual_rms_norm", "total y", "x branch")(partial(residual_norm_cases, drawn=gain))


# Linear


@row("linear")
def linear_cases(draw: Draw) -> Iterator[Case]:
    weight, bias = {"weight": draw.weight(draw.F, draw.D)}, {"bias": draw.bias(draw.F)}
    yield Case("with bias", {"x": draw.x()}, weight | bias)
    yield Case("no bias", {"x": draw.x()}, weight)
    yield Case("B=1 T=1", {"x": draw.normal(1, 1, draw.D)}, weight | bias)
    yield Case("rows alone", {"x": draw.normal(draw.T, draw.D)}, weight | bias)


# Softmax, dropout, attention


@row("softmax")
def softmax_cases(draw: Draw) -> Iterator[Case]:
    x = draw.normal(draw.B, draw.H, draw.T, draw.T)
    yield Case("typical", {"x": x})
    yield Case("masked", {"x": x.masked_fill(~torch.ones(draw.T, draw.T).tril().bool(), -math.inf)})
    yield Case("thousands", {"x": x * 1000 + 5000})
    yield Case("one entry", {"x": draw.normal(draw.B, draw.T, 1)})
    yield Case("no finite entry", {"x": torch.cat((x, torch.full_like(x[:, :, :1], -math.inf)), dim=2)})


@row("dropout")
def dropout_cases(draw: Draw) -> Iterator[Case]:
    sizes = (draw.T + 2,)
    later = Dropout(0.6, 12345678901234567, sizes, first=(7, 1))
    yield Case("first rows", {"x": draw.x()}, settings={"dropout": Dropout(0.3, 2**63 + 5, sizes)})
    yield Case("later rows and positions", {"x": draw.x()}, settings={"dropout": later})
    on_device = Dropout(0.3, torch.tensor(-(2**62) - 5), sizes)
    yield Case("key on the device", {"x": draw.x()}, settings={"dropout": on_device})
    yield Case("none", {"x": draw.x()}, settings={"dropout": None})
    yield Case("probability 0", {"x": draw.x()}, settings={"dropout": Dropout(0.0, 3, sizes)})


@row("attention", outputs="context", returns="query key value")
def attention_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, visible: Visible, B: int = draw.B, T: int = draw.T, S: int = draw.T, **settings: Any) -> Case:
        query, key, value = (draw.normal(B, length, draw.H, 4) for length in (T, S, S))
        return Case(name, {"query": query, "key": key, "value": value}, settings={"visible": visible, **settings})

    B, T, S = draw.B, draw.T, draw.T + 3
    causal, everything = Visible(), Visible(causal=False)
    lengths = torch.arange(S, S - B, -1).clamp(min=1)
    lengths[-1] = 0  # a sequence without keys
    query_segments, key_segments = draw.ids(3, B, T), draw.ids(3, B, S)
    query_segments[0, 1], query_segments[-1] = 7, 9  # a query and a whole sequence that see no key
    apart = {"query_segments": query_segments, "key_segments": key_segments}
    dropout = Dropout(0.4, 987654321987654321, (draw.H, S + 1), first=(3,))
    yield case("causal", causal)
    yield case("not causal", everything)
    yield case("more keys, causal", causal, S=S)
    yield case("more keys, not causal", everything, S=S)
    yield case("fewer keys, not causal", everything, T=S, S=T)
    yield case("fewer keys, causal: the first queries see none", causal, T=S, S=T)
    yield case("key lengths, one of them 0", Visible(False, lengths), S=S)
    yield case("key lengths, causal", Visible(True, lengths), S=S)
    yield case("segments, some queries see none", Visible(False, **apart), S=S)
    yield case("all of it, dropout", Visible(True, lengths, **apart), S=S, dropout=dropout)
    yield case("dropout, not causal", everything, S=S, dropout=dropout)
    yield case("one key", everything, S=1)
    yield case("one query", causal, T=1, S=S)
    yield case("one query, one key, not causal", everything, T=1, S=1)
    yield case("B=1", everything, B=1, S=S)
    yield case("B=1 T=1, no key", Visible(False, torch.tensor([0])), B=1, T=1, S=S)


@row("self_attention", outputs="context", returns="qkv")
def self_attention_cases(draw: Draw) -> Iterator[Case]:
    qkv, n_heads = draw.normal(draw.B, draw.T, 3 * draw.D), draw.H
    yield Case("one segment", {"qkv": qkv}, settings={"n_heads": n_heads})
    place = torch.arange(draw.T)
    documents = torch.stack([(place > 1).long(), (place > 2).long() * 4] + [place * 0] * (draw.B - 2))
    padded = torch.where(place < draw.T - 2, documents, -1)
    dropout = Dropout(0.4, 987654321987654321, (n_heads, draw.T + 1), first=(3,))
    yield Case("documents", {"qkv": qkv}, settings={"n_heads": n_heads, "visible": Visible.within(documents)})
    both = {"visible": Visible.within(padded), "dropout": dropout}
    yield Case("documents, padding, dropout", {"qkv": qkv}, settings={"n_heads": n_heads, **both})
    yield Case("dropout", {"qkv": qkv}, settings={"n_heads": n_heads, "dropout": dropout})
    yield Case("one head", {"qkv": qkv}, settings={"n_heads": 1})
    yield Case("heads of width 1", {"qkv": qkv}, settings={"n_heads": draw.D})
    yield Case("B=1", {"qkv": draw.normal(1, draw.T, 3 * draw.D)}, settings={"n_heads": n_heads})
    yield Case("T=1", {"qkv": draw.normal(draw.B, 1, 3 * draw.D)}, settings={"n_heads": n_heads})
    yield Case("B=1 T=1", {"qkv": draw.normal(1, 1, 3 * draw.D)}, settings={"n_heads": n_heads})
    yield Case("sharp", {"qkv": qkv * 20}, settings={"n_heads": n_heads})


@row("cross_attention", outputs="context", returns="query key_value")
def cross_attention_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, B: int, T: int, S: int, n_heads: int, n_kv_heads: int, **settings: Any) -> Case:
        inputs = {"query": draw.normal(B, T, 4 * n_heads), "key_value": draw.normal(B, S, 8 * n_kv_heads)}
        return Case(name, inputs, settings={"n_heads": n_heads, "n_kv_heads": n_kv_heads, **settings})

    B, T, S = draw.B, draw.T, draw.T + 3
    lengths = torch.arange(S, S - B, -1).clamp(min=1)
    lengths[-1] = 0  # an empty source
    padded = Visible(False, lengths)
    dropout = Dropout(0.4, 987654321987654321, (4, S), first=(3,))
    yield case("padded sources, one of them empty", B, T, S, 3, 3, visible=padded)
    yield case("all visible", B, T, S, 3, 3)
    yield case("4 heads share 2, padding, dropout", B, T, S, 4, 2, visible=padded, dropout=dropout)
    yield case("all share 1", B, T, S, 3, 1, visible=padded)
    yield case("a longer target", B, S, T, 3, 3)
    yield case("S=1", B, T, 1, 2, 1)
    yield case("T=1", B, 1, S, 2, 2, visible=padded)
    yield case("B=1 T=1 S=1", 1, 1, 1, 2, 2)


# Rotary positions and shared keys and values: K = 4, so that a head has two pairs


def rotation_of(draw: Draw, pairs: int = 2) -> Tensor:
    """Cosines and sines of random angles, for more positions than needed."""
    angle = draw.normal(draw.T + 2, pairs).double()
    return torch.stack((angle.cos(), angle.sin()))


@row("rotary", returns="qkv")
def rotary_cases(draw: Draw) -> Iterator[Case]:
    rotation = rotation_of(draw)
    yield Case("queries and keys", {"qkv": draw.normal(draw.B, draw.T, 20)}, {}, {"rotation": rotation, "n_turned": 4})
    yield Case("all", {"qkv": draw.normal(draw.B, draw.T, 12)}, {}, {"rotation": rotation, "n_turned": 3})
    one = rotation_of(draw, pairs=1)
    yield Case("one pair", {"qkv": draw.normal(draw.B, draw.T, 6)}, {}, {"rotation": one, "n_turned": 2})
    yield Case("B=1 T=1", {"qkv": draw.normal(1, 1, 12)}, {}, {"rotation": rotation, "n_turned": 2})


@row("repeat_heads", returns="qkv")
def repeat_heads_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, B: int, T: int, n_heads: int, n_kv_heads: int) -> Case:
        width = 5 * (n_heads + 2 * n_kv_heads)
        settings = {"n_heads": n_heads, "n_kv_heads": n_kv_heads}
        return Case(name, {"qkv": draw.normal(B, T, width)}, settings=settings)

    yield case("6 heads share 2", draw.B, draw.T, 6, 2)
    yield case("all share 1", draw.B, draw.T, 3, 1)
    yield case("none is shared", draw.B, draw.T, 3, 3)
    yield case("B=1 T=1", 1, 1, 4, 2)


@row("rotary_attention", outputs="context", returns="qkv")
def rotary_attention_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, B: int, T: int, n_heads: int, n_kv_heads: int, **settings: Any) -> Case:
        qkv = draw.normal(B, T, 4 * (n_heads + 2 * n_kv_heads))
        heads = {"n_heads": n_heads, "n_kv_heads": n_kv_heads}
        return Case(name, {"qkv": qkv}, settings={"rotation": rotation, **heads, **settings})

    rotation = rotation_of(draw)
    place = torch.arange(draw.T)
    padded = torch.where(place < draw.T - 1, torch.stack([(place > b).long() for b in range(draw.B)]), -1)
    dropout = Dropout(0.4, 987654321987654321, (4, draw.T), first=(3,))
    visible = Visible.within(padded)
    yield case("6 heads share 2", draw.B, draw.T, 6, 2)
    yield case("documents, padding, dropout", draw.B, draw.T, 4, 2, visible=visible, dropout=dropout)
    yield case("all share 1", draw.B, draw.T, 3, 1)
    yield case("none is shared", draw.B, draw.T, 3, 3)
    yield case("T=1", draw.B, 1, 4, 2)
    yield case("B=1 T=1", 1, 1, 4, 2)


# Activations and the feed-forward network


def kinks(draw: Draw) -> Tensor:
    """Zeros, where a derivative jumps, and values so large that an exponential over- or underflows."""
    return torch.tensor([0.0, -0.0, 1e-8, -1e-8, 5, -5, 40, -40, 1e4, -1e4], dtype=draw.dtype)


def activation_cases(draw: Draw) -> Iterator[Case]:
    yield Case("typical", {"x": draw.x(2)})
    yield Case("extremes", {"x": kinks(draw)})


row("relu")(activation_cases)
row("gelu")(activation_cases)
row("gelu_tanh")(activation_cases)


@row("bias_gelu")
def bias_gelu_cases(draw: Draw) -> Iterator[Case]:
    yield Case("tanh", {"x": draw.x(2)}, {"bias": draw.bias(draw.D)})
    yield Case("exact", {"x": draw.x(2)}, {"bias": draw.bias(draw.D)}, {"tanh": False})
    yield Case("B=1 T=1", {"x": draw.normal(1, 1, draw.D, scale=2)}, {"bias": draw.bias(draw.D)})
    yield Case("extremes", {"x": kinks(draw)}, {"bias": draw.bias(10)})


@row("feed_forward")
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
    nothing_hidden = {name: torch.zeros_like(parameters[name]) for name in ("hidden_weight", "hidden_bias")}
    yield Case("relu at its kink", {"x": draw.x()}, parameters | nothing_hidden, {"activation": "relu"})
    yield Case("B=1 T=1", {"x": draw.normal(1, 1, draw.D)}, parameters)


@row("swiglu")
def swiglu_cases(draw: Draw) -> Iterator[Case]:
    yield Case("typical", {"x": draw.normal(draw.B, draw.T, 2 * draw.F, scale=2)})
    yield Case("extremes", {"x": torch.cat((kinks(draw), draw.normal(10)))})
    yield Case("B=1 T=1", {"x": draw.normal(1, 1, 2 * draw.F)})


@row("gated_feed_forward")
def gated_feed_forward_cases(draw: Draw) -> Iterator[Case]:
    parameters = {"gated_weight": draw.weight(2 * draw.F, draw.D), "output_weight": draw.weight(draw.D, draw.F)}
    yield Case("typical", {"x": draw.x()}, parameters)
    yield Case("B=1 T=1", {"x": draw.normal(1, 1, draw.D)}, parameters)
    yield Case("rows alone", {"x": draw.normal(draw.T, draw.D)}, parameters)


# One vector of a sequence


@row("mean_pooling")
def mean_pooling_cases(draw: Draw) -> Iterator[Case]:
    lengths = torch.arange(draw.T, draw.T - draw.B, -1).clamp(min=1)
    lengths[-1] = 0
    yield Case("padded, one of them empty", {"x": draw.x()}, settings={"lengths": lengths})
    yield Case("all real", {"x": draw.x()}, settings={"lengths": torch.full((draw.B,), draw.T)})
    yield Case("B=1 T=1", {"x": draw.normal(1, 1, draw.D)}, settings={"lengths": torch.tensor([1])})


@row("first_position")
def first_position_cases(draw: Draw) -> Iterator[Case]:
    yield Case("typical", {"x": draw.x()})
    yield Case("B=1 T=1", {"x": draw.normal(1, 1, draw.D)})


# Loss


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
    both = {"targets": targets, "label_smoothing": 0.3, "denominator": 17}
    yield "smoothing and denominator", both, {"dloss": -2.5}, shape
    without = targets.masked_fill(targets == 1, 0)
    yield "smoothing but for padding", {"targets": without, "label_smoothing": 0.2, "padding": 1}, {}, shape
    yield "all ignored", {"targets": torch.full(shape, IGNORED)}, {}, shape
    yield "all ignored, denominator 0", {"targets": torch.full(shape, IGNORED), "denominator": 0}, {"dloss": 1.0}, shape
    yield "B=1 T=1", {"targets": draw.ids(draw.V, 1, 1)}, {}, (1, 1)


@row("cross_entropy", outputs="loss", returns="logits")
def cross_entropy_cases(draw: Draw) -> Iterator[Case]:
    for name, settings, upstream, shape in loss_cases(draw):
        yield Case(name, {"logits": draw.normal(*shape, draw.V)}, settings=settings, upstream=upstream)
    targets = draw.ids(draw.V, draw.B, draw.T)
    yield Case("thousands", {"logits": draw.normal(draw.B, draw.T, draw.V, scale=2000)}, settings={"targets": targets})


@row("linear_cross_entropy", outputs="loss")
def linear_cross_entropy_cases(draw: Draw) -> Iterator[Case]:
    for name, settings, upstream, shape in loss_cases(draw):
        inputs, parameters = {"x": draw.normal(*shape, draw.D)}, {"weight": draw.weight(draw.V, draw.D)}
        yield Case(name, inputs, parameters, settings, upstream=upstream)


@row("squared_error", outputs="loss", returns="outputs")
def squared_error_cases(draw: Draw) -> Iterator[Case]:
    outputs, targets = draw.normal(draw.B, draw.F), draw.normal(draw.B, draw.F)
    some = targets.masked_fill(draw.ids(3, draw.B, draw.F) == 0, math.nan)
    some[0, 0], some[-1, -1] = math.nan, 0.5
    yield Case("some do not count", {"outputs": outputs}, settings={"targets": some})
    yield Case("all count", {"outputs": outputs}, settings={"targets": targets}, upstream={"dloss": 1.0})
    other = {"targets": some, "denominator": 29}
    yield Case("another denominator", {"outputs": outputs}, settings=other, upstream={"dloss": 0.7})
    on_device = {"targets": some, "denominator": torch.tensor(31)}
    yield Case("denominator on the device", {"outputs": outputs}, settings=on_device)
    yield Case("none counts", {"outputs": outputs}, settings={"targets": torch.full_like(targets, math.nan)})
    yield Case("one number", {"outputs": draw.normal(1, 1)}, settings={"targets": draw.normal(1, 1)})
