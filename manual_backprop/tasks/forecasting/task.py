"""task=forecasting: predict the next `horizon` steps of a series from its last `history` steps, all at once.

An encoder reads a window of numbers and outputs a correction of a simple forecast (`data.series.windows`). The loss is
the squared error over known values, in units measured on the training split. A series is split by time: the first steps
are the training split, then come validation and test. A window belongs to the split that has all of its targets, so
that no target is in two splits; its history may reach back into the split before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from ...common.batch import AnyBatch, EncoderBatch
from ...common.digests import json_digest
from ...common.errors import InputError
from ...common.processes import processes
from ...config.schema import CustomTransformerConfig, RunConfig
from ...data.series.reader import Series, open_series
from ...data.series.windows import NO_WINDOW, SCALING, Scaling, Windows, as_batch, forecasts_of
from ...data.tokens.order import Order
from ..inference import Predictor, Reading
from ..preview import Preview
from ..task import Evaluated, Final, Measured, Task
from .baselines import MODEL, RIDGE, Compared, Ridge, errors_of, mean_where, naive_errors, simple_forecasts
from .pictures import FORECASTS, MOST_FORECASTS, draw_forecasts
from .predictor import SeriesPredictor, typed_history

SHOWN = 8  # predictions
MOST_STEPS = 26  # of the horizon in a table
SPLITS = ("train", "validation", "test")


class ForecastingTask(Task):
    """Forecasting of the series of a run's config."""

    inference_command = ("predict", "--file", "history.csv")
    predictions_title = "forecasts of the validation split"
    files = (SCALING,)
    refusals: Mapping[str, str] = {
        "dataset_digest": "dataset: the series, its windows or its splits differ from those of {}; bring back those, "
        "or start a new run"
    }
    scaling: Scaling

    def __init__(self, config: RunConfig, series: Series):
        task, dataset = config.task, config.dataset
        assert task.history is not None
        assert task.horizon is not None
        assert task.patch is not None
        assert dataset.test_share is not None
        self.config, self.series = config, series
        windows = {"history": task.history, "horizon": task.horizon, "season": task.season, "patch": task.patch}
        split = {"validation": dataset.validation, "test_share": dataset.test_share}
        self.digests = {"dataset_digest": json_digest([series.digest, windows, split])}
        validation = dataset.validation if isinstance(dataset.validation, float) else 0.0
        test = len(series) - round(dataset.test_share * len(series))
        cuts = 0, test - round(validation * len(series)), test, len(series)
        self.bounds = dict(zip(SPLITS, pairwise(cuts), strict=True))
        self._check_lengths(task.history, task.horizon)
        known_values = series.values[: self.bounds["train"][1]]
        self.scaling = Scaling.measured(
            known_values, task.history, task.horizon, task.season, task.patch, series.names, series.clock.about
        )
        self.naive = naive_errors(known_values, task.season)

    def _check_lengths(self, history: int, horizon: int) -> None:
        """Raise InputError if one of the splits has no window."""
        needed = {"train": history + horizon, "validation": horizon, "test": horizon}
        steps = {name: end - begin for name, (begin, end) in self.bounds.items()}
        if short := [name for name in SPLITS if steps[name] < needed[name]]:
            least = max(-(-needed[name] * len(self.series) // max(steps[name], 1)) for name in short)
            raise InputError(
                f"{self.series.place}: {len(self.series):,} steps are too few: "
                + ", ".join(f"{steps[name]:,} for {'training' if name == 'train' else name}" for name in SPLITS)
                + f"; a window takes task.history={history} steps and task.horizon={horizon} targets, and each part "
                f"needs one (training {history + horizon}, the others {horizon} steps). Give about {least:,} steps, a "
                "smaller history or horizon, or other shares (dataset.validation, dataset.test_share)"
            )

    @classmethod
    def open(cls, config: RunConfig, cache: Path) -> Self:
        return cls(config, open_series(config.dataset))

    @classmethod
    def restored(cls, config: RunConfig, directory: Path, cache: Path) -> Self:
        """The task with only its scaling: methods that need the series do not work."""
        task = cls.__new__(cls)
        task.config, task.scaling = config, Scaling.of_checkpoint(directory)
        return task

    @classmethod
    def preview(cls, config: RunConfig, cache: Path) -> Preview:
        """Exact numbers, since reading a series is fast."""
        task = cls.open(config, cache)
        scaling = task.scaling
        rows = f"windows of {scaling.history} -> {scaling.horizon} steps"
        evaluated = len(task.windows["validation"]) * scaling.positions
        return task.previewed("series", rows, "values", evaluated_tokens=evaluated)

    # The parts of a run

    @property
    def network_config(self) -> CustomTransformerConfig:
        scaling = self.scaling
        return replace(
            self.config.network_config(1),
            n_inputs=scaling.n_inputs,
            n_outputs=scaling.n_outputs,
            head_loss="squared_error",
        )

    @cached_property
    def windows(self) -> dict[str, Windows]:
        dtype = self.network_config.get_dtype()
        return {name: Windows(self.series.values, self.scaling, *bounds, dtype) for name, bounds in self.bounds.items()}

    def order(self, repeat: int | None = None) -> Order:
        return self.every_row(self.windows["train"], self.scaling.n_outputs, repeat)

    def check(self) -> None:
        for name in ("validation", "test"):
            if not len(self.windows[name]):
                raise InputError(f"{self.series.place}: {NO_WINDOW.format(name)}")

    # Metrics and predictions

    def compared(self, model: Any, split: str, count: int | None = None, simple: bool = True) -> Compared:
        """The errors on the windows of a split, or its first `count`; with `simple`, also those of simple methods."""
        windows = self.windows[split]
        numbers = np.arange(len(windows))[:count]
        history, future = windows.cut(numbers)
        found = {MODEL: self.forecasts(model, history)}
        if simple:
            found |= self._simple(history)
        errors = {name: errors_of(forecasts, future, self.naive) for name, forecasts in found.items()}
        missed = (found[MODEL] - future) / self.scaling.target_scale
        loss = float(mean_where(np.isfinite(future), missed**2, (0, 1, 2)))
        return Compared(len(numbers), len(windows), loss, errors)

    def forecasts(self, model: Any, history: np.ndarray) -> np.ndarray:
        """history (B, H, S) -> (B, O, S), in float64. Each of several processes makes those of every `size`-th window;
        the others are 0 there, so that the sum has all of them, bit for bit."""
        group = processes()
        found = np.zeros((len(history), self.scaling.horizon, len(self.scaling.names)))
        found[group.rank :: group.size] = forecasts_of(model, self.scaling, history[group.rank :: group.size])
        return group.summed(torch.from_numpy(found)).numpy()

    def _simple(self, history: np.ndarray) -> dict[str, np.ndarray]:
        """The forecasts of simple methods by name, those expected to be best first."""
        found = {} if self.ridge is None else {RIDGE: self.ridge.forecasts(history)}
        return found | dict(reversed(simple_forecasts(history, self.scaling).items()))

    @cached_property
    def ridge(self) -> Ridge | None:
        """Ridge regression fitted to the training split; None if it would take too long."""
        return Ridge(self.windows["train"], self.windows["validation"]) if self.has_ridge else None

    @property
    def has_ridge(self) -> bool:
        return Ridge.is_affordable(self.windows["train"])

    @cached_property
    def best_metric(self) -> str:  # type: ignore[override]
        """RMSE for one series; MASE for several, whose units RMSE would mix."""
        return "validation/rmse" if len(self.series.names) == 1 else "validation/mase"

    def evaluate(self, model: Any, limit: int | None = None) -> Evaluated:
        count = None if limit is None else limit * self.config.training.batch_size
        measured = self.compared(model, "validation", count, simple=False)
        found, loss = measured.model, measured.loss
        metrics = f"RMSE {found.rmse:.4g}, MASE {found.mase:.3f}"
        return Evaluated(
            metrics={"validation/loss": loss, "validation/rmse": found.rmse, "validation/mase": found.mase},
            sentence=f"validation loss {loss:.4f}, {metrics}, of {measured.windows:,} windows",
            summary=(("validation", f"{metrics} of {measured.windows:,} windows ({self.baselines})"),),
            short=metrics,
        )

    def measure_split(self, model: Any, split: str, limit: int | None = None, predictions: int = 0) -> Measured:
        """The model beside simple methods, and each step of the horizon."""
        count = None if limit is None else limit * self.config.training.batch_size
        found = self.compared(model, split, count)
        of = f" of {found.of:,}" if found.windows < found.of else ""
        methods, horizon = found.errors, self.scaling.horizon
        rows = [("RMSE", *(f"{one.rmse:.4g}" for one in methods.values()))]
        rows.append(("MASE", *(f"{one.mase:.3f}" for one in methods.values())))
        if len(self.scaling.names) > 1:
            rows += [
                (f"{name}: {title}", *(f"{one.of_series[place][number]:.4g}" for one in methods.values()))
                for place, name in enumerate(self.scaling.names)
                for number, title in enumerate(("RMSE", "MASE"))
            ]
        for step in np.unique(np.linspace(1, horizon, MOST_STEPS).astype(int)):
            rows.append((f"RMSE, step {step}", *(f"{one.steps[step - 1]:.4g}" for one in methods.values())))
        return Measured(
            title=f"{split}: {found.windows:,} windows{of} of {self.about_windows}",
            headings=("", *methods),
            rows=tuple(rows),
            metrics=found.metrics | {"windows": float(found.windows)},
            whole=found.windows == found.of,
            notes=self.notes,
            predictions=tuple(self.shown(model, split, np.arange(min(predictions, found.of)))),
        )

    def predictor(self, model: Any) -> Predictor:
        return SeriesPredictor(model, self.scaling, self.config.dataset)

    def reading(self, model: Any, text: str, most: int) -> Reading:
        """The last values of a series, typed: all of the horizon has one answer."""
        scaling, network = self.scaling, model.network
        history = typed_history(text, scaling)
        batch = as_batch(scaling, history, None, network.config.get_dtype(), network.device)
        first = history[0, :: scaling.patch, 0].tolist()  # of each position
        places = ["gap" if math.isnan(value) else f"{value:.5g}" for value in first]
        several, cut = len(scaling.names) > 1, scaling.positions > most
        note = f"The first {most} of {scaling.positions} positions are drawn." if cut else ""

        def said(outputs: np.ndarray) -> list[str]:
            (found,) = scaling.forecasts(history, outputs[None])
            return [
                f"{step} ahead: {f'{name} ' if several else ''}{value:.5g}"
                for step, row in enumerate(found.tolist(), 1)
                for name, value in zip(scaling.names, row, strict=True)
            ]

        title = f"Forecast, in steps of {scaling.step}"
        return Reading(batch, ["the series"], places, str, said, title=title, note=note)

    @property
    def signature(self) -> Mapping[str, Any]:  # type: ignore[override]
        scaling = self.scaling

        def tensor(steps: int) -> list[dict[str, Any]]:
            shape = [-1, steps, len(scaling.names)]
            return [{"type": "tensor", "tensor-spec": {"dtype": "float64", "shape": shape}}]

        return {"inputs": tensor(scaling.history), "outputs": tensor(scaling.horizon), "params": []}

    def predictions(self, model: Any) -> list[str]:
        """The forecasts of some validation windows as one text."""
        windows = self.windows["validation"]
        numbers = np.unique(np.linspace(0, len(windows) - 1, SHOWN).astype(int))
        return ["\n".join(self.shown(model, "validation", numbers))]

    def shown(self, model: Any, split: str, numbers: np.ndarray) -> list[str]:
        """One line for each series of each window: the forecast of its last known target beside the true value."""
        windows, lines = self.windows[split], []
        history, future = windows.cut(numbers)
        found = forecasts_of(model, self.scaling, history)
        for row, first in enumerate(windows.first[numbers].tolist()):
            for place, name in enumerate(self.series.names):
                there = np.flatnonzero(np.isfinite(future[row, :, place]))
                if not len(there):
                    continue
                last = int(there[-1])
                missed = np.sqrt(np.mean((found[row, there, place] - future[row, there, place]) ** 2))
                lines.append(
                    f"{self.series.time_text(first + last)}, {last + 1} steps ahead: {name} "
                    f"{found[row, last, place]:.5g}, was {future[row, last, place]:.5g}; RMSE of all steps {missed:.3g}"
                )
        return lines

    def in_one_line(self, prediction: str) -> str:
        return prediction.partition("\n")[0]

    def final(self, model: Any, directory: Path) -> Final:
        """The errors on the test split, beside simple methods, and a picture of forecasts."""
        measured = self.compared(model, "test")
        found = measured.model
        beside = "; ".join(f"{name} {errors.rmse:.4g}" for name, errors in measured.errors.items() if name != MODEL)
        summary = (
            (
                "test",
                f"RMSE {found.rmse:.4g}, MASE {found.mase:.3f} of {measured.windows:,} windows of the test split",
            ),
            ("", f"RMSE of simple methods: {beside}"),
        )
        windows, path = self.windows["test"], directory / FORECASTS
        following = np.arange(len(windows))[:: self.scaling.horizon][-MOST_FORECASTS:]
        history, _ = windows.cut(following)
        title = f"{self.about_windows}\ntest split: RMSE {found.rmse:.4g}"
        drawn = draw_forecasts(
            self.series,
            windows.first[following],
            forecasts_of(model, self.scaling, history),
            measured.errors,
            path,
            title,
        )
        return Final(
            {f"test/{name}": value for name, value in measured.metrics.items()}, summary, (path,) if drawn else ()
        )

    def example(self, device: torch.device) -> EncoderBatch:
        """The first validation window."""
        windows = self.windows["validation"]
        return windows.batch(np.arange(1), windows.lengths[:1], device=device)

    def text(self, batch: AnyBatch, positions: int) -> str:
        """The first input at each position: a value relative to the last one."""
        assert isinstance(batch, EncoderBatch)
        return " ".join(f"{value:.2f}" for value in batch.inputs[0, :positions, 0].tolist())

    # Descriptions and files

    @property
    def about_windows(self) -> str:
        scaling = self.scaling
        return f"{', '.join(self.series.names)}: {scaling.history} -> {scaling.horizon} steps of {scaling.step}"

    @property
    def about(self) -> str:
        series = self.series
        parts = ", ".join(
            f"{len(self.windows[name]):,} for {'training' if name == 'train' else name} "
            f"({series.time_text(begin)} to {series.time_text(end - 1)})"
            for name, (begin, end) in self.bounds.items()
        )
        return f"{self.about_windows}; windows: {parts}"

    @cached_property
    def baselines(self) -> str:
        if not processes().is_first:  # only the first one reports them, and fitting takes seconds
            return ""
        windows = self.windows["validation"]
        history, future = windows.cut(np.arange(len(windows)))
        found = {name: errors_of(values, future, self.naive).rmse for name, values in self._simple(history).items()}
        return "baselines' RMSE: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items())

    @property
    def notes(self) -> tuple[str, ...]:
        learned = f"the network learns the difference to the forecast by {self.scaling.reference}"
        units = "RMSE over all series mixes their units; MASE, which chooses the best checkpoint, does not"
        mixed = () if len(self.series.names) == 1 else (units,)
        left_out = () if self.has_ridge else ("ridge regression is left out: with so many inputs it is slow",)
        return (*self.series.notes, learned, *mixed, *left_out)

    @property
    def profile(self) -> Mapping[str, int]:
        values = self.series.values
        return {
            "steps": len(values),
            "series": values.shape[1],
            "gaps": int(np.isnan(values).sum()),
            **{f"{name}_windows": len(windows) for name, windows in self.windows.items()},
        }

    @property
    def data_tags(self) -> Mapping[str, str]:
        return {
            name: str(value) for name, value in asdict(self.config.task).items() if value is not None and name != "name"
        }

    @property
    def source(self) -> tuple[str, str | None]:
        return self.config.dataset.name, self.config.dataset.path

    def save(self, directory: Path) -> None:
        """Write scaling.json."""
        (directory / SCALING).write_text(json.dumps(asdict(self.scaling), indent=1) + "\n", encoding="utf-8")
