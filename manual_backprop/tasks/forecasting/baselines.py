"""Forecasts of simple methods for the same windows, and the errors of forecasts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...data.series.windows import Scaling, Windows, filled, references

MODEL, RIDGE = "model", "ridge"
PENALTIES = 10.0 ** np.arange(-4, 6)  # candidates for ridge regression, chosen on the validation split
LARGEST = 2e11  # multiplications that ridge regression may take, about ten seconds
MOST_FITTED = 20_000  # windows, evenly spread, to fit it and to choose its penalty


@dataclass(frozen=True)
class Errors:
    """The errors of forecasts, over known values.

    rmse: root mean squared error, in the unit of the values. mase: mean over series of the mean absolute error divided
    by that of repeating the value one season before (one step, if there is no season) in the training split (Hyndman
    and Koehler 2006, "Another look at measures of forecast accuracy", section 3). steps (O,): the rmse of each step of
    the horizon. of_series: rmse and mase of each series.
    """

    rmse: float
    mase: float
    steps: np.ndarray
    of_series: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Compared:
    """The results on a split or its first windows: `errors` of the model and of simple methods by name, and the model's
    loss."""

    windows: int
    of: int  # windows in the whole split
    loss: float
    errors: Mapping[str, Errors]

    @property
    def model(self) -> Errors:
        return self.errors[MODEL]

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics by name: the model's, those of each step, and the simple methods'."""
        values = {"loss": self.loss, "rmse": self.model.rmse, "mase": self.model.mase}
        values |= {f"rmse_of_step_{step:03d}": float(value) for step, value in enumerate(self.model.steps, 1)}
        for name, errors in self.errors.items():
            if name != MODEL:
                key = name.replace(" ", "_")
                values |= {f"{key}_rmse": errors.rmse, f"{key}_mase": errors.mase}
        return values


def naive_errors(values: np.ndarray, season: int | None) -> np.ndarray:
    """Mean absolute change over a season, or over a step if there is no season: values (N, S) of the training split ->
    (S,). For a series that repeats exactly after a season, over a step, since MASE divides by it."""
    found = np.zeros(values.shape[1])
    for lag in (season or 1, 1):
        changes = np.abs(values[lag:] - values[:-lag])
        sizes = np.nansum(changes, axis=0) / np.maximum(np.isfinite(changes).sum(axis=0), 1)
        found = np.where(found > 0, found, sizes)
    return np.where(found > 0, found, np.nan)


def mean_where(there: np.ndarray, values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The mean of `values` where `there` is true; not finite if one of these values is not."""
    return np.where(there, values, 0.0).sum(axis=axes) / np.maximum(there.sum(axis=axes), 1)


def errors_of(forecasts: np.ndarray, truth: np.ndarray, naive: np.ndarray) -> Errors:
    """The errors of forecasts (B, O, S); truth (B, O, S) is NaN where unknown; naive (S,) from `naive_errors`."""
    there, missed = np.isfinite(truth), forecasts - truth
    rmse_of_series = np.sqrt(mean_where(there, missed**2, (0, 1)))
    mase_of_series = mean_where(there, np.abs(missed), (0, 1)) / naive
    measured = mase_of_series[np.isfinite(naive) & there.any(axis=(0, 1))]
    return Errors(
        rmse=float(np.sqrt(mean_where(there, missed**2, (0, 1, 2)))),
        mase=float(measured.mean()) if len(measured) else float("nan"),
        steps=np.sqrt(mean_where(there, missed**2, (0, 2))),
        of_series=tuple(zip(rmse_of_series.tolist(), mase_of_series.tolist(), strict=True)),
    )


def simple_forecasts(history: np.ndarray, scaling: Scaling) -> dict[str, np.ndarray]:
    """The forecasts of REFERENCES by name: history (B, H, S) -> (B, O, S)."""
    read = filled(history)
    return {name: f(read, scaling.horizon, scaling.season) for name, f in references(scaling.season).items()}


class Ridge:
    """Ridge regression from the network's inputs to its targets: W = (X^T X + k I)^-1 X^T Y, with X and Y centred over
    the training windows (Hoerl and Kennard 1970). The validation windows choose k. Each output is fitted on the windows
    in which it is known; outputs known in the same windows are fitted together."""

    def __init__(self, training: Windows, validation: Windows):
        self.scaling = training.scaling
        x, y = _table(training)
        unseen, wanted = _table(validation)
        groups = _columns_by_gaps(y)
        self.weights = np.zeros((x.shape[1], y.shape[1]))
        candidates = np.zeros((len(PENALTIES), *wanted.shape))
        fitted = []
        for rows, columns in groups:
            x_mean, y_mean = x[rows].mean(axis=0), y[rows][:, columns].mean(axis=0)
            centred = x[rows] - x_mean
            sizes, directions = np.linalg.eigh(centred.T @ centred)
            moments = directions.T @ (centred.T @ (y[rows][:, columns] - y_mean))
            solutions = [directions @ (moments / (sizes.clip(min=0) + k)[:, None]) for k in PENALTIES]
            for place, solution in enumerate(solutions):
                candidates[place][:, columns] = (unseen - x_mean) @ solution + y_mean
            fitted.append((columns, x_mean, y_mean, solutions))
        best = int(np.nanargmin(np.nanmean((candidates - wanted) ** 2, axis=(1, 2))))
        self.penalty, self.bias = float(PENALTIES[best]), np.zeros(y.shape[1])
        for columns, x_mean, y_mean, solutions in fitted:
            self.weights[:, columns] = solutions[best]
            self.bias[columns] = y_mean - x_mean @ solutions[best]

    @staticmethod
    def is_affordable(training: Windows) -> bool:
        features = training.scaling.n_inputs * training.scaling.positions
        known = np.isfinite(training.values).all()
        groups = 1 if known else training.scaling.n_outputs
        rows = min(len(training), MOST_FITTED)
        return rows > 1 and groups * features**2 * (rows + 10 * features) < LARGEST

    def forecasts(self, history: np.ndarray) -> np.ndarray:
        """history (B, H, S) -> (B, O, S)."""
        x = self.scaling.inputs(history).reshape(len(history), -1)
        return self.scaling.forecasts(history, x @ self.weights + self.bias)


def _table(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (n, T C) and targets (n, O S) of a split's windows, at most MOST_FITTED."""
    history, future = windows.cut(np.unique(np.linspace(0, len(windows) - 1, MOST_FITTED).astype(int)))
    return windows.scaling.inputs(history).reshape(len(history), -1), windows.scaling.targets(history, future)


def _columns_by_gaps(y: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Groups of outputs that are known in the same rows: (rows, outputs) for each group."""
    there = np.isfinite(y)
    patterns, group = np.unique(there.T, axis=0, return_inverse=True)
    group = group.reshape(-1)
    found = [(np.flatnonzero(rows), np.flatnonzero(group == number)) for number, rows in enumerate(patterns)]
    return [(rows, columns) for rows, columns in found if len(rows)]
