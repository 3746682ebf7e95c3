"""task=forecasting: from the last values of a series to its next ones, all steps at once.

    task.py         the task: splits by time, metrics, predictions
    baselines.py    what simple methods reach on the same windows, and how forecasts are measured
    predictor.py    what comes after the end of a series
    pictures.py     forecasts over the truth

Not here: how a series is read, and cut into windows (`data.series`).
"""

from __future__ import annotations

from .task import ForecastingTask

__all__ = ["ForecastingTask"]
