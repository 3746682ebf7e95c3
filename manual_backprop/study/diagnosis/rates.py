"""The learning-rate range test (Smith 2015, "Cyclical Learning Rates", section 3.3), and the picture of its curve.

It is one training in which the rate grows with every step, each with a new batch: the loss falls while the rate is
good, and rises when it is too high.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...common.pictures import new_figure, picture, save_figure, with_grid

STEPS = 44
RANGES = {"adamw": (1e-5, 1.0), "sgd": (1e-3, 100.0)}  # of rates
DIVERGED = 1.5  # times the first loss: then no higher rate is tried
LEAST_FALL = 0.02  # of the loss: with less, the loss counts as not falling
# Measured for both sizes that are trained here, all architectures and both optimizers: the best rate is between a third
# of the picked rate and twice the picked rate.
BELOW_MINIMUM = 2  # the rate with the lowest smoothed loss is nearly too high, so half of it is picked
LOWEST, HIGHEST = 1 / 10, 4  # of the picked rate: rates in this range are accepted


@dataclass(frozen=True)
class RangeTest:
    rates: np.ndarray
    losses: np.ndarray  # of each step, before its update
    picked: float | None  # None: the loss fell at no rate

    @property
    def smooth(self) -> np.ndarray:
        return smoothed(self.losses)

    def suits(self, rate: float) -> bool:
        return self.picked is None or LOWEST * self.picked <= rate <= HIGHEST * self.picked

    def about(self, rate: float) -> str:
        """A sentence about the configured rate."""
        if self.picked is None:
            return f"learning rate: the loss falls at no rate from {self.rates[0]:.0e} to {self.rates[-1]:.0e}"
        words = f"learning rate: {rate:.1e} is given, the range test picks {self.picked:.1e}"
        band = f"{LOWEST * self.picked:.1e} to {HIGHEST * self.picked:.1e}"
        if self.suits(rate):
            return f"{words}; {band} suits this network"
        side = "TOO LOW" if rate < self.picked else "TOO HIGH"
        return f"{words}: {side}, {band} suits this network (optimizer.learning_rate, or model.learning_rate)"


def range_test(optimizer: str, step: Callable[[int, float], float]) -> RangeTest:
    """Runs the test. `step(number, rate)` makes an update with batch number `number` and returns the loss before it."""
    low, high = RANGES[optimizer]
    rates, losses = np.geomspace(low, high, STEPS), []
    for number, rate in enumerate(rates):
        losses.append(step(number, float(rate)))
        if not math.isfinite(losses[-1]) or losses[-1] > DIVERGED * losses[0]:
            break
    finite = np.array([loss for loss in losses if math.isfinite(loss)])
    picked = None
    if len(finite):
        smooth = smoothed(finite)
        lowest = int(smooth.argmin())
        if smooth[lowest] < (1 - LEAST_FALL) * smooth[0]:
            picked = float(rates[lowest]) / BELOW_MINIMUM
    return RangeTest(rates[: len(losses)], np.array(losses), picked)


def smoothed(values: np.ndarray) -> np.ndarray:
    """The moving mean of five values, with the ends repeated."""
    return np.convolve(np.pad(values, 2, mode="edge"), np.ones(5) / 5, "valid")


@picture
def draw_range_test(test: RangeTest, rate: float, path: Path, title: str) -> None:
    """Writes a PNG. Raises StorageError."""
    figure = new_figure(8, 4.8, dpi=120)
    axes = figure.subplots()
    axes.plot(test.rates, test.losses, color="#9ec5e8", linewidth=1, label="one batch each")
    axes.plot(test.rates, test.smooth, color="#1f4e79", label="mean of five")
    if test.picked is not None:
        axes.axvspan(LOWEST * test.picked, HIGHEST * test.picked, color="#2e8b57", alpha=0.12, label="suits")
        axes.axvline(test.picked, color="#2e8b57", label=f"picked: {test.picked:.1e}")
    axes.axvline(rate, color="#b5651d", linestyle="--", label=f"given: {rate:.1e}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss [nats per token]")
    axes.set_title(title, fontsize=11, parse_math=False)
    with_grid(axes)
    axes.legend(frameon=False)
    save_figure(figure, path)
