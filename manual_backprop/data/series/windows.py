"""Windows of a time series: `history` steps that a network reads, and the `horizon` steps after them, its targets.

The values of a window are taken relative to its last one, in units of a scale that is measured on the training split. A
gap is filled from the window's own values, and a second input marks it. So a forecast depends only on its own history,
on nothing before or after it. The network learns the difference to a simple forecast: the one of `REFERENCES` with the
smallest error on the training split.

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

SCALING = "scaling.json"  # in a checkpoint
AT_ONCE = 500  # windows in one batch of forecasts
NO_WINDOW = (
    "no window of the {} split has a value of each series in its history and one to forecast; give a series with fewer "
    "gaps, or a longer task.history"
)
MOST_MEASURED = 4096  # windows of the training part, evenly spread, that the scales are measured on
LARGEST = 1e150  # whose squares are numbers still
SMALLEST = 1e-6  # of the scale of what is read: differences below are rounding, and not to be learned


def filled(history: np.ndarray) -> np.ndarray:
    """history (B, H, S), NaN in a gap -> the same without gaps: linear interpolation inside, the nearest value at the
    ends of a window. Values outside the window are not used."""
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
    """Forecast the last value."""
    return np.repeat(history[:, -1:], horizon, axis=1)


def seasonal(history: np.ndarray, horizon: int, season: int | None) -> np.ndarray:
    """Forecast the value of the last known season at the same phase."""
    assert season is not None
    return history[:, history.shape[1] - season + np.arange(horizon) % season]


def seasonal_with_drift(history: np.ndarray, horizon: int, season: int | None) -> np.ndarray:
    """The seasonal forecast plus a drift for each season ahead: the last value minus the one a season before it."""
    assert season is not None
    seasons = np.arange(horizon) // season + 1  # (O,)
    drift = (history[:, -1] - history[:, -season - 1])[:, None]  # (B, 1, S)
    return seasonal(history, horizon, season) + seasons[:, None] * drift


def smoothed_seasonal_with_drift(history: np.ndarray, horizon: int, season: int | None) -> np.ndarray:
    """`seasonal_with_drift` with less noise: the seasonal value is a mean over about a thirteenth of a season (one step
    if the season is short), and the drift is a mean over the last quarter of a season, limited by the history."""
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
    """The simple forecasts that are possible with, or without, a season."""
    return REFERENCES if season else {"persistence": persistence}


@dataclass(frozen=True)
class Scaling:
    """The transformation between values of a series and network inputs and outputs, as saved in a checkpoint."""

    history: int
    horizon: int
    season: int | None
    patch: int  # steps of the history in one position
    names: tuple[str, ...]  # of the series
    step: str  # the length of a step in words
    reference: str  # of REFERENCES; the network learns the difference to it
    scale: tuple[float, ...]  # root mean square of the inputs of each series
    target_scale: tuple[float, ...]  # the same for the targets

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
        """Measure the scales on the training split's values (N, S). Raises InputError if a series is constant there."""
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
                    f"{name} does not change in the {len(values):,} steps of the training split: there is nothing to "
                    "learn; leave that column out (dataset.value_columns), or give more of the series"
                )
        errors = {name: _root_mean_square(future - f(read, horizon, season)) for name, f in references(season).items()}
        best = min(errors, key=lambda name: float(np.mean(errors[name] / scale)))
        target_scale = np.maximum(errors[best], SMALLEST * scale)
        scales = tuple(scale.tolist()), tuple(target_scale.tolist())
        return cls(history, horizon, season, patch, names, step, best, *scales)

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> Self:
        """The scaling saved in a checkpoint. Raises CheckpointError."""
        saved = read_object(checkpoint / SCALING, kind=CheckpointError)
        fields: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in saved.items()}
        try:
            return cls(**fields)
        except TypeError as error:
            raise CheckpointError(f"{checkpoint / SCALING} is damaged: {error}") from error

    @property
    def positions(self) -> int:
        """T, the length of a sequence."""
        return self.history // self.patch

    @property
    def n_inputs(self) -> int:
        """C: a value and a gap flag for each step and series in a position."""
        return 2 * self.patch * len(self.names)

    @property
    def n_outputs(self) -> int:
        return self.horizon * len(self.names)

    def inputs(self, history: np.ndarray) -> np.ndarray:
        """The network's inputs: history (B, H, S) of values, NaN in a gap -> (B, T, C)."""
        read = filled(history)
        numbers = np.concatenate([(read - read[:, -1:]) / self.scale, ~np.isfinite(history)], axis=2)
        return numbers.reshape(len(history), self.positions, self.n_inputs)

    def start(self, history: np.ndarray) -> np.ndarray:
        """The simple forecast that the network corrects: history (B, H, S) -> (B, O, S)."""
        return REFERENCES[self.reference](filled(history), self.horizon, self.season)

    def targets(self, history: np.ndarray, future: np.ndarray) -> np.ndarray:
        """The network's targets: history (B, H, S), future (B, O, S) -> (B, O S), NaN for unknown values."""
        return ((future - self.start(history)) / self.target_scale).reshape(len(history), -1)

    def forecasts(self, history: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """The forecast values: history (B, H, S), outputs (B, O S) of a network -> (B, O, S)."""
        return self.start(history) + outputs.reshape(len(outputs), self.horizon, -1) * self.target_scale


def _root_mean_square(values: np.ndarray) -> np.ndarray:
    """(B, H, S) -> (S,), over known values; 0 if there are none."""
    count = np.isfinite(values).sum(axis=(0, 1))
    return np.sqrt(np.nansum(values**2, axis=(0, 1)) / np.maximum(count, 1))


def windows_of(values: np.ndarray, history: int, horizon: int, begin: int, end: int) -> np.ndarray:
    """The first target steps of the windows in [begin, end): values (N, S) -> (windows,). All targets of a window lie
    in that range; its history must have a known value of each series, and its targets at least one."""
    first = np.arange(max(begin, history), end - horizon + 1)
    if not len(first):
        return first
    totals = np.cumsum(np.pad(np.isfinite(values), ((1, 0), (0, 0))), axis=0)  # of known values before each step
    there = (totals[first] > totals[first - history]).all(axis=1)
    targets = (totals[first + horizon] > totals[first]).any(axis=1)
    return first[there & targets]


def cut(values: np.ndarray, first: np.ndarray, history: int, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """values (N, S), first target steps (B,) -> history (B, H, S) and future (B, O, S)."""
    places = first[:, None] + np.arange(-history, horizon)
    both = values[places]
    return both[:, :history], both[:, history:]


class Windows:
    """The windows of one split, as batches. `first` (n,): the first target step of each."""

    def __init__(self, values: np.ndarray, scaling: Scaling, begin: int, end: int, dtype: torch.dtype):
        self.values, self.scaling, self.dtype = values, scaling, dtype
        self.first = windows_of(values, scaling.history, scaling.horizon, begin, end)

    def __len__(self) -> int:
        return len(self.first)

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of known targets of each window, plus 1: callers subtract 1 for a row's first token."""
        totals = np.cumsum(np.pad(np.isfinite(self.values).sum(axis=1), (1, 0)))
        return totals[self.first + self.scaling.horizon] - totals[self.first] + 1

    def cut(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """History and future of windows, as values; `numbers` are the windows' indices."""
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
    """The batch of some windows. Without a future the loss ignores all targets."""
    if future is None:
        future = np.full((len(history), scaling.horizon, len(scaling.names)), math.nan)
    inputs, targets = scaling.inputs(history), scaling.targets(history, future)
    lengths = torch.full((len(history),), scaling.positions, device=device)
    both = (moved(torch.from_numpy(np.ascontiguousarray(numbers)).to(dtype), device) for numbers in (inputs, targets))
    read, wanted = both
    return EncoderBatch(read, lengths, wanted, first_row)


def forecasts_of(model: Any, scaling: Scaling, history: np.ndarray) -> np.ndarray:
    """Forecasts of an encoder (in its wrapper): history (B, H, S) of values, NaN in a gap -> (B, O, S), in float64.
    Raises InputError for windows of another shape, or without a known value."""
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
