"""task=forecasting: predict the next values of a time series from its last ones, all steps at once.

    task.py         the task: splits by time, metrics, predictions
    baselines.py    simple methods on the same windows, and the metrics of forecasts
    predictor.py    inference: a forecast after the end of a series
    pictures.py     forecasts and true values

Not here: reading a series and cutting it into windows (`data.series`).
"""

from __future__ import annotations

from .task import ForecastingTask

__all__ = ["ForecastingTask"]
