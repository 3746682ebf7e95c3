"""task=forecasting: windows that never see the future, what they are measured by, and a run to its last command."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_tools import metric, newest, resume

from manual_backprop import convert, evaluate, generate, predict
from manual_backprop.checkpoints.checkpoint import load_checkpoint
from manual_backprop.common.batch import EncoderBatch
from manual_backprop.common.errors import CheckpointError, ConfigError, InputError, NotFiniteError
from manual_backprop.common.processes import Processes, acting_as
from manual_backprop.config.schema import RunConfig
from manual_backprop.config.task_rules import only_a_language_model_has_initial_weights
from manual_backprop.data.series.reader import read_series
from manual_backprop.data.series.windows import Scaling, Windows, filled, forecasts_of, seasonal_with_drift, windows_of
from manual_backprop.study.estimates.memory import estimate_memory
from manual_backprop.tasks import open_task, preview_task
from manual_backprop.tasks.forecasting import ForecastingTask
from manual_backprop.tasks.forecasting.baselines import Ridge, errors_of, naive_errors
from manual_backprop.trained_models.saved_model import load
from manual_backprop.trained_models.served import load_pyfunc
from manual_backprop.training.command_line import check
from manual_backprop.training.runner import run_job

STEPS, SEASON = 160, 12
SMALL = ("task=forecasting", "task.history=24", "task.horizon=6", "task.season=12", "task.patch=4", "model=tiny")
SMALL += ("model.d_model=16", "model.d_ffn=24", "model.n_blocks=1", "model.n_heads=2", "training=smoke")
SMALL += ("training.batch_size=16", "training.gradient_accumulation_steps=1", "training.max_steps=30", "tracking=none")
SMALL += ("training.eval_every=15", "training.save_every=15", "training.log_every=15", "training.keep_checkpoints=9")
SMALL += ("optimizer.learning_rate=3e-3", "device=cpu", "device.threads=1", "kernels.compile=never")


def table(steps: int = STEPS, seed: int = 0) -> np.ndarray:
    """Two series in other units: a trend and a season each, and noise. (steps, 2)"""
    time, random = np.arange(steps), np.random.default_rng(seed)
    wave = np.sin(2 * math.pi * time / SEASON)
    return np.stack([time / 20 + wave, 1000 * wave - time], 1) + random.normal(0, [0.1, 100], (steps, 2))


def write(path: Path, values: np.ndarray, gaps: tuple[int, ...] = ()) -> Path:
    months = [f"{2000 + step // 12}-{step % 12 + 1:02}" for step in range(len(values))]
    rows = [
        ",".join([month, *("" if step in gaps else f"{value:.6f}" for value in row)])
        for step, (month, row) in enumerate(zip(months, values.tolist(), strict=True))
    ]
    path.write_text("\n".join([",".join(["month", "a", "b"][: 1 + values.shape[1]]), *rows]) + "\n")
    return path


def config_of(path: Path, *overrides: str) -> RunConfig:
    return check([*SMALL, "dataset=series", f"dataset.path='{path}'", *overrides]).jobs[0].config


def opened(path: Path, *overrides: str) -> ForecastingTask:
    task = open_task(config_of(path, *overrides), path.parent)
    assert isinstance(task, ForecastingTask)
    return task


# Windows


def test_a_gap_is_filled_from_its_window_alone() -> None:
    nan = math.nan
    history = np.array([[nan, nan, 2, nan, nan, 5, 7, nan], [1, 2, 3, 4, 5, 6, 7, 8]])[..., None]
    assert filled(history)[..., 0].tolist() == [[2, 2, 2, 3, 4, 5, 7, 7], [1, 2, 3, 4, 5, 6, 7, 8]]


def test_windows_of_a_split_have_all_their_targets_in_it(tmp_path: Path) -> None:
    """No step is a target of two splits; a window that knows nothing, or nothing to forecast, is left out."""
    task = opened(write(tmp_path / "a.csv", table()))
    assert task.bounds == {"train": (0, 112), "validation": (112, 128), "test": (128, 160)}
    targets = {
        name: {int(step) + ahead for step in one.first for ahead in range(6)} for name, one in task.windows.items()
    }
    assert targets["train"] == set(range(24, 112))
    assert targets["validation"] == set(range(112, 128))
    assert targets["test"] == set(range(128, 160))
    values = np.full((12, 1), math.nan)
    values[[1, 8]] = 1
    assert windows_of(values, 3, 2, 0, 12).tolist() == []
    values[9] = 1
    assert windows_of(values, 3, 2, 0, 12).tolist() == [9]


def test_a_gap_is_marked_and_never_a_target(tmp_path: Path) -> None:
    task = opened(write(tmp_path / "a.csv", table(), gaps=(30, 31)))
    windows = task.windows["train"]
    assert windows.first[0] == 24
    batch = windows.batch(np.array([0, 10]), windows.lengths[:2])
    assert batch.inputs.shape == (2, 6, 2 * 4 * 2)
    targets = batch.targets.reshape(2, 6, 2)
    assert not targets[0].isnan().any()
    inputs = batch.inputs.reshape(2, 24, 4)
    assert inputs[0, :, 2:].sum() == 0
    assert inputs[1, :, 2].nonzero().flatten().tolist() == [20, 21]  # steps 30 and 31 of a window that begins at 10
    assert windows.lengths[[0, 2, 3]].tolist() == [13, 9, 9]
    other = windows.batch(np.array([2]), windows.lengths[:1]).targets.reshape(6, 2)
    assert other.isnan().any(1).tolist() == [False] * 4 + [True] * 2
    order, count = task.order(), 0
    for step in range(int(order.steps(1))):
        tokens, batches = order.batches(step)
        seen = list(batches)
        assert tokens == sum(int((~one.targets.isnan()).sum()) for one in seen)  # type: ignore[attr-defined]
        count += tokens
    assert count == int(windows.lengths.sum()) - len(windows)


def test_a_forecast_does_not_change_when_the_future_does(tmp_path: Path) -> None:
    """Nor do the scales, the ridge regression and what is read, when what comes after the training part does; and a
    forecast is a function of its window: of a gap at its end nothing is guessed from what comes after it."""
    values = table()
    one = opened(write(tmp_path / "a.csv", values, gaps=(133, 134, 135)))
    changed = values.copy()
    changed[136:] = 77 - 5 * changed[136:]
    two = opened(write(tmp_path / "b.csv", changed, gaps=(133, 134, 135)))
    assert one.scaling == two.scaling
    assert np.array_equal(one.naive, two.naive)
    model = one.build_model()
    windows = one.windows["test"].first
    number = int(np.flatnonzero(windows == 136)[0])  # whose history ends in the gap
    for task in (one, two):
        assert task.windows["test"].first[number] == 136
    batches = [task.windows["test"].batch(np.array([number]), np.array([13])) for task in (one, two)]
    assert torch.equal(batches[0].inputs, batches[1].inputs)
    assert not torch.equal(batches[0].targets, batches[1].targets)
    forecasts = [
        forecasts_of(model, task.scaling, task.windows["test"].cut(np.array([number]))[0]) for task in (one, two)
    ]
    assert np.array_equal(*forecasts)
    assert one.ridge is not None
    assert two.ridge is not None
    assert np.array_equal(one.ridge.weights, two.ridge.weights)
    earlier = opened(write(tmp_path / "c.csv", np.concatenate([values[:100] * 3, values[100:]]), gaps=(133, 134, 135)))
    again = earlier.windows["test"].cut(np.array([number]))[0]
    assert np.array_equal(forecasts_of(model, one.scaling, again), forecasts[0])


def test_what_is_learned_is_the_difference_to_the_best_simple_forecast() -> None:
    values = table(600, seed=1)[:, :1]
    scaling = Scaling.measured(values, 24, 6, SEASON, 1, ("a",), "1")
    history, future = values[None, :24], values[None, 24:30]
    assert scaling.reference == "smoothed seasonal with drift"
    wanted = values[12:18] + (values[21:24] - values[9:12]).mean()
    assert np.allclose(scaling.start(history)[0], wanted)
    assert np.allclose(scaling.forecasts(history, scaling.targets(history, future)), future)
    assert np.allclose(scaling.inputs(history)[0, :, 0], (values[:24, 0] - values[23, 0]) / scaling.scale)
    assert Scaling.measured(values, 24, 6, None, 1, ("a",), "1").reference == "persistence"
    long = seasonal_with_drift(np.arange(30.0)[None, :, None], 30, 12)
    assert np.allclose(long[0, :, 0], np.arange(30.0, 60.0))


def test_several_processes_forecast_a_part_of_the_windows_each(tmp_path: Path) -> None:
    """Together they make all of them; a process without a window makes none."""

    class OneOf(Processes):
        def __init__(self, rank: int, size: int):
            self.rank, self.size = rank, size

    task = opened(write(tmp_path / "a.csv", table(), gaps=(140,)), "precision=fp64")
    model, history = task.build_model(), task.windows["test"].cut(np.arange(5))[0]
    whole = task.forecasts(model, history)
    for size in (2, 3, 7):
        parts = []
        for rank in range(size):
            with acting_as(OneOf(rank, size)):
                parts.append(task.forecasts(model, history))
        for rank, part in enumerate(parts):
            assert np.flatnonzero(part.any(axis=(1, 2))).tolist() == list(range(rank, 5, size))
        assert np.allclose(sum(parts), whole, rtol=1e-12, atol=0)


def test_the_first_of_several_processes_fits_the_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others evaluate and report nothing."""
    second = Processes()
    second.rank, second.size = 1, 2
    fitted = []
    monkeypatch.setattr(Ridge, "__init__", lambda *given: fitted.append(given))
    monkeypatch.setattr(Ridge, "forecasts", lambda self, history: np.zeros((len(history), 6, 2)))
    first, other = (opened(write(tmp_path / "a.csv", table())) for _ in range(2))
    with acting_as(second):
        assert other.notes == first.notes
        assert other.evaluate(other.build_model()).short.startswith("RMSE")
        assert (other.baselines, fitted) == ("", [])
    assert first.baselines.startswith("baselines' RMSE: ridge ")
    assert len(fitted) == 1


