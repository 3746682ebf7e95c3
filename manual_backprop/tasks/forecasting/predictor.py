"""Inference with a trained model: forecasts after the end of a series, for `predict RUN --file` and MLflow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...common.errors import InputError
from ...config.schema import DatasetConfig
from ...data.series.reader import Series, series_of_lines
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
        series, scaling = series_of_lines(lines, where, time, self.scaling.names, skip), self.scaling
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
        yield series

    def predict(self, inputs: Sequence[Series]) -> list[dict[str, Any]]:
        """The forecast, one object for each step of the horizon: {"time", "step", "forecast": {name: value}}."""
        scaling, lines = self.scaling, []
        for series in inputs:
            (found,) = forecasts_of(self.model, scaling, series.values[None, -scaling.history :])
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
        """Forecasts: values (B, history, S), NaN in a gap -> (B, horizon, S)."""
        return forecasts_of(self.model, self.scaling, np.asarray(model_input, dtype=np.float64))
