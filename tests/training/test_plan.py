"""plan=true prints what a run would do and the sources of its values; it writes nothing; its memory estimate is
close."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_tools import ROOT, command
from run_tools import config_of, metric, newest, train
from torch import Tensor

from manual_backprop.common.errors import InputError
from manual_backprop.common.origin import SOURCES
from manual_backprop.config.schema import RunConfig
from manual_backprop.data.tokens.text_size import bytes_per_token, text_size
from manual_backprop.kernels import pieces
from manual_backprop.kernels.cpu import attention, compiled, loss, products
from manual_backprop.models.network import parameter_shapes
from manual_backprop.study.estimates import time as time_estimate
from manual_backprop.study.estimates.memory import (
    MemoryEstimate,
    checkpoint_bytes,
    estimate_memory,
    memory_of,
    too_large,
)
from manual_backprop.study.estimates.time import Speed, measure_speed
from manual_backprop.tasks import Preview, preview_task
from manual_backprop.training import plan
from manual_backprop.training.command_line import Job, check
from manual_backprop.training.plan import Planner, duration, plan_page, print_plans
from manual_backprop.training.value_sources import value_sources

MB = 10**6


def sources_of(*overrides: str) -> dict[str, str]:
    (job,) = check(overrides).jobs
    return value_sources(job.config, job.overrides, job.runtime, Path("outputs"))


# Where values come from


def test_the_source_of_each_kind_of_value() -> None:
    sources = sources_of("model=tiny", "experiments=overfit_one_batch", "seed=4", "tags.note=x")
    assert sources["model.d_model"] == "model=tiny"
    assert sources["training.batch_size"] == "experiments=overfit_one_batch"
    assert sources["schedule.name"] == "schedule=constant, chosen by experiments=overfit_one_batch"
    assert sources["dataset.name"] == "default (dataset=python_docs)"
    assert sources["seed"] == sources["tags.note"] == "command line"
    assert sources["experiment_name"] == "default"


def test_a_value_that_another_key_gives_is_followed() -> None:
    learning_rate = "default (optimizer=adamw): ${model.learning_rate}, from "
    assert sources_of()["optimizer.learning_rate"] == learning_rate + "default (model=small)"
    assert sources_of("model.learning_rate=1e-4")["optimizer.learning_rate"] == learning_rate + "command line"
    assert sources_of("optimizer.learning_rate=1e-4")["optimizer.learning_rate"] == "command line"
    sources = sources_of("model=tiny", "model.d_ffn=${model.d_model}")
    assert sources["model.d_ffn"] == "command line: ${model.d_model}, from model=tiny"


def test_what_an_experiment_sweeps_comes_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = check(["experiments=manual_vs_autograd", "seed=3"]).jobs
    (first, *_) = [value_sources(job.config, job.overrides, job.runtime) for job in jobs]
    assert first["implementation.name"] == "implementation=custom, swept by experiments=manual_vs_autograd"
    assert first["seed"] == "command line"


@pytest.mark.slow
def test_a_run_keeps_the_sources_and_hands_them_on(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run has the sources of its start, except for keys on its own command line."""
    monkeypatch.chdir(tmp_path)
    small = [*RUN, f"dataset.path='{text}'", "training.max_steps=2"]
    done = command(*small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = newest(tmp_path)
    kept = json.loads((run / SOURCES).read_text())
    assert kept["training.max_steps"] == kept["dataset.path"] == "command line"
    assert kept["model.d_model"] == "model=tiny"
    assert SOURCES in (run / "tracking.json").read_text(), "it is among the artifacts"
    later = sources_of("resume=last", "training.max_steps=3")
    assert later["training.max_steps"] == later["resume"] == "command line"
    assert later["model.d_model"] == "model=tiny"


# What a run would be

RUN = [
    *("model=tiny", "training=smoke", "dataset=text", "tokenizer=byte", "tracking=none", "device=cpu"),
    *("device.threads=1", "model.max_seq_len=16", "training.sample_length=2"),
]


def job_of(text: Path, *overrides: str) -> Job:
    return check([*RUN, f"dataset.path='{text}'", *overrides]).jobs[0]


def test_a_plan_writes_nothing_and_says_everything(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    print_plans([job_of(text)])
    page = capsys.readouterr().out
    said = {line.split()[0]: line for line in page.splitlines() if line.startswith("  ") and line.split()}
    assert "training.max_steps" in said
    network = job_of(text).config.network_config(257)
    parameters = sum(
        1 if len(s) == 0 else s[0] * (s[1] if len(s) > 1 else 1) for s in parameter_shapes(network).values()
    )
    assert f"{parameters:,}" in said["parameters"]
    assert "128 tokens: 4 x 2 sequences of 16" in page
    assert "20 steps, 2,560 tokens" in page
    assert "not prepared yet" in page
    assert "at the peak" in said["memory"]
    assert "were timed just now; in brackets by the fastest" in page or "timed just now; the machine was busy" in page
    assert list(tmp_path.iterdir()) == []


def test_a_text_of_unknown_size(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    preview = preview_task(config_of(text, "dataset.subset_size=5"), tmp_path)
    assert preview.examples == ("text", "unknown until it is prepared; vocabulary 257")
    assert preview.order is None


def test_each_job_of_a_sweep_has_its_own_network(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the text, and one planner."""
    planner = Planner()
    measured = plan.preview_task
    asked: list[RunConfig] = []
    monkeypatch.setattr(plan, "preview_task", lambda config, cache: asked.append(config) or measured(config, cache))
    for blocks in (1, 2, 1):
        config = config_of(text, f"model.n_blocks={blocks}")
        assert planner._preview(config).network_config == config.network_config(257)
    assert len(asked) == 2


def test_steps_an_epoch_are_those_of_the_run(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimated from the bytes at first, exact when the text is prepared."""
    monkeypatch.chdir(tmp_path)
    config = config_of(text, "training.max_steps=2")
    about = text_size(config.dataset, config.tokenizer, "outputs/datasets")
    train(tmp_path, text, "training.max_steps=2")
    exact = text_size(config.dataset, config.tokenizer, "outputs/datasets")
    assert (about.prepared, exact.prepared) == (False, True)
    assert about.train_tokens == pytest.approx(exact.train_tokens, rel=0.02)
    assert about.vocab_size == exact.vocab_size == 257
    assert exact.train_tokens is not None
    plan = Planner().plan(config_of(text, "training.max_steps=null", "training.num_epochs=2"))
    windows, rows = exact.train_tokens // 8 - 1, 4 * 2
    assert plan.preview.steps_per_epoch == windows / rows
    assert plan.max_steps == -(-2 * windows // rows)


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_an_epoch_is_as_many_steps_as_a_run_makes(
    batching: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For documents of 1 to 24 words: estimated before the text is prepared, exact after it and in the run itself."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text("mice " * (number % 24 + 1))
    once = ("training.max_steps=null", "training.num_epochs=1", f"batching={batching}")
    about, tokens = (getattr(length_of_run(folder, *once), name) for name in ("max_steps", "tokens_per_step"))
    run = train(tmp_path, folder, *once)
    exact = length_of_run(folder, *once)
    seen = metric(run, "tokens_seen")
    assert exact.max_steps == len(seen)
    assert exact.tokens_per_step * len(seen) == pytest.approx(seen[-1], abs=len(seen))
    assert about == pytest.approx(exact.max_steps, rel=0.1)
    assert tokens == pytest.approx(exact.tokens_per_step, rel=0.1)
    windows = sum(5 * (number % 24 + 1) + 1 for number in range(60)) // 64
    assert (exact.max_steps < windows / 2) == (batching == "padded"), (
        "documents are cut at 8 tokens, and are no windows"
    )


def length_of_run(folder: Path, *overrides: str) -> Preview:
    return Planner().plan(config_of(folder, *overrides)).preview


def test_documents_that_nobody_has_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "some words"}\n' * 99)
    given = ("dataset=jsonl", "batching=padded", "training.max_steps=null", "training.num_epochs=1")
    plan = Planner().plan(config_of(rows, *given))
    assert (plan.preview.steps_per_epoch, plan.preview.max_steps) == (None, None)
    with pytest.raises(InputError, match=r"num_epochs=1: the length of an epoch is not known before the text is"):
        plan_page(plan)


def test_a_run_that_goes_on_is_planned_from_its_checkpoint(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (job,) = check([f"resume={finished}", "training.max_steps=11"]).jobs
    plan = Planner().plan(job.config)
    assert (plan.first_step, plan.steps) == (8, 3)
    assert "after step 8: 3 steps are left" in plan_page(plan)


@pytest.mark.slow
def test_a_sweep_is_a_line_a_job_and_a_sum(tmp_path: Path, text: Path) -> None:
    done = command("-m", *RUN, f"dataset.path='{text}'", "seed=1,2", "plan=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 jobs")
    assert "seed=2" in done.stdout
    assert "in all about" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("seconds", "said"), [(0.44, "0.4 s"), (71, "71 s"), (720, "12 min"), (1e6, "12 days")])
def test_durations_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_tokens_get_longer_with_the_vocabulary() -> None:
    sizes = [bytes_per_token(n) for n in (257, 512, 1024, 3000, 50257, 10**6)]
    assert sizes == sorted(sizes)
    assert bytes_per_token(1024) == pytest.approx(2.46)


# Time


def speed_of(text: Path, *overrides: str) -> Speed:
    config = job_of(text, "kernels.compile=never", "training.batch_size=4", *overrides).config
    return measure_speed(config, config.network_config(257), fits=True)


@pytest.mark.usefixtures("one_thread")
def test_steps_are_timed_until_it_is_known_how_far_they_scatter(text: Path) -> None:
    speed = speed_of(text)
    steps = re.match(r"(\d+) steps of this network with 4 of its 8 sequences were timed just now", speed.how)
    assert steps is not None, speed.how
    assert int(steps[1]) >= 20
    assert speed.least is not None
    assert speed.most is not None
    assert 0 < speed.least <= speed.step <= speed.most
    assert speed.evaluated_token > 0
    assert speed.sampled_token > 0


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(time_estimate.waited_for_processor() is None, reason="this system does not tell")
def test_beside_other_processes_a_step_is_what_it_is_without_them(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other processes are real, one for each processor; the plan reports them."""
    monkeypatch.setattr(time_estimate, "LONGEST", 0.4)
    overrides = ("device.threads=2", "model.max_seq_len=64")  # of threads that wait for one another
    alone = speed_of(text, *overrides)
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        beside = speed_of(text, *overrides)
    finally:
        for process in others:
            process.kill()
            process.wait()
    assert beside.busy is not None
    assert beside.busy > 0.2
    assert "the machine was busy" in beside.how
    assert beside.least is not None
    assert alone.step / 4 < beside.step < 4 * alone.step
    assert beside.least <= beside.step == beside.most
    assert torch.get_num_threads() == 2, "as it was"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("busy", "by_one_thread", "bounds"),
    [(None, 9.0, (0.1, 0.2, 0.2)), (0.01, 9.0, (0.1, 0.2, 0.2)), (0.5, 9.0, (0.1, 0.1, 0.1)), (0.5, 0.01, (0.04,) * 3)],
)
def test_one_disturbed_step_changes_nothing_and_on_a_busy_machine_one_thread_counts(
    busy: float | None,
    by_one_thread: float,
    bounds: tuple[float, float, float],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step has a pass over 8 sequences, by 4 at a time here, and an update. Passes take 0.04 s to 10 s."""
    passes = [0.04, 0.09, 0.09, 0.09, 10.0]
    monkeypatch.setattr(time_estimate, "MOST", len(passes))
    monkeypatch.setattr(time_estimate, "LONGEST", 1e6)
    rest = [1.0] * (1 + time_estimate.FEWEST + len(passes))  # evaluations and samples
    taken = [value for of_pass in passes for value in (of_pass, 0.02)] + rest
    taken += [value for _ in passes for value in (by_one_thread, 0.02)] + rest
    monkeypatch.setattr(time_estimate, "seconds_of", lambda work, device, clock: taken.pop(0))
    monkeypatch.setattr(time_estimate, "share_waited", lambda *arguments: busy)
    speed = speed_of(text)
    assert (speed.least, speed.step, speed.most) == pytest.approx(bounds)
    assert ("the machine was busy, 50% of that time" in speed.how) == (busy == 0.5)
    assert len(taken) == (0 if busy == 0.5 else len(rest) + 2 * len(passes))


def test_the_time_of_a_plan_has_its_spread(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    speed = Speed(2.0, 0.0, 0.0, "40 steps were timed", least=1.9, most=2.4, busy=0.3)
    monkeypatch.setattr(plan, "measure_speed", lambda *arguments: speed)
    page = plan_page(Planner().plan(job_of(text).config))
    assert "about 40 s (38 s to 48 s) and some seconds to start" in page
    assert page.endswith("40 steps were timed")
    monkeypatch.setattr(plan, "measure_speed", lambda *arguments: replace(speed, least=None, most=None, busy=None))
    assert "about 40 s and some seconds" in plan_page(Planner().plan(job_of(text).config))


@pytest.mark.slow
def test_a_sweep_says_that_others_had_the_processor(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for busy, said in ((0.3, True), (0.01, False), (None, False)):
        speed = Speed(2.0, 0.0, 0.0, "timed", busy=busy)
        monkeypatch.setattr(plan, "measure_speed", lambda *arguments, speed=speed: speed)
        print_plans([job_of(text, "seed=1"), job_of(text, "seed=2")])
        assert ("Other processes had the processor" in capsys.readouterr().out) == said


# Memory

MEASURED = """
import sys
from pathlib import Path
from manual_backprop.training.command_line import check
from manual_backprop.training.runner import run_job
run_job(check(sys.argv[1:]).jobs[0].config, Path.cwd())
print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
ESTIMATED = """
import sys
from manual_backprop.training.command_line import check
config = check(sys.argv[1:]).jobs[0].config
import manual_backprop.training.runner
from manual_backprop.training.plan import Planner
print("peak", Planner().plan(config).memory.peak // 1024)
"""


def peak(script: str, arguments: list[str], cwd: Path) -> int:
    """The peak memory of a script in its own process [KiB]."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"^peak (\d+)$", done.stdout, re.MULTILINE)
    assert found is not None
    return int(found[1])


PEAKS = {
    "model=small": pytest.mark.nightly,
    "model=small tracking=none implementation=torch architecture=vaswani": pytest.mark.nightly,
    "model=small tracking=none precision=bf16_mixed": pytest.mark.slow,
    "model=medium tracking=none training.batch_size=8": pytest.mark.nightly,  # its gradient check works on 350 MB
}


@pytest.mark.parametrize("overrides", [pytest.param(text.split(), marks=mark, id=text) for text, mark in PEAKS.items()])
def test_the_memory_is_within_a_fifth_of_the_measured_peak(overrides: list[str], tmp_path: Path) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "guide").rglob("*.md")))
    (tmp_path / "text.txt").write_text(3 * pages, encoding="utf-8")
    short = ["training.eval_every=3", "training.save_every=3", "training.sample_length=8"]
    data = ["dataset=text", "dataset.path=text.txt", "device=cpu", "device.threads=1"]
    arguments = [*overrides, *short, *data]
    peak(MEASURED, [*arguments, "training.max_steps=1"], tmp_path)  # to prepare the text may take more than to train
    arguments.append("training.max_steps=6")
    assert peak(ESTIMATED, arguments, tmp_path) == pytest.approx(peak(MEASURED, arguments, tmp_path), rel=0.2)


def tiny(text: Path, *overrides: str) -> RunConfig:
    return job_of(text, *overrides).config


def test_state_and_checkpoint_are_counted_exactly(text: Path) -> None:
    rounded = 0 if products.rounds_weights("bf16_mixed", torch.device("cpu")) else 2  # the copy that products read
    mixed = "bf16_mixed", (4, 4, 8 + rounded)
    for precision, widths in (("fp32", (4, 4, 8)), ("bf16", (2, 2, 8)), ("fp64", (8, 8, 16)), mixed):
        config = tiny(text, f"precision={precision}")
        network = config.network_config(257)
        estimate = estimate_memory(config, network)
        parameters = sum(_size(shape) for shape in parameter_shapes(network).values())
        assert estimate.state == pytest.approx(parameters * sum(widths), rel=0.02)  # padding, and a few counts
        assert checkpoint_bytes(config, network) == parameters * (widths[0] + widths[2])


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def test_a_larger_batch_works_on_more(text: Path) -> None:
    small, large = (
        estimate_memory(config, config.network_config(257))
        for config in (tiny(text, "training.batch_size=8"), tiny(text, "training.batch_size=64"))
    )
    assert large.state == small.state
    assert 6 * small.working < large.working < 9 * small.working


@pytest.mark.parametrize("length", [64, pytest.param(256, marks=pytest.mark.slow)])  # probabilities kept; recomputed
def test_the_last_piece_stands_for_all(length: int, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(text, f"model.max_seq_len={length}", "model.n_heads=16", "training.batch_size=40")
    quick = estimate_memory(config, config.network_config(8192)).working
    taken, pieces_as_they_are = [], pieces.pieces

    def all_pieces(n_rows: int, size: int, of: Tensor | None = None) -> Iterator[slice]:
        taken.append(-(-n_rows // size))
        return pieces_as_they_are(n_rows, size)

    for module in (attention, compiled, loss, pieces):
        monkeypatch.setattr(module, "pieces", all_pieces)
    assert estimate_memory(config, config.network_config(8192)).working == pytest.approx(quick, rel=0.01)
    assert max(taken) > 1


def test_a_run_that_will_not_fit_is_warned(text: Path) -> None:
    config = tiny(text, "training.batch_size=1000000", "model.max_seq_len=1024")
    estimate = estimate_memory(config, config.network_config(257))  # nothing of it is allocated
    assert estimate.peak > memory_of("cpu")
    said = too_large(estimate)
    assert said is not None
    assert "training.batch_size" in said
    assert too_large(MemoryEstimate(MB, MB, MB, "cpu")) is None
