"""Curves show what was logged: every point once and in its place, and reduction loses no spike."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from logged_runs import RATE, by_legend, log_of, write_run

from manual_backprop.common.errors import InputError
from manual_backprop.tracking import LogReader, TrainingLogger, load_training_log
from manual_backprop.visualizer import (
    create_loss_curves,
    create_lr_schedule_plot,
    create_metric_plot,
    create_throughput_plot,
    create_validation_curves,
)
from manual_backprop.visualizer.series import AXES, Smoothing, View, points_of, reduced


def values(figure: object, about: str) -> list[tuple[float, float]]:
    """The points of all traces whose hover text says `about`."""
    traces = [one for one in figure.data if one.hovertemplate and f"<br>{about} " in one.hovertemplate]  # type: ignore[attr-defined]
    return [pair for one in traces for pair in zip(one.x.tolist(), one.y.tolist(), strict=True)]


# Where points lie


def test_a_validation_point_where_no_training_row_has_its_step(tmp_path: Path) -> None:
    """Rows at 10, 20, 30; evaluations at 15, 25 and 35: all three are drawn, on every axis, in proportion."""
    log = log_of(tmp_path, validation={15: 4.5, 25: 3.5, 35: 2.5})
    for axis, places in (
        ("step", [15, 25, 35]),
        ("flops", [15 * RATE, 25 * RATE, 35 * RATE]),
        ("tokens", [1500, 2500, 3500]),
    ):
        figure = create_loss_curves({"a": log}, x=axis)
        assert values(figure, "validation loss") == [(x, y) for x, y in zip(places, (4.5, 3.5, 2.5), strict=True)], axis


def test_compute_is_what_was_logged_and_no_number_of_rows(tmp_path: Path) -> None:
    """Runs that logged at different intervals have the same compute; a run without logged compute is named."""
    often, seldom = log_of(tmp_path, losses=[5.0] * 40, every=1), log_of(tmp_path, losses=[5.0] * 4, every=10)
    assert [points_of(log, "train/loss", "flops").x[-1] for log in (often, seldom)] == [40 * RATE, 40 * RATE]
    figure = create_loss_curves({"with": often, "without": log_of(tmp_path, rate=None)}, x="flops")
    assert {trace.name for trace in figure.data} == {"with"}
    assert "without: no FLOPs logged" in figure.layout.annotations[0].text


def test_past_the_last_row_nothing_is_guessed(tmp_path: Path) -> None:
    """If steps differ in compute, later steps are unknown."""
    logger = TrainingLogger(tmp_path)
    for step, flops in ((1, 10.0), (2, 40.0), (3, 50.0)):
        logger.log_step(step, {"train/loss": 3.0, "flops": flops})
    logger.log_validation(2, {"loss": 2.0})
    logger.log_validation(4, {"loss": 1.0})
    assert points_of(load_training_log(tmp_path), "validation/loss", "flops").x.tolist() == [40.0]


def test_every_axis(tmp_path: Path) -> None:
    log = log_of(tmp_path, config={"training": {"max_steps": 60}}, status="KILLED", tags={"train_tokens": "1000"})
    for axis in AXES:
        points = points_of(log, "train/loss", axis)
        assert len(points.x) == 3, axis
        assert (np.diff(points.x) >= 0).all()
    assert points_of(log, "train/loss", "relative").x.tolist() == [10 / 60, 20 / 60, 30 / 60]
    assert points_of(log, "train/loss", "epochs").x.tolist() == [1.0, 2.0, 3.0]


def test_seconds_leave_out_the_time_between_an_end_and_a_resume(tmp_path: Path) -> None:
    resume = {"at": "2026-01-01T01:00:00+00:00", "step": 2, "changed": {}}
    path = write_run(tmp_path, losses=[], created_at="2026-01-01T00:00:00+00:00", resumes=[resume])
    start = 1767225600000
    rows = [(1, 10), (2, 20), (3, 3605), (4, 3615)]  # step, second
    entries = [{"step": step, "time_ms": start + 1000 * at, "metrics": {"train/loss": 1.0}} for step, at in rows]
    header = {"format": "manual_backprop.metrics", "version": 1}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *entries]))
    log = load_training_log(path)
    assert points_of(log, "train/loss", "seconds").x.tolist() == [10.0, 20.0, 25.0, 35.0]
    assert log.resumes == (2,)


def test_an_axis_that_is_none() -> None:
    with pytest.raises(InputError, match="x='tokns': expected one of step, relative, tokens"):
        create_loss_curves({}, x="tokns")


# What went wrong in a run


def test_a_resume_makes_no_zigzag(tmp_path: Path) -> None:
    """A run has rows for every step up to 9, and was resumed after 4 with rows for every other step: steps 5, 7 and 9
    of the first attempt are dropped."""
    logger = TrainingLogger(tmp_path)
    for step in range(1, 10):
        logger.log_step(step, {"train/loss": float(step)})
        logger.log_validation(step, {"loss": float(step)})
    logger.finish()
    logger = TrainingLogger(tmp_path)
    for step in (6, 8, 10):
        logger.log_step(step, {"train/loss": 10.0 * step})
    log = load_training_log(tmp_path)
    assert points_of(log, "train/loss").steps.tolist() == [1, 2, 3, 4, 5, 6, 8, 10]
    assert points_of(log, "train/loss").y.tolist() == [1, 2, 3, 4, 5, 60, 80, 100]
    assert points_of(log, "validation/loss").steps.tolist() == [1, 2, 3, 4, 5]
    (mark,) = (trace for trace in create_loss_curves({"a": log}).data if trace.mode == "markers")
    assert list(mark.text) == ["resumed after step 5"]
    assert list(mark.x) == [6]


def test_an_old_checkpoint_that_is_measured_again_drops_nothing(tmp_path: Path) -> None:
    logger = TrainingLogger(tmp_path)
    for step in (1, 2, 3):
        logger.log_step(step, {"train/loss": float(step)})
    for step in (3, 1):
        logger.log_step(step, {"evaluation/validation_loss": 1.0})
    log = load_training_log(tmp_path)
    assert log.superseded == {}
    assert log.resumes == ()
    assert points_of(log, "evaluation/validation_loss").steps.tolist() == [1, 3]


def test_what_is_not_finite_and_what_was_skipped_is_marked(tmp_path: Path) -> None:
    logger = TrainingLogger(tmp_path)
    for step, (loss, skipped) in enumerate([(3.0, 0), (math.nan, 0), (math.nan, 2), (2.0, 2), (math.inf, 3)], start=1):
        logger.log_step(step, {"train/loss": loss, "nonfinite_steps": skipped})
    figure = create_loss_curves({"a": load_training_log(tmp_path)})
    assert values(figure, "training loss") == [(1.0, 3.0), (4.0, 2.0)]
    (mark,) = (trace for trace in figure.data if trace.mode == "markers")
    assert [*mark.text] == [
        "train/loss is NaN: step 2 to 3 (2 rows)",
        "train/loss is infinite: step 5",
        "2 skipped, not finite, up to step 3",
        "1 skipped, not finite, up to step 5",
    ]
    assert mark.yaxis == "y9"
    assert [*figure.layout.yaxis9.range] == [0, 1]


@pytest.mark.parametrize("losses", [[], [3.0], [math.nan, math.nan]], ids=["no point", "one point", "NaN alone"])
def test_a_run_with_hardly_anything(losses: list[float], tmp_path: Path) -> None:
    log = log_of(tmp_path, losses=losses, validation={})
    for create in (create_loss_curves, create_validation_curves, create_lr_schedule_plot, create_throughput_plot):
        for axis in AXES:
            json.loads(create({"a": log, "b": log}, x=axis, log_x=True, log_y=True, smoothing=5).to_json())
    figure = create_loss_curves({"a": log})
    drawn = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len(drawn) == (losses == [3.0])


def test_a_broken_line_costs_itself_alone(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (path / "metrics.jsonl").write_bytes(
        b"".join([*lines[:2], b'{"step": 15, "time_\xff\n', *lines[2:], b'{"step": 40, "ti'])
    )
    log = load_training_log(path)
    assert log.damaged_lines == 1
    assert points_of(log, "train/loss").steps.tolist() == [10, 20, 30]


# Following a run


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = TrainingLogger(tmp_path)
    logger.log_step(1, {"train/loss": 5.0})
    reader = LogReader(tmp_path)
    first = reader.read()
    assert reader.read() is first, "nothing has come"
    assert points_of(first, "train/loss").y.tolist() == [5.0]
    position = reader.position
    logger.log_step(2, {"train/loss": 4.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "time_ms": 0, ')  # a line that is being written
    started = []
    from manual_backprop.tracking import training_log

    read_entries = training_log.read_entries
    monkeypatch.setattr(
        training_log, "read_entries", lambda file, start, bad: started.append(start) or read_entries(file, start, bad)
    )
    assert points_of(reader.read(), "train/loss").y.tolist() == [5.0, 4.0]
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'"metrics": {"train/loss": 3.0}}\n')
    assert points_of(reader.read(), "train/loss").y.tolist() == [5.0, 4.0, 3.0]
    assert started[0] == position > 0


def test_a_file_that_a_resume_has_cut_is_read_again(tmp_path: Path) -> None:
    logger = TrainingLogger(tmp_path)
    logger.log_step(1, {"train/loss": 5.0})
    kept = logger.sync()
    for step in (2, 3):
        logger.log_step(step, {"train/loss": 4.0})
    reader = LogReader(tmp_path)
    assert len(points_of(reader.read(), "train/loss").y) == 3
    logger.finish()
    logger = TrainingLogger(tmp_path, keep=kept)
    for step in (2, 3, 4, 5):  # longer than before
        logger.log_step(step, {"train/loss": 2.0})
    assert points_of(reader.read(), "train/loss").y.tolist() == [5.0, 2.0, 2.0, 2.0, 2.0]


# Smoothing and reducing


def test_smoothing_starts_at_the_first_value_bends_no_end_and_does_not_change_as_the_run_grows() -> None:
    assert Smoothing(50).of(np.full(100, 3.0)) == pytest.approx(np.full(100, 3.0), rel=1e-12)
    noise = np.random.default_rng(0).normal(5, 1, 400)
    all_at_once, growing = Smoothing(30), Smoothing(30)
    whole = all_at_once.of(noise)
    for count in (1, 7, 250):
        assert growing.of(noise[:count]).tolist() == whole[:count].tolist(), "of the same points"
    assert whole[0] == noise[0]
    decay = 1 - 2 / 31
    weights = decay ** np.arange(400)[::-1]
    assert whole[-1] == pytest.approx((weights * noise).sum() / weights.sum(), rel=1e-12)
    holes = np.array([1.0, math.nan, 1.0, math.inf, 1.0])
    assert Smoothing(10).of(holes)[[0, 2, 4]].tolist() == [1.0, 1.0, 1.0]


def test_smoothing_is_made_of_all_points_and_the_raw_curve_stays(tmp_path: Path) -> None:
    losses = np.random.default_rng(1).normal(5, 1, 5000)
    log = log_of(tmp_path, losses=losses.tolist(), every=1, validation={})
    figure = create_loss_curves({"a": log}, smoothing=100)
    raw, smooth = (trace for trace in figure.data if trace.mode == "lines")
    assert "smoothed over 100" in smooth.hovertemplate
    assert raw.opacity < smooth.opacity
    expected = Smoothing(100).of(losses)
    steps = smooth.customdata[:, 0].astype(int)
    assert smooth.y.tolist() == expected[steps - 1].tolist()
    assert len(create_loss_curves({"a": log}).data) == 1, "off unless it is asked for"


def test_a_spike_of_one_step_stays_and_all_points_come_when_one_zooms_in(tmp_path: Path) -> None:
    losses = [3.0 + 1e-6 * (step % 7) for step in range(20_000)]
    losses[12_344], losses[5_000] = 50.0, 0.5
    log = log_of(tmp_path, losses=losses, every=1, validation={})
    (line,) = create_loss_curves({"a": log}).data
    assert len(line.x) <= 2 * 600 + 2
    assert (12_345, 50.0) in zip(line.x.tolist(), line.y.tolist(), strict=True)
    assert (5_001, 0.5) in zip(line.x.tolist(), line.y.tolist(), strict=True)
    assert [line.x[0], line.x[-1]] == [1, 20_000]
    (near,) = create_loss_curves({"a": log}, low=12_000, high=12_700).data
    assert near.x.tolist() == [*range(11_999, 12_702)], "all of them, and one more at either side"
    logarithmic = reduced(points_of(log, "train/loss"), View(log_x=True))
    assert 50.0 in logarithmic.y
    assert logarithmic.x[:3].tolist() == [1, 2, 3], "where a logarithmic axis has room"


# What figures are made of


def test_loss_and_perplexity_have_one_range(tmp_path: Path) -> None:
    """The second axis matches the first, and its labels are exp(loss)."""
    logger = TrainingLogger(tmp_path)
    for step, loss in ((1, 6.0), (2, 4.5), (3, 3.2)):
        logger.log_validation(step, {"loss": loss, "perplexity": math.exp(loss)})
    figure = create_validation_curves({"a": load_training_log(tmp_path)})
    second = figure.layout.yaxis2
    assert (second.matches, second.side, second.overlaying) == ("y", "right", "y")
    assert len(second.tickvals) >= 3
    for place, text in zip(second.tickvals, second.ticktext, strict=True):
        assert math.exp(place) == pytest.approx(float(text.replace(",", "")), rel=1e-6)
    (line,) = (trace for trace in figure.data if trace.showlegend)
    assert line.customdata[:, 1] == pytest.approx(np.exp(line.y))


def test_nothing_is_drawn_twice(tmp_path: Path) -> None:
    log = log_of(tmp_path, validation={10: 4.0, 20: 3.5, 30: 3.0})
    for figure in (
        create_loss_curves({"a": log}),
        create_validation_curves({"a": log}),
        create_lr_schedule_plot({"a": log}),
    ):
        lines = [(*trace.x, *trace.y) for trace in figure.data if len(trace.x) > 1]
        assert len(lines) == len({*lines})
        assert len([trace for trace in figure.data if trace.showlegend]) == 1


def test_four_are_drawn_in_full_and_the_others_faintly(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    figure = create_lr_schedule_plot({str(number): log for number in range(6)})
    assert [trace.opacity < 1 for trace in by_legend(figure).values()] == [False] * 4 + [True] * 2
    more = create_lr_schedule_plot({str(number): log for number in range(6)}, strong=6)
    assert {trace.opacity for trace in more.data} == {1}


NAMES = ["<script>alert(1)</script>", "$x^2$ and %{y}", "a" * 300, "<b>bold</b> & co", ""]


def test_names_are_text(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    figure = create_loss_curves(dict.fromkeys(NAMES, log))
    assert len(by_legend(figure)) == len(NAMES)
    for trace in by_legend(figure).values():
        assert not {*"<>$%"} & {*trace.name}, trace.name
        assert len(trace.name) < 100
        assert "%{y:" in trace.hovertemplate
        assert "%{y}" not in trace.hovertemplate
    assert len({trace.legendgroup for trace in figure.data}) == len(NAMES)


def test_a_metric_that_nobody_has(tmp_path: Path) -> None:
    assert create_metric_plot({"a": log_of(tmp_path)}, "tokens_seen").data[0].y.tolist() == [1000, 2000, 3000]
    with pytest.raises(InputError, match="chrf: no run has logged it; there are: flops, learning_rate, tokens_seen"):
        create_metric_plot({"a": log_of(tmp_path)}, "chrf")
