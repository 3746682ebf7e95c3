"""The learning rate as a function of the step."""

from __future__ import annotations

import math

import pytest

from manual_backprop.config.schema import shipped_folder
from manual_backprop.optim.schedule import SHAPES, learning_rate

NAMES = tuple(SHAPES)


def test_each_option_of_the_config_has_a_shape_and_no_other_name_is_taken() -> None:
    assert set(NAMES) == {path.stem for path in (shipped_folder("conf") / "schedule").glob("*.yaml")}
    with pytest.raises(KeyError, match="quadratic"):
        learning_rate("quadratic", 1, max_steps=10, peak=1.0, warmup_steps=5)


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_rises_in_equal_parts(name: str) -> None:
    rates = [learning_rate(name, step, max_steps=100, peak=2.0, floor=0.5, warmup_steps=10) for step in range(1, 11)]
    assert rates == pytest.approx([0.2 * step for step in range(1, 11)])


@pytest.mark.parametrize(
    ("name", "quarter", "half", "end"),
    [
        ("cosine", 0.5 + 1.5 * (1 + math.sqrt(0.5)) / 2, 1.25, 0.5),
        ("linear", 1.625, 1.25, 0.5),
        ("constant", 2.0, 2.0, 2.0),
    ],
)
def test_shape_after_warm_up(name: str, quarter: float, half: float, end: float) -> None:
    def rate(step: int) -> float:
        return learning_rate(name, step, max_steps=110, peak=2.0, floor=0.5, warmup_steps=10)

    assert [rate(10), rate(35), rate(60), rate(110)] == pytest.approx([2.0, quarter, half, end])
    rates = [rate(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 3])
@pytest.mark.parametrize("max_steps", [1, 2, 3])
def test_the_shortest_runs(name: str, max_steps: int, warmup_steps: int) -> None:
    for step in range(1, max_steps + 1):
        rate = learning_rate(name, step, max_steps=max_steps, peak=2.0, floor=0.5, warmup_steps=warmup_steps)
        assert 0.5 <= rate <= 2.0
    assert learning_rate(name, max_steps + 5, max_steps=max_steps, peak=2.0, floor=0.5) == (
        2.0
        if name in ("constant", "plateau")
        else pytest.approx(2 / math.sqrt(1 + max_steps))
        if name == "noam"
        else 0.5
    )


def test_no_step_is_without_a_rate() -> None:
    """The first step has a rate above 0 with any warm-up; the last one reaches the floor."""
    for name in NAMES:
        assert learning_rate(name, 1, max_steps=1000, peak=1.0, warmup_steps=500) == pytest.approx(1 / 500)
    assert learning_rate("cosine", 1000, max_steps=1000, peak=1.0, floor=0.1) == pytest.approx(0.1)