# Measures


def test_errors_by_hand() -> None:
    truth = np.array([[[1.0], [math.nan]], [[3.0], [5.0]]])
    errors = errors_of(np.array([[[2.0], [9.0]], [[3.0], [3.0]]]), truth, np.array([2.0]))
    assert errors.rmse == math.sqrt(5 / 3)
    assert errors.mase == 1 / 2
    assert errors.steps.tolist() == [math.sqrt(1 / 2), 2]
    diverged = errors_of(np.full((2, 2, 1), math.nan), truth, np.array([2.0]))
    assert math.isnan(diverged.rmse)
    assert math.isnan(diverged.mase)
    assert naive_errors(np.array([[1.0], [4.0], [math.nan], [5.0]]), None) == 3
    assert naive_errors(np.array([[1.0], [4.0], [1.0], [4.0]]), 2) == 3  # which repeats itself exactly
    assert naive_errors(np.array([[1.0], [4.0], [math.nan], [5.0]]), 2) == 1


def test_ridge_is_ridge(tmp_path: Path) -> None:
    """The normal equations, solved by another way, and the penalty that does best on the validation part."""
    task = opened(write(tmp_path / "a.csv", table()))
    training, ridge = task.windows["train"], task.ridge
    assert ridge is not None
    history, future = training.cut(np.arange(len(training)))
    x, y = task.scaling.inputs(history).reshape(len(training), -1), task.scaling.targets(history, future)
    x, y = x - x.mean(0), y - y.mean(0)
    padded = np.concatenate([x, math.sqrt(ridge.penalty) * np.eye(x.shape[1])])
    wanted = np.linalg.lstsq(padded, np.concatenate([y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]
    assert np.allclose(ridge.weights, wanted, atol=1e-8)
    gaps = opened(write(tmp_path / "b.csv", table(), gaps=(40, 41, 90)))
    assert gaps.ridge is not None
    assert np.isfinite(gaps.ridge.weights).all()
    assert not Ridge.is_affordable(
        Windows(
            np.zeros((9000, 90)),
            Scaling(999, 99, None, 1, ("x",) * 90, "1", "persistence", (1.0,), (1.0,)),
            0,
            9000,
            torch.float32,
        )
    )


def test_the_simple_methods_on_the_co2_that_comes_with_the_package() -> None:
    """Measured before, on the last fifth: persistence 3.22, seasonal 1.87, seasonal with drift 0.856, ridge 0.567."""
    task = open_task(check(["task=forecasting", "tracking=none"]).jobs[0].config, Path())
    assert isinstance(task, ForecastingTask)
    errors = task.compared(task.build_model(), "test").errors
    found = {name: round(one.rmse, 3) for name, one in errors.items() if name != "model"}
    assert found["persistence"] == 3.223
    assert found["seasonal"] == 1.873
    assert found["seasonal with drift"] == 0.856
    assert 0.54 < found["ridge"] < 0.58
    assert "59 of 2,284 steps have a gap" in task.notes[0]


# A run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forecasting")
    run_job(config_of(write(root / "series.csv", table(), gaps=(50, 51, 140)), "training.inspect_every=30"), root)
    return newest(root)


@pytest.fixture
def in_its_folder(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(finished.parents[2])
    return finished


def test_a_run(finished: Path) -> None:
    """It beats what it corrects, its best checkpoint is that of the lowest MASE, and it leaves its picture."""
    losses = metric(finished, "validation/loss")
    assert losses[-1] < losses[0]
    errors = metric(finished, "validation/mase")
    for step, error in zip((15, 30), errors, strict=True):
        assert load_checkpoint(finished / f"checkpoints/step-{step:06}").metric == error
    assert load_checkpoint(finished / "checkpoints/step-000030").metric_name == "validation/mase"
    assert metric(finished, "test/rmse")[0] < metric(finished, "test/persistence_rmse")[0]
    assert len([name for name in load_log(finished).training if name.startswith("test/rmse_of_step_")]) == 6
    for picture in ("forecasts.png", "training_progress.png", "inspection/histograms.png", "inspection/attention.png"):
        assert (finished / picture).stat().st_size > 5000, picture
    log = (finished / "run.log").read_text()
    assert "month, 24 -> 6" not in log
    for words in (
        "a, b: 24 -> 6 steps of 1 month",
        "3 of 160 steps have a gap",
        "baselines' RMSE: ridge",
        "6 steps ahead: a ",
    ):
        assert words in log
    state = load_checkpoint(finished / "checkpoints/step-000030")
    assert Scaling.of_checkpoint(state.path) == opened(finished.parents[2] / "series.csv").scaling


def load_log(run: Path) -> Any:
    from manual_backprop.tracking import load_training_log

    return load_training_log(run)


def test_it_goes_on_with_no_other_series(in_its_folder: Path) -> None:
    root = in_its_folder.parents[2]
    series = root / "series.csv"
    before = series.read_text()
    series.write_text(before.replace("\n2001-01,", "\n2001-01,1"))
    try:
        with pytest.raises(ConfigError, match=r"the series, its windows or its splits differ from those of"):
            resume(root, f"resume={in_its_folder}", "training.max_steps=32")
        with pytest.raises(
            InputError, match=r"series\.csv is not what this model was trained on: the dataset's digest"
        ):
            evaluate.main([f"{in_its_folder}"])
    finally:
        series.write_text(before)


def test_evaluate(in_its_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([f"{in_its_folder}", "--split", "test", "--predictions", "2"]) is None
    printed = capsys.readouterr().out
    assert "test: 27 windows of a, b: 24 -> 6 steps of 1 month" in printed
    assert re.search(r"model +ridge .* seasonal +persistence", printed)
    for row in ("MASE", "b: RMSE", "RMSE, step 6"):
        assert re.search(rf"^ *{row} ", printed, re.MULTILINE)
    assert printed.count("steps ahead") == 4
    assert "evaluation/test_" in printed
    evaluate.main([f"{in_its_folder}", "--max-batches", "1"])
    assert "validation: 11 windows" in capsys.readouterr().out
    with pytest.raises(InputError, match="network=encoder cannot be exported: transformers has no encoder"):
        convert.main(["to-hf", f"{in_its_folder}", "exported"])
    with pytest.raises(InputError, match=r"use it with python -m manual_backprop\.predict .* --file"):
        generate.main([f"{in_its_folder}", "--prompt", "warmer"])
    with pytest.raises(InputError, match="--tokens: is not available for task=forecasting"):
        evaluate.main([f"{in_its_folder}", "--tokens", "2"])


def test_predict_goes_on_after_the_end(in_its_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the series that it was trained on; the same numbers as MLflow's model gives."""
    values = table()[100:130]
    path = write(tmp_path / "new.csv", values, gaps=(7,))
    moved = in_its_folder.parents[2] / "series.csv"
    moved = moved.rename(moved.with_name("gone.csv"))
    try:
        predict.main([str(in_its_folder), "--file", str(path)])
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        served = load_pyfunc(str(load(str(in_its_folder)).found.checkpoint))
    finally:
        moved.rename(moved.with_name("series.csv"))
    assert [line["time"] for line in lines] == ["2002-07", "2002-08", "2002-09", "2002-10", "2002-11", "2002-12"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    found = np.array([[line["forecast"]["a"], line["forecast"]["b"]] for line in lines])
    assert np.abs(found[:, 0] - table(136)[130:, 0]).max() < 3
    history = read_series(path).values[None, -24:]
    assert np.array_equal(served.predict(history)[0], found)
    with pytest.raises(InputError, match=r"windows of shape \(1, 23, 2\): expected \(windows, 24, 2\)"):
        served.predict(history[:, 1:])
    with pytest.raises(InputError, match="a window without a value"):
        served.predict(np.full((1, 24, 2), math.nan))
    for wrong, params, why in (
        ("warmer", {}, r"expected numbers, \(windows, 24, series\)"),
        ([[[1.0, 2.0]], []], {}, r"expected numbers, \(windows, 24, series\)"),
        (np.where(history < 0, math.inf, history), {}, "a value is infinite; give NaN where a value is missing"),
        (history, {"horizon": 3}, "there is no parameter 'horizon': a window has one forecast"),
    ):
        with pytest.raises(InputError, match=why):
            served.predict(wrong, params)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "month,a,b\n2000-01,1,2\n2000-02,1,2\n",
            "has 2 steps, but this model reads the last 24; give at least as many",
        ),
        ("month,a\n2000-01,1\n", "has no column 'b'; it has month, a; this model needs that column"),
        (
            "month,a,b\n2000-01,1,2\n2000-02,1,mild\n",
            "line 3: b is 'mild', not a finite number; leave a cell empty for a gap",
        ),
        (
            "day,a,b\n2000-01-01,1,2\n2000-01-02,1,3\n",
            "its steps are 1 day, but this model was trained on steps of 1 month",
        ),
        ("", "is empty"),
        (
            "month,a,b\n"
            + "".join(f"{year}-{month:02},{month},2\n" for year in (9998, 9999) for month in range(1, 13)),
            "ends at 9999-12, so step 1 after its end is beyond the year 9999",
        ),
        (
            "month,a,b\n"
            + "".join(f"2000-{month:02},{1 if month < 3 else ''},2\n" for month in range(1, 13))
            + "".join(f"200{year}-{month:02},,{month}\n" for year in (1, 2, 3) for month in range(1, 13)),
            "a has no value in its last 24 steps, which this model reads",
        ),
    ],
)
def test_predict_says_what_is_wrong_with_a_file(in_its_folder: Path, tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "new.csv").write_text(text)
    with pytest.raises(InputError) as caught:
        predict.main([str(in_its_folder), "--file", str(tmp_path / "new.csv")])
    assert "new.csv" in str(caught.value)
    assert why in str(caught.value)
    with pytest.raises(InputError, match="a forecast needs a series; give a CSV file with its last 24 steps"):
        predict.main([str(in_its_folder), "--text", "warmer"])


def test_a_forecast_that_is_no_number_is_refused(in_its_folder: Path, tmp_path: Path) -> None:
    """JSON has no NaN."""
    values = table()[:24]
    values[20] = 1e300
    with pytest.raises(NotFiniteError, match="The forecast is not finite: a value is too large for the model"):
        predict.main([str(in_its_folder), "--file", str(write(tmp_path / "new.csv", values))])


def test_a_series_that_is_typed_is_looked_at(in_its_folder: Path) -> None:
    """Where every head looks, and the forecast of all of it: that of `predict`."""
    from manual_backprop.trained_models.saved_model import find
    from manual_backprop.visualizer.model_view import look

    saved = load(str(in_its_folder))
    values = np.concatenate([[[9.0, 9.0]], table()[100:124]])
    values[5] = math.nan
    typed = [",".join(f"{value!r}" for value in row) for row in values.tolist()]
    seen = look(find(str(in_its_folder)), " ".join(typed).replace("nan,nan", "nan"))
    assert (seen.tokens, seen.title) == (["the␣series"], "Forecast, in steps of 1 month")
    scaling = opened(in_its_folder.parents[2] / "series.csv").scaling
    (found,) = forecasts_of(saved.model, scaling, values[None, 1:])
    assert seen.next == [
        [
            (f"{step}␣ahead:␣{name}␣{value:.5g}", None)
            for step, row in enumerate(found.tolist(), 1)
            for name, value in zip("ab", row, strict=True)
        ]
    ]
    (attention,) = seen.maps.values()
    assert attention.heads.shape == (2, 6, 6)
    assert (
        attention.rows
        == attention.columns
        == [f"{value:.5g}" if value == value else "gap" for value in values[1::4, 0]]
    )
    for text, why in (
        (
            "warmer",
            r"a series of 1 steps: this model reads 24; give the last 24 steps of a, b, as in 1.5,20 1.5,20 nan",
        ),
        ("1,2 " * 23 + "3", r"step 24, '3': has 1 values, and this model reads 2 in each step"),
        ("1,2 " * 23 + "3,mild", r"step 24, '3,mild': 'mild' is not a finite number; write nan for a gap"),
        ("nan " * 24, "a series without a value in its last 24 steps"),
    ):
        with pytest.raises(InputError, match=why):
            look(find(str(in_its_folder)), text)


def test_a_checkpoint_without_its_scaling(in_its_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"scaling\.json cannot be read"):
        Scaling.of_checkpoint(tmp_path)
    (tmp_path / "scaling.json").write_text('{"history": 3}')
    with pytest.raises(CheckpointError, match=r"scaling\.json is damaged"):
        Scaling.of_checkpoint(tmp_path)


# What does not fit


@pytest.mark.parametrize(
    ("overrides", "whys"),
    [
        (
            (
                *("tokenizer=byte", "batching=packed", "network=decoder", "model.vocab_size=99"),
                *("training.label_smoothing=0.1", "dataset.validation=null", "dataset.subset_size=99"),
                *("task.history=30", "model.max_seq_len=5", "dataset.value_columns=a"),
            ),
            (
                "tokenizer=byte: task=forecasting reads no text; leave tokenizer out",
                "batching=packed: task=forecasting never packs several examples",
                "network=decoder: task=forecasting needs network=encoder",
                "model.vocab_size=99: task=forecasting reads numbers, not tokens; leave it null",
                "training.label_smoothing=0.1: the squared error of task=forecasting has no labels",
                "dataset.validation=null: for a series this is a share of its steps",
                "dataset.subset_size=99: a series is always used as a whole",
                "task.patch=4: must divide task.history=30, .* use task.history=28 or 32",
                "dataset.value_columns=a: must be a list of nonempty texts, .*, or null",
            ),
        ),
        (
            ("task.history=12", "model.max_seq_len=2", "dataset.test_share=0.9"),
            (
                "task.season=12: must be less than task.history=12, .* use task.history=16 at least",
                "model.max_seq_len=2: task.history=12 takes 3 positions of task.patch=4 steps; use model.max_seq_len=3",
                "dataset.test_share=0.9: with dataset.validation=0.1 nothing is left to train on",
            ),
        ),
        (("dataset=text",), ("dataset=text: task=forecasting learns from series, co2; use dataset=series",)),
        (("task=sort",), ("task.history=24: only task=forecasting has this key",)),
    ],
)
def test_a_config_that_does_not_fit(tmp_path: Path, overrides: tuple[str, ...], whys: tuple[str, ...]) -> None:
    """One report of everything, with the key, the value, the rule and a way out."""
    chosen = {override.partition("=")[0] for override in overrides}
    usual = [one for one in SMALL if one.partition("=")[0] not in chosen]
    data = ["dataset=series", f"dataset.path={tmp_path}"] if not chosen & {"dataset", "task"} else []
    path = [f"dataset.path={tmp_path}"] * ("dataset" in chosen)
    with pytest.raises(ConfigError) as caught:
        check([*usual, *data, *path, *overrides])
    for why in whys:
        assert any(re.search(why, one) for one in caught.value.violations), caught.value.violations


def test_other_tasks_refuse_a_series_and_this_one_a_model_of_texts() -> None:
    (violation,) = only_a_language_model_has_initial_weights("forecasting", "last")
    assert "init_from=last: starts from a language" in violation
    with pytest.raises(ConfigError, match=r"dataset=co2: task=language_model learns from .*, or use task=forecasting"):
        check(["dataset=co2"])


def test_a_series_that_cannot_be_learned(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"a\.csv: 40 steps are too few: 28 for training, 4 for validation, 8 for test; a "
    ):
        opened(write(tmp_path / "a.csv", table(40)))
    with pytest.raises(InputError, match=r"b changes by more than 1e\+150, of which there is no mean square"):
        opened(write(tmp_path / "a.csv", table() * [1, 1e300]))
    flat = table()
    flat[:120, 1] = 5
    with pytest.raises(
        InputError, match="b does not change in the 112 steps of the training split: there is nothing to le"
    ):
        opened(write(tmp_path / "a.csv", flat))
    one = opened(write(tmp_path / "a.csv", flat), "dataset.value_columns=[a]")
    assert one.best_metric == "validation/rmse"
    with pytest.raises(InputError, match="no window of the training split has a value of each series in its history"):
        opened(write(tmp_path / "a.csv", table(), gaps=tuple(range(112))))
    with pytest.raises(InputError, match=r"a\.csv: no window of the test split has a value of each series in its"):
        opened(write(tmp_path / "a.csv", table(), gaps=tuple(range(128, 160)))).check()


def test_what_is_known_before_a_run(tmp_path: Path) -> None:
    config = config_of(write(tmp_path / "a.csv", table()))
    preview = preview_task(config, tmp_path)
    network = preview.network_config
    assert (network.n_inputs, network.n_outputs, network.head_loss) == (16, 12, "squared_error")
    assert preview.step == "about 166 values: 16 windows of 24 -> 6 steps"
    assert "83 for training (2000-01 to 2009-04)" in preview.examples[1]
    assert estimate_memory(config, network).working > 10_000
    batch = opened(tmp_path / "a.csv").example(torch.device("cpu"))
    assert isinstance(batch, EncoderBatch)
    assert batch.inputs.shape == (1, 6, 16)
