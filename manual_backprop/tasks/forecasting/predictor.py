"""Inference with a trained model: forecasts after the end of a series, for `predict RUN --file` and MLflow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...common.errors import InputError, NotFiniteError
from ...config.schema import DatasetConfig
from ...data.series.reader import GAPS, Series, is_number, series_of_lines
from ...data.series.windows import Scaling, forecasts_of
from ..inference import Predictor


class SeriesPredictor(Predictor):
    """Forecasts the steps after the end of a series."""

    def __init__(self, model: Any, scaling: Scaling, dataset: DatasetConfig):
        self.model, self.scaling, self.dataset = model, scaling, dataset

    def read_text(self, text: str) -> Any:
        raise InputError(
            f"--text {text!r:.40}: a forecast needs a series; give a CSV file with its last {self.scaling.history} "
            "steps: --file history.csv"
        )

    def read_lines(self, lines: Iterable[str], where: str) -> Iterator[Series]:
        """One input: all lines are one series, with the columns of the training. Raises InputError."""
        time, skip = self.dataset.time_column, self.dataset.on_bad_row == "skip"
        scaling = self.scaling
        series = series_of_lines(lines, where, time, scaling.names, skip, configured=False)
        if series.clock.about != scaling.step:
            raise InputError(
                f"{where}: its steps are {series.clock.about}, but this model was trained on steps of {scaling.step}; "
                "give a series with such steps"
            )
        if len(series) < scaling.history:
            raise InputError(
                f"{where}: has {len(series):,} steps, but this model reads the last {scaling.history}; give at least "
                "as many"
            )
        known = np.isfinite(series.values[-scaling.history :]).any(axis=0)
        if not known.all():
            raise InputError(
                f"{where}: {scaling.names[int(known.argmin())]} has no value in its last {scaling.history} steps, "
                "which this model reads; give a series with at least one there"
            )
        yield series

    def predict(self, inputs: Sequence[Series]) -> list[dict[str, Any]]:
        """The forecast, one object for each step of the horizon: {"time", "step", "forecast": {name: value}}."""
        scaling, lines = self.scaling, []
        for series in inputs:
            (found,) = self._forecasts(series.values[None, -scaling.history :])
            lines += [
                {
                    "time": series.time_text(len(series) - 1 + step),
                    "step": step,
                    "forecast": dict(zip(scaling.names, row, strict=True)),
                }
                for step, row in enumerate(found.tolist(), 1)
            ]
        return lines

    def serve(self, model_input: Any, params: Mapping[str, Any]) -> np.ndarray:
        """(B, history, S) of values, NaN in a gap -> (B, horizon, S). Raises InputError for anything else."""
        if params:
            raise InputError(f"there is no parameter {next(iter(params))!r}: a window has one forecast")
        try:
            history = np.asarray(model_input, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"expected numbers, (windows, {self.scaling.history}, series): {error}") from error
        if np.isinf(history).any():
            raise InputError("a value is infinite; give NaN where a value is missing")
        return self._forecasts(history)

    def _forecasts(self, history: np.ndarray) -> np.ndarray:
        """(B, history, S) -> (B, horizon, S). Raises NotFiniteError if there is no such number."""
        with np.errstate(over="ignore", invalid="ignore"):
            found = forecasts_of(self.model, self.scaling, history)
        if not np.isfinite(found).all():
            raise NotFiniteError(
                "The forecast is not finite: a value is too large for the model, or its parameters have diverged."
            )
        return found


def typed_history(text: str, scaling: Scaling) -> np.ndarray:
    """The history that a user typed, (1, H, S): the last steps of a series, separated by blanks, as in "316.1 317.3 nan
    317.5"; nan is a gap, and commas separate the values of several series. Raises InputError."""
    width, steps = len(scaling.names), text.split()
    example = ",".join(["1.5", "20", "300"][: min(width, 3)])
    usage = f"give the last {scaling.history} steps of {', '.join(scaling.names)}, as in {f'{example} ' * 2}nan"
    if len(steps) < scaling.history:
        raise InputError(f"a series of {len(steps)} steps: this model reads {scaling.history}; {usage}")
    values = [_values_of(step, number, width) for number, step in enumerate(steps, 1)]
    history = np.array(values[-scaling.history :], dtype=np.float64)
    if not np.isfinite(history).any(axis=0).all():
        raise InputError(f"a series without a value in its last {scaling.history} steps; {usage}")
    return history[None]


def _values_of(step: str, number: int, width: int) -> list[float]:
    cells = [cell.strip() for cell in step.split(",")]
    if step.lower() in GAPS:
        return [math.nan] * width
    if len(cells) != width:
        raise InputError(
            f"step {number}, {step!r}: has {len(cells)} values, and this model reads {width} in each step; put blanks "
            "between steps, commas between the values of one, and a decimal point into a number"
        )
    for cell in cells:
        if cell.lower() not in GAPS and not is_number(cell):
            raise InputError(f"step {number}, {step!r}: {cell!r} is not a finite number; write nan for a gap")
    return [math.nan if cell.lower() in GAPS else float(cell) for cell in cells]
