"""What simple methods forecast for the same windows, and how far forecasts are from what came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...data.series.windows import Scaling, Windows, filled, references

MODEL, RIDGE = "model", "ridge"
PENALTIES = 10.0 ** np.arange(-4, 6)  # of ridge regression, of which the validation part chooses
LARGEST = 2e11  # multiplications that ridge regression may take: some ten seconds
MOST_FITTED = 20_000  # windows that it is fitted to, or chosen on, evenly spread


@dataclass(frozen=True)
class Errors:
    """Of forecasts, over the values that are known.

    rmse: root of the mean squared error, in the unit of the values. mase: mean absolute error, each series' in units of
    what repeating the value one season before costs within the training part (one step, where there is no season), mean
    over series (Hyndman and Koehler 2006, "Another look at measures of forecast accuracy", section 3). steps (O,): the
    rmse of each step of the horizon. of_series: rmse and mase of each.
    """

    rmse: float
    mase: float
    steps: np.ndarray
    of_series: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Compared:
    """Of a split, or its first windows: `errors` of the model and of simple methods, by name; loss of the model."""

    windows: int
    of: int
    loss: float
    errors: Mapping[str, Errors]

    @property
    def model(self) -> Errors:
        return self.errors[MODEL]

    @property
    def metrics(self) -> dict[str, float]:
        """By plain names: the model's, those of each step, and the simple methods'."""
        values = {"loss": self.loss, "rmse": self.model.rmse, "mase": self.model.mase}
        values |= {f"rmse_of_step_{step:03d}": float(value) for step, value in enumerate(self.model.steps, 1)}
        for name, errors in self.errors.items():
            if name != MODEL:
                key = name.replace(" ", "_")
                values |= {f"{key}_rmse": errors.rmse, f"{key}_mase": errors.mase}
        return values


def naive_errors(values: np.ndarray, season: int | None) -> np.ndarray:
    """Mean absolute change over a season, or over a step: values (N, S) of the training part -> (S,)."""
    lag = season or 1
    changes = np.abs(values[lag:] - values[:-lag])
    count = np.isfinite(changes).sum(axis=0)
    size = np.nansum(changes, axis=0) / np.maximum(count, 1)
    return np.where(size > 0, size, np.nan)


def errors_of(forecasts: np.ndarray, truth: np.ndarray, naive: np.ndarray) -> Errors:
    """forecasts, truth (B, O, S), NaN where it is not known; naive (S,), what `naive_errors` says."""
    missed = forecasts - truth
    squares, sizes = missed**2, np.abs(missed)
    counts = np.isfinite(missed)

    def mean(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        return np.nansum(values, axis=axes) / np.maximum(counts.sum(axis=axes), 1)

    of_series = mean(sizes, (0, 1)) / naive
    rmse_of_series = np.sqrt(mean(squares, (0, 1)))
    measured = of_series[np.isfinite(of_series)]
    return Errors(
        rmse=float(np.sqrt(mean(squares, (0, 1, 2)))),
        mase=float(measured.mean()) if len(measured) else float("nan"),
        steps=np.sqrt(mean(squares, (0, 2))),
        of_series=tuple(zip(rmse_of_series.tolist(), of_series.tolist(), strict=True)),
    )


def simple_forecasts(history: np.ndarray, scaling: Scaling) -> dict[str, np.ndarray]:
    """By name, those that only repeat: history (B, H, S) -> (B, O, S)."""
    read = filled(history)
    return {name: f(read, scaling.horizon, scaling.season) for name, f in references(scaling.season).items()}


class Ridge:
    """Ridge regression of the network's own inputs to its own targets: W = (X^T X + k I)^-1 X^T Y, X and Y less their
    means over the training windows (Hoerl and Kennard 1970), k what does best on the validation windows. Outputs are
    fitted on the windows in which they are known, those with the same windows together."""

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
    """A split's windows: inputs (n, T C) and targets (n, O S)."""
    history, future = windows.cut(np.unique(np.linspace(0, len(windows) - 1, MOST_FITTED).astype(int)))
    return windows.scaling.inputs(history).reshape(len(history), -1), windows.scaling.targets(history, future)


def _columns_by_gaps(y: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows in which outputs are known, and the outputs that are known in the same ones."""
    there = np.isfinite(y)
    patterns, group = np.unique(there.T, axis=0, return_inverse=True)
    group = group.reshape(-1)
    found = [(np.flatnonzero(rows), np.flatnonzero(group == number)) for number, rows in enumerate(patterns)]
    return [(rows, columns) for rows, columns in found if len(rows)]
