"""Runs at equal compute, and the number of parameters of a config: numbers that can be checked by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from logged_runs import log_of, write_run

from manual_backprop import CustomTransformerConfig, TrainingLogger, load_training_log
from manual_backprop.common.errors import InputError
from manual_backprop.models.implementations import build_network
from manual_backprop.visualizer import create_flops_normalized_loss, estimate_model_params, find_crossover_points
from manual_backprop.visualizer.equal_compute import (
    Curve,
    budget_table,
    compute_metric,
    curve_of,
    iso_levels,
    sentences,
)


def measured(root: Path, name: str, points: dict[int, float], rate: float = 1e10) -> object:
    """A run with these validation losses at these steps, of `rate` FLOPs each."""
    return log_of(root, name, losses=[9.0] * 10, every=10, validation=points, rate=rate)


def test_between_two_measurements_and_nowhere_else(tmp_path: Path) -> None:
    curve = curve_of(measured(tmp_path, "a", {20: 4.0, 40: 1.0}), "validation/loss")
    assert curve.at(30e10) == pytest.approx(2.5), "values that fall are interpolated as others are"
    assert (curve.at(20e10), curve.at(40e10)) == (4.0, 1.0)
    assert curve.at(19e10) is None
    assert curve.at(41e10) is None


def test_the_compute_at_which_a_loss_is_reached() -> None:
    """The first time, for a curve that rises in between; numpy.interp over falling losses would give 4.0 for 2.5."""
    curve = Curve(np.array([1.0, 4.0, 6.0, 8.0]), np.array([5.0, 2.0, 3.0, 1.0]))
    assert curve.reaches(3.5) == pytest.approx(2.5)
    assert curve.reaches(2.5) == pytest.approx(3.5)
    assert curve.reaches(1.0) == pytest.approx(8.0)
    assert curve.reaches(0.5) is None, "never"
    assert curve.reaches(5.0) is None, "it may have been there before"


def test_crossings(tmp_path: Path) -> None:
    """tiny: 4 at 2e11, 3 at 8e11. small: 5 at 2e11, 2 at 8e11. They cross where 4 - t = 5 - 3 t: at 5e11, 3.5."""
    logs = {
        "tiny": measured(tmp_path, "tiny", {20: 4.0, 80: 3.0}),
        "small": measured(tmp_path, "small", {10: 5.0, 40: 2.0}, rate=2e10),
    }
    (crossing,) = find_crossover_points(logs)
    assert (crossing.flops, crossing.loss) == pytest.approx((5e11, 3.5))
    assert (crossing.leader, crossing.other) == ("small", "tiny")
    assert str(crossing) == "above 5.0e11 FLOPs small leads tiny"
    assert sentences(logs) == ["above 5.0e11 FLOPs small leads tiny (up to 8.0e11)"]


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ({20: 3.0, 80: 2.0}, "from 2.0e11 to 8.0e11 FLOPs b leads a throughout"),
        ({20: 4.0, 80: 3.0}, "from 2.0e11 to 8.0e11 FLOPs a and b are equal"),
        ({90: 3.0, 100: 2.0}, "a and b were measured over no common compute"),
        ({}, "b: no loss with its FLOPs was logged"),
        ({20: 5.0, 50: 3.5, 80: 4.0}, "from 2.0e11 to 8.0e11 FLOPs a leads b throughout"),
    ],
    ids=["below", "equal", "elsewhere", "nothing", "touches"],
)
def test_what_is_said_where_nothing_crosses(points: dict[int, float], said: str, tmp_path: Path) -> None:
    logs = {"a": measured(tmp_path, "a", {20: 4.0, 80: 3.0}), "b": measured(tmp_path, "b", points)}
    assert find_crossover_points(logs) == []
    assert sentences(logs) == [said]


def test_a_meeting_over_a_stretch_is_one_crossing(tmp_path: Path) -> None:
    logs = {
        "a": measured(tmp_path, "a", {10: 4.0, 40: 3.0, 60: 3.0, 90: 3.0}),
        "b": measured(tmp_path, "b", {10: 5.0, 40: 3.0, 60: 3.0, 90: 1.0}),
    }
    (crossing,) = find_crossover_points(logs)
    assert (crossing.flops, crossing.leader) == (pytest.approx(4e11), "b")


def test_the_slider_shows_true_values(tmp_path: Path) -> None:
    logs = {"a": measured(tmp_path, "a", {20: 4.0, 40: 1.0}), "b": measured(tmp_path, "b", {30: 2.0, 90: 1.5})}
    table = budget_table(logs)
    budgets = table["budgets"]
    assert (budgets[0], budgets[-1]) == (20e10, 90e10)
    for budget, a, b in zip(budgets, table["losses"]["a"], table["losses"]["b"], strict=True):
        assert (a is None) == (budget > 40e10)
        assert (b is None) == (budget < 30e10)
        if a is not None:
            assert a == pytest.approx(4.0 - 3.0 * (budget - 20e10) / 20e10)
    assert budget_table({"c": log_of(tmp_path, rate=None)})["budgets"] == []


def test_bits_a_byte_where_tokenizers_differ(tmp_path: Path) -> None:
    def run(digest: str) -> object:
        path = write_run(tmp_path, tags={"tokenizer_digest": digest})
        TrainingLogger(path).log_validation(30, {"bits_per_byte": 2.0})
        return load_training_log(path)

    assert compute_metric({"a": run("1"), "b": run("1")}) == "validation/loss"
    assert compute_metric({"a": run("1"), "b": run("2")}) == "validation/bits_per_byte"
    assert compute_metric({"a": log_of(tmp_path, validation={})}) == "train/loss"
    figure = create_flops_normalized_loss({"a": run("1"), "b": run("2")})
    assert figure.layout.title.text == "Bits a byte over compute"


def test_the_picture_of_equal_compute(tmp_path: Path) -> None:
    logs = {"a": measured(tmp_path, "a", {20: 4.0, 40: 1.0}), "b": measured(tmp_path, "b", {30: 2.5, 90: 1.5})}
    figure = create_flops_normalized_loss(logs, budget=3e11)
    assert figure.layout.xaxis.type == "log"
    dots = [
        trace for trace in figure.data if trace.mode == "markers" and trace.showlegend is not None and len(trace.x) == 2
    ]
    assert [dot.x.tolist() for dot in dots if hasattr(dot.x, "tolist")][:2] == [[20e10, 40e10], [30e10, 90e10]]
    levels = [shape.y0 for shape in figure.layout.shapes if shape.yref != "paper"]
    assert levels == iso_levels([np.array([4.0, 1.0]), np.array([2.5, 1.5])]) == [1.0, 2.0, 3.0, 4.0]
    texts = [text for trace in figure.data if trace.text for text in trace.text]
    assert any(text.startswith("<b>a</b> reaches loss 2 at 3.3e11 FLOPs") for text in texts), texts
    assert figure.layout.shapes[-1].x0 == 3e11
    # what is straight over FLOPs is drawn so over their logarithm too
    line = next(trace for trace in figure.data if trace.mode == "lines")
    assert line.y == pytest.approx(4.0 - 3.0 * (np.array(line.x) - 20e10) / 20e10)


# Parameters

SIZES = {"vocab_size": 37, "d_model": 24, "n_blocks": 3, "n_heads": 4, "d_ffn": 40, "max_seq_len": 11}


PAIR = {"network": "encoder_decoder", "source_vocab_size": 20, "n_encoder_blocks": 1}
NETWORKS: list[tuple[str, dict[str, object]]] = [
    *(("gpt2", {}), ("vaswani", {}), ("llama", {}), ("llama", {"n_kv_heads": 2})),
    *(("gpt2", PAIR), ("vaswani", {"network": "encoder_decoder"}), ("llama", {"network": "encoder", "n_outputs": 5})),
    ("gpt2", {"network": "encoder", "n_inputs": 2, "n_outputs": 5}),
]


@pytest.mark.parametrize(("architecture", "others"), NETWORKS, ids=str)
@pytest.mark.parametrize("implementation", ["custom", "torch", "baseline"])
def test_the_estimate_is_what_is_counted(architecture: str, others: dict[str, object], implementation: str) -> None:
    config = CustomTransformerConfig(**SIZES, architecture=architecture, **others)  # type: ignore[arg-type]
    counted = build_network(implementation, config).count_parameters()
    assert estimate_model_params(config) == counted
    assert estimate_model_params(asdict(config)) == counted


def test_no_vocabulary_is_assumed(finished: Path, tmp_path: Path) -> None:
    config = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    with pytest.raises(InputError, match="the config has no vocab_size: give the network's own config"):
        estimate_model_params(config)
    run = {"model": config | {"vocab_size": None}, "tokenizer": {"name": "bpe", "vocab_size": 512}}
    with pytest.raises(InputError, match="has no vocab_size"):
        estimate_model_params(run | {"architecture": {"name": "gpt2"}})
    by_bytes = run | {"tokenizer": {"name": "byte"}, "architecture": {"name": "llama"}}
    expected = CustomTransformerConfig(**(SIZES | {"vocab_size": 257}), architecture="llama")
    assert estimate_model_params(by_bytes) == estimate_model_params(expected)
    with pytest.raises(InputError, match="expected a CustomTransformerConfig, a mapping or a training log"):
        estimate_model_params(3)
    with pytest.raises(InputError, match="must be divisible by n_heads"):
        estimate_model_params(SIZES | {"n_heads": 5})


def test_a_run_says_what_it_has_built(finished: Path) -> None:
    """The number that it has recorded, and the one computed from its network."""
    log = load_training_log(finished)
    without = {name: value for name, value in log.model.items() if name != "parameters"}
    assert log.model["vocab_size"] == 257
    assert estimate_model_params(without) == estimate_model_params(log) == estimate_model_params(log.config)
    assert log.model["parameters"] == estimate_model_params(without)


@pytest.mark.parametrize("kind", ["dataclass", "mapping"])
def test_a_logger_writes_the_config_that_it_is_given(kind: str, tmp_path: Path) -> None:
    config = CustomTransformerConfig(**SIZES)
    TrainingLogger(tmp_path, config=config if kind == "dataclass" else asdict(config)).log_step(1, {"train/loss": 1.0})
    log = load_training_log(tmp_path)
    assert log.config == log.model == asdict(config)
    assert estimate_model_params(log.config) == estimate_model_params(log)
    TrainingLogger(tmp_path).log_step(2, {"train/loss": 1.0})
    assert load_training_log(tmp_path).config == log.config, "opened again, it stays"
    with pytest.raises(InputError, match="expected a mapping or a dataclass"):
        TrainingLogger(tmp_path / "other", config=[1, 2])
    assert not (tmp_path / "other").exists()


def test_long_curves_cross_in_no_time(tmp_path: Path) -> None:
    """100,000 points each, crossing all the time."""
    flops = np.arange(1.0, 100_001)
    noise = np.random.default_rng(0).normal(3, 1, (2, 100_000))
    from manual_backprop.visualizer.equal_compute import _crossings

    found = _crossings("a", Curve(flops, noise[0]), "b", Curve(flops, noise[1]))
    assert len(found) > 40_000
    assert all(one.flops < other.flops for one, other in itertools.pairwise(found))
    assert math.isfinite(found[0].loss)
