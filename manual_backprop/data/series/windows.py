"""What a network reads of a series and what it answers: windows of `history` steps, and the `horizon` steps after each.

A window is read relative to its last value, in units of a scale that the training part alone decides; where a value is
missing, the window is filled from what it holds itself, and a second number says so. So a forecast is a function of its
own history: nothing after it is looked at, and nothing before it. What is learned is the difference to a simple
forecast, which the network only has to correct (of those in `REFERENCES`, the one that does best on the training part).

B windows · H steps of history · O steps of the horizon · S series.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from ...common.batch import EncoderBatch, moved
from ...common.errors import CheckpointError, InputError
from ...common.json_files import read_object

SCALING = "scaling.json"  # of a checkpoint
AT_ONCE = 500  # windows that are forecast
NO_WINDOW = (
    "no window of the {} part has a value of each series in its history and one to forecast; give a series with fewer "
    "gaps, or a longer task.history"
)
MOST_MEASURED = 4096  # windows of the training part, evenly spread, that the scales are measured on
LARGEST = 1e150  # whose squares are numbers still
SMALLEST = 1e-6  # of the scale of what is read: differences below are rounding, and not to be learned


def filled(history: np.ndarray) -> np.ndarray:
    """history (B, H, S), NaN in a gap -> the same without gaps: on a straight line between the values beside a gap,
    and like the nearest value before the first and after the last. Nothing outside of a window has a part in it."""
    there = np.isfinite(history)
    if there.all():
        return history
    places = np.arange(history.shape[1])[:, None]
    before = np.maximum.accumulate(np.where(there, places, -1), axis=1)
    after = np.flip(np.minimum.accumulate(np.flip(np.where(there, places, history.shape[1]), 1), axis=1), 1)
    before, after = np.where(before < 0, after, before), np.where(after == history.shape[1], before, after)
    share = (places - before) / np.maximum(after - before, 1)
    left, right = (np.take_along_axis(history, beside, axis=1) for beside in (before, after))
    return np.where(there, history, left + share * (right - left))


# Simple forecasts: filled history (B, H, S), O, steps of a season -> (B, O, S)


def persistence(history: np.ndarray, horizon: int, season: int | None) -> np.ndarray:
    """The last value."""
    return np.repeat(history[:, -1:], horizon, axis=1)


def seasonal(history: np.ndarray, horizon: int, season: int | None) -> np.ndarray:
    """The value one season before, or, past the first season, as many as are needed."""
    assert season is not None
    return history[:, history.shape[1] - season + np.arange(horizon) % season]


def seasonal_with_drift(history: np.ndarray, horizon: int, season: int | None) -> np.ndarray:
    """The same, plus what the last value is above the one a season before it, once for each season in between."""
    assert season is not None
    seasons = np.arange(horizon) // season + 1  # (O,)
    drift = (history[:, -1] - history[:, -season - 1])[:, None]  # (B, 1, S)
    return seasonal(history, horizon, season) + seasons[:, None] * drift


def smoothed_seasonal_with_drift(history: np.ndarray, horizon: int, season: int | None) -> np.ndarray:
    """The same with less noise: the value one season before is a mean over the steps around it, a thirteenth of a
    season in all (one, of a short season), and the drift one over the last quarter of a season, as far as there is a
    history."""
    assert season is not None
    H, reach, quarter = history.shape[1], season // 26, max(1, min(season // 4, history.shape[1] - season))
    drift = (history[:, H - quarter :] - history[:, H - quarter - season : H - season]).mean(axis=1, keepdims=True)
    around = H - season + (np.arange(horizon) % season)[:, None] + np.arange(-reach, reach + 1)  # (O, around)
    shape = history[:, around.clip(0, H - 1)].mean(axis=2)
    return shape + (np.arange(horizon) // season + 1)[:, None] * drift


Reference = Callable[[np.ndarray, int, int | None], np.ndarray]
REFERENCES: dict[str, Reference] = {
    "persistence": persistence,
    "seasonal": seasonal,
    "seasonal with drift": seasonal_with_drift,
    "smoothed seasonal with drift": smoothed_seasonal_with_drift,
}


def references(season: int | None) -> dict[str, Reference]:
    """Those that there are with, or without, a season."""
    return REFERENCES if season else {"persistence": persistence}


@dataclass(frozen=True)
class Scaling:
    """Between the values of a series and the numbers of a network: what a checkpoint keeps of the training part."""

    history: int
    horizon: int
    season: int | None
    patch: int  # steps of the history that are one position
    names: tuple[str, ...]  # of the series
    step: str  # in words, what a step of time is
    reference: str  # of REFERENCES: what is learned is the difference to it
    scale: tuple[float, ...]  # root mean square of what is read, of each series
    target_scale: tuple[float, ...]  # and of what is learned

    @classmethod
    def measured(
        cls,
        values: np.ndarray,
        history: int,
        horizon: int,
        season: int | None,
        patch: int,
        names: tuple[str, ...],
        step: str,
    ) -> Self:
        """values (N, S) of the training part. Raises InputError where a series does not change there."""
        wanted = windows_of(values, history, horizon, 0, len(values))
        if not len(wanted):
            raise InputError(NO_WINDOW.format("training"))
        wanted = wanted[np.unique(np.linspace(0, len(wanted) - 1, MOST_MEASURED).astype(int))]
        read, future = cut(values, wanted, history, horizon)
        read = filled(read)
        with np.errstate(over="ignore"):
            scale = _root_mean_square(read - read[:, -1:])
        for name, size in zip(names, scale, strict=True):
            if not np.isfinite(size):
                raise InputError(
                    f"{name} changes by more than {LARGEST:.0e}, of which there is no mean square; give it in a larger "
                    "unit"
                )
            if not size > 0:
                raise InputError(
                    f"{name} does not change in the {len(values):,} steps of the training part: there is nothing to "
                    "learn; leave that column out (dataset.value_columns), or give more of the series"
                )
        errors = {name: _root_mean_square(future - f(read, horizon, season)) for name, f in references(season).items()}
        best = min(errors, key=lambda name: float(np.mean(errors[name] / scale)))
        return cls(
            history,
            horizon,
            season,
            patch,
            names,
            step,
            best,
            tuple(scale.tolist()),
            tuple(np.maximum(errors[best], SMALLEST * scale).tolist()),
        )

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> Self:
        """What `asdict` made of one, in a checkpoint's SCALING. Raises CheckpointError."""
        saved = read_object(checkpoint / SCALING, kind=CheckpointError)
        fields: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in saved.items()}
        try:
            return cls(**fields)
        except TypeError as error:
            raise CheckpointError(f"{checkpoint / SCALING} is damaged: {error}") from error

    @property
    def positions(self) -> int:
        """T, of a sequence."""
        return self.history // self.patch

    @property
    def n_inputs(self) -> int:
        """C: value and gap of each step and series of a position."""
        return 2 * self.patch * len(self.names)

    @property
    def n_outputs(self) -> int:
        return self.horizon * len(self.names)

    def inputs(self, history: np.ndarray) -> np.ndarray:
        """history (B, H, S) of values, NaN in a gap -> (B, T, C) of numbers."""
        read = filled(history)
        numbers = np.concatenate([(read - read[:, -1:]) / self.scale, ~np.isfinite(history)], axis=2)
        return numbers.reshape(len(history), self.positions, self.n_inputs)

    def start(self, history: np.ndarray) -> np.ndarray:
        """The simple forecast that is to be corrected: history (B, H, S) -> (B, O, S)."""
        return REFERENCES[self.reference](filled(history), self.horizon, self.season)

    def targets(self, history: np.ndarray, future: np.ndarray) -> np.ndarray:
        """history (B, H, S), future (B, O, S) -> (B, O S), NaN where the future is not known."""
        return ((future - self.start(history)) / self.target_scale).reshape(len(history), -1)

    def forecasts(self, history: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """outputs (B, O S) of a network -> values (B, O, S)."""
        return self.start(history) + outputs.reshape(len(outputs), self.horizon, -1) * self.target_scale


def _root_mean_square(values: np.ndarray) -> np.ndarray:
    """(B, H, S) -> (S,), over what is known; 0 of nothing."""
    count = np.isfinite(values).sum(axis=(0, 1))
    return np.sqrt(np.nansum(values**2, axis=(0, 1)) / np.maximum(count, 1))


def windows_of(values: np.ndarray, history: int, horizon: int, begin: int, end: int) -> np.ndarray:
    """Where the targets of each window begin that has all of them in [begin, end) and a history of which something is
    known: values (N, S) -> (windows,)."""
    first = np.arange(max(begin, history), end - horizon + 1)
    if not len(first):
        return first
    totals = np.cumsum(np.pad(np.isfinite(values), ((1, 0), (0, 0))), axis=0)  # of known values before each step
    there = (totals[first] > totals[first - history]).all(axis=1)
    targets = (totals[first + horizon] > totals[first]).any(axis=1)
    return first[there & targets]


def cut(values: np.ndarray, first: np.ndarray, history: int, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """values (N, S), where targets begin (B,) -> history (B, H, S) and future (B, O, S)."""
    places = first[:, None] + np.arange(-history, horizon)
    both = values[places]
    return both[:, :history], both[:, history:]


class Windows:
    """The windows of one split, as batches. `first` (n,): where the targets of each begin."""

    def __init__(self, values: np.ndarray, scaling: Scaling, begin: int, end: int, dtype: torch.dtype):
        self.values, self.scaling, self.dtype = values, scaling, dtype
        self.first = windows_of(values, scaling.history, scaling.horizon, begin, end)

    def __len__(self) -> int:
        return len(self.first)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Targets of each that count, and one: the first of a row is no target to those who cut rows."""
        totals = np.cumsum(np.pad(np.isfinite(self.values).sum(axis=1), (1, 0)))
        return totals[self.first + self.scaling.horizon] - totals[self.first] + 1

    def cut(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """History and future of windows by their numbers, as values."""
        return cut(self.values, self.first[numbers], self.scaling.history, self.scaling.horizon)

    def batch(
        self, numbers: np.ndarray, lengths: np.ndarray, first_row: int = 0, device: torch.device | str = "cpu"
    ) -> EncoderBatch:
        history, future = self.cut(numbers)
        return as_batch(self.scaling, history, future, self.dtype, device, first_row)


def as_batch(
    scaling: Scaling,
    history: np.ndarray,
    future: np.ndarray | None,
    dtype: torch.dtype,
    device: torch.device | str,
    first_row: int = 0,
) -> EncoderBatch:
    """Without a future no target counts."""
    if future is None:
        future = np.full((len(history), scaling.horizon, len(scaling.names)), math.nan)
    inputs, targets = scaling.inputs(history), scaling.targets(history, future)
    lengths = torch.full((len(history),), scaling.positions, device=device)
    both = (moved(torch.from_numpy(np.ascontiguousarray(numbers)).to(dtype), device) for numbers in (inputs, targets))
    read, wanted = both
    return EncoderBatch(read, lengths, wanted, first_row)


def forecasts_of(model: Any, scaling: Scaling, history: np.ndarray) -> np.ndarray:
    """By an encoder in its wrapper: history (B, H, S) of values, NaN in a gap -> (B, O, S), in float64. Raises
    InputError for windows of another shape, or without a value."""
    wanted = (scaling.history, len(scaling.names))
    if history.ndim != 3 or history.shape[1:] != wanted:
        raise InputError(
            f"windows of shape {tuple(history.shape)}: expected (windows, {wanted[0]}, {wanted[1]}), the last "
            f"{wanted[0]} steps of {', '.join(scaling.names)}"
        )
    if not np.isfinite(history).any(axis=1).all():
        raise InputError(
            f"a window without a value: of its {wanted[0]} steps at least one must be known, of each series"
        )
    network, parts = model.network, [np.zeros((0, scaling.horizon, wanted[1]))]
    for first in range(0, len(history), AT_ONCE):
        part = history[first : first + AT_ONCE]
        outputs = network.predict(as_batch(scaling, part, None, network.config.get_dtype(), network.device))
        parts.append(scaling.forecasts(part, outputs.double().cpu().numpy()))
    return np.concatenate(parts)
