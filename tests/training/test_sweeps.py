"""Sweeps as a user starts them: jobs that fail, are killed or interrupted, and what stays of them."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from command_tools import PATIENCE, Started, command, steps_of, wait_until
from run_tools import small, write_text

from manual_backprop.tracking import TrainingLogger, create_run_directory, load_training_log
from manual_backprop.tracking.run_directory import FINISHED, SWEEPS, close_dead_runs, list_runs, read_run
from manual_backprop.training.comparison.runs import Metric
from manual_backprop.training.sweeps.processors import cores, jobs_at_once, threads_of_a_job
from manual_backprop.training.sweeps.records import (
    JobRecord,
    Records,
    best_first,
    best_of,
    job_name,
    measured,
    ranking,
    runs_of_sweep,
)
from manual_backprop.training.sweeps.sweep import _objective
from manual_backprop.training.sweeps.table import as_csv, as_markdown, as_text

HERE = ("dataset.path=text.txt", "device.threads=null")  # threads are the launcher's to divide
SMALL = small(*HERE, "training.max_steps=4")
ENDLESS = small(*HERE, "training.max_steps=1000000", "training.eval_every=1000000", "training.save_every=1000000")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder in which the commands run."""
    write_text(tmp_path / "text.txt")
    return tmp_path


def the_sweep(root: Path) -> Path:
    (sweep,) = list_runs(root / "outputs", SWEEPS)
    return sweep


def running_job(root: Path, number: int, steps: int = 3) -> Path:
    """Waits until this job has made some steps. Returns the directory of its run."""

    def found() -> Path | None:
        for path in list_runs(root / "outputs"):
            if read_run(path)["sweep"]["job"] == number and steps_of(path) > steps:
                return path
        return None

    return wait_until(found)


def statuses(root: Path) -> list[str]:
    return [record.status for record in Records(the_sweep(root)).read_all()]


# One sweep of four jobs, of which two fail, looked at from all sides


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A sweep over two keys, tracked in MLflow; the absurd rate diverges."""
    root = tmp_path_factory.mktemp("swept")
    write_text(root / "text.txt")
    rates = "optimizer.learning_rate=1e30,1e-2"
    given = small(*HERE, "tracking=mlflow", "training.max_steps=4", "schedule.warmup_ratio=0", rates)
    return root, command("-m", *given, "model.n_blocks=1,2", cwd=root)


def test_a_failing_job_stops_no_other(swept: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    root, done = swept
    assert done.returncode == 1, done.stderr
    assert statuses(root) == ["FAILED", "FAILED", "FINISHED", "FINISHED"]
    assert read_run(the_sweep(root))["status"] == "FAILED"
    assert "2 of 4 jobs failed:" in done.stderr
    assert "Traceback" not in done.stderr
    for record in Records(the_sweep(root)).read_all()[:2]:
        assert f"job {record.number + 1} ({record.title}) FAILED: The loss" in done.stderr
        assert f"outputs/runs/{Path(str(record.run_directory)).name}" in done.stderr
        assert record.exit_code == 3


def test_the_table_is_best_first(swept: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    root, done = swept
    lines = done.stdout[done.stdout.index("overrides ") :].splitlines()[:5]
    assert re.split(" {2,}", lines[0]) == [
        "overrides", "validation loss", "tokens a second", "status", "run directory",
    ]  # fmt: skip
    assert "\nranked by:     validation loss, the lowest first\n" in done.stdout
    assert ["FINISHED" in line for line in lines[1:]] == [True, True, False, False]
    with (the_sweep(root) / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["validation_loss"]) for row in rows[:2]]
    assert losses == sorted(losses)
    for row, loss in zip(rows[:2], losses, strict=True):
        log = load_training_log(row["run_directory"])
        assert log.validation["validation/loss"].values[-1] == loss
        assert float(row["tokens_per_second"]) > 0
        assert log.config["optimizer"]["learning_rate"] == float(row["optimizer.learning_rate"])
        assert log.config["model"]["n_blocks"] == int(row["model.n_blocks"])
    markdown = (the_sweep(root) / "table.md").read_text().splitlines()
    assert len(markdown) == 6
    assert all(line.count("|") == 6 for line in markdown)


def test_there_are_pictures(swept: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    for name in ("curves.png", "heat_map.png"):
        content = (the_sweep(swept[0]) / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000


def test_a_sweep_leaves_nothing_else(swept: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    root, _ = swept
    assert {path.name for path in (root / "outputs").iterdir()} == {"datasets", "runs", "sweeps", "artifacts"}
    assert len(list((root / "outputs" / "sweeps").iterdir())) == 1


def test_mlflow_knows_the_family(swept: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    from mlflow import MlflowClient

    root, _ = swept
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'manual_backprop'")
    runs = {logged.info.run_id: logged for logged in client.search_runs([experiment.experiment_id])}
    (parent,) = [one for one in runs.values() if "mlflow.parentRunId" not in one.data.tags]
    children = [one for one in runs.values() if one is not parent]
    assert {one.data.tags["mlflow.parentRunId"] for one in children} == {parent.info.run_id}
    assert {one.info.run_name for one in children} == {
        f"learning_rate={rate},n_blocks={blocks}" for rate in ("1e+30", "0.01") for blocks in (1, 2)
    }
    assert sorted(one.info.status for one in children) == ["FAILED", "FAILED", "FINISHED", "FINISHED"]
    assert parent.info.status == "FAILED"
    assert parent.info.run_name == "sweep of learning_rate, n_blocks"
    best = runs[parent.data.tags["best_run_id"]]
    finished = [one for one in children if one.info.status == "FINISHED"]
    assert best.data.metrics["validation/loss"] == min(one.data.metrics["validation/loss"] for one in finished)
    assert [one for one in children if one.data.tags.get("best") == "true"] == [best]
    artifacts = {one.path for one in client.list_artifacts(parent.info.run_id)}
    assert {"table.csv", "table.md", "curves.png", "heat_map.png"} <= artifacts


@pytest.mark.slow
def test_resume_runs_only_what_has_not_finished(swept: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """In a copy: the two failed jobs start again (and fail again); the two finished ones do not change."""
    root, _ = swept
    other = root.parent / "resumed"
    shutil.copytree(root, other)
    moved = other / "outputs" / "sweeps" / the_sweep(root).name
    for file in [
        *other.glob("outputs/*/*/run.json"),
        *moved.glob("jobs/*.json"),
        *other.glob("outputs/*/*/tracking.json"),
    ]:
        file.write_text(file.read_text().replace(str(root), str(other)))
    before = Records(moved).read_all()
    done = command(f"sweep.resume={moved.name[-6:]}", cwd=other)
    assert done.returncode == 1, done.stderr
    assert "2 of 4 jobs failed:" in done.stderr
    after = Records(moved).read_all()
    assert after[2:] == before[2:]
    assert len(list_runs(other / "outputs")) == 6
    assert [one.run_directory for one in after[:2]] != [one.run_directory for one in before[:2]]
    assert done.stdout.count(" starts: ") == 2


# What a sweep refuses, before anything is started


def test_bad_input_is_found_before_anything_starts(root: Path) -> None:
    done = command("-m", *SMALL, "model.d_model=16,10", "model.n_heads=4", cwd=root)
    assert done.returncode == 2
    assert "model.d_model=10: must be divisible by model.n_heads=4" in done.stderr
    assert not (root / "outputs").exists()


@pytest.mark.parametrize("given", [("sweep.resume=20250101-nothing",), ("sweep.resume=last", "seed=3")])
def test_a_sweep_that_cannot_be_resumed(root: Path, given: tuple[str, ...]) -> None:
    done = command(*given, cwd=root)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "leave out everything else" in done.stderr if len(given) > 1 else "there is no sweep" in done.stderr
    assert not (root / "outputs").exists()


# Records


def record(number: int, status: str = "FINISHED", loss: float | None = None, *swept: str) -> JobRecord:
    return JobRecord(number, swept, swept, status, validation_loss=loss)


def test_the_best_is_a_finished_one() -> None:
    records = [record(0, "FINISHED", 2.0), record(1, "KILLED", 1.0), record(2, "FINISHED", 1.5), record(3, "WAITING")]
    best = best_of(records)
    assert best is not None
    assert best.number == 2
    assert [one.number for one in best_first(records)] == [2, 0, 1, 3]
    assert best_of(records[1:2]) is None


def test_names_of_jobs() -> None:
    assert job_name(0, ["model=tiny", "optimizer.learning_rate=0.001"]) == "model=tiny,learning_rate=0.001"
    assert job_name(0, ["model.learning_rate=1", "optimizer.learning_rate=2"]) == (
        "model.learning_rate=1,optimizer.learning_rate=2"
    )
    assert job_name(0, []) is None
    assert job_name(0, ["dataset.path=texts/a.txt"]) == "path=texts_a.txt"
    names = {job_name(number, [f"dataset.path={'long' * 50}"]) for number in (7, 8)}
    assert len(names) == 2
    assert all(name is not None and len(name) <= 100 for name in names)


def test_a_name_that_was_swept_is_the_name() -> None:
    assert job_name(0, ("run_name=alpha",)) == "alpha"
    assert job_name(0, ("run_name='1e3'", "seed=2")) == "1e3,seed=2"
    assert job_name(0, ("run_name=null",)) is None
    assert job_name(0, ("tags.note='a b\u2028'",)) == "note=a b\\u2028"


def test_cells_of_the_table_have_no_quotes_of_the_command_line() -> None:
    swept = (r"tags.a='it\'s | 1e3'", "run_name='two words'")
    record = JobRecord(0, swept, swept, FINISHED, validation_loss=1.0)
    assert as_text([record]).splitlines()[1].startswith("tags.a=it's | 1e3 run_name=two words  ")
    assert r"| tags.a=it's \| 1e3 run_name=two words | 1.0000 |" in as_markdown([record])
    (line,) = csv.DictReader(io.StringIO(as_csv([record])))
    assert (line["tags.a"], line["run_name"]) == ("it's | 1e3", "two words")


def test_what_else_a_task_measures_has_a_column(tmp_path: Path) -> None:
    """The metric that chooses the best checkpoint stands beside the loss, where that is another one; jobs that do not
    share it are ranked by the loss."""
    run = create_run_directory(tmp_path / "outputs", "labels")
    logger = TrainingLogger(run.path)
    logger.log_validation(1, {"loss": 0.5, "accuracy": 0.25})
    logger.log_validation(2, {"loss": 0.25, "accuracy": 0.75})
    run.update(best_metric="validation/accuracy", best_is_highest=True)
    run.release()
    found = measured(record(0, "FINISHED", None, "seed=1"), run.path)
    assert (found.validation_loss, found.metric, found.metric_value) == (0.25, "validation/accuracy", 0.75)
    assert found.highest_is_best
    records = [found, record(1, "FINISHED", 0.125, "seed=2"), record(2, "WAITING")]
    heading, first, second, _ = as_text(records).splitlines()
    assert heading.split("  ")[0] == "overrides"
    assert "validation loss  validation accuracy  tokens a second" in heading
    assert (first.split()[:2], second.split()[:3]) == (["seed=2", "0.1250"], ["seed=1", "0.2500", "0.75"])
    assert "| overrides | validation loss | validation accurac" in as_markdown(records, directories=False)
    assert as_markdown(records, directories=False).splitlines()[3] == "| seed=1 | 0.2500 | 0.75 |  | FINISHED |"
    rows = list(csv.DictReader(io.StringIO(as_csv(records))))
    assert [row["validation_accuracy"] for row in rows] == ["", "0.75", ""]
    assert "accuracy" not in as_text(records[1:])


@pytest.mark.parametrize(
    ("metric", "highest", "order", "searched"),
    [
        ("validation/accuracy", True, [1, 2, 0, 3], [-0.5, -0.75, -0.625]),
        ("validation/rmse", False, [0, 2, 1, 3], [0.5, 0.75, 0.625]),
        (None, False, [2, 1, 0, 3], [3.0, 2.0, 1.0]),
    ],
)
def test_jobs_are_ranked_by_the_metric_of_their_task(
    metric: str | None, highest: bool, order: list[int], searched: list[float]
) -> None:
    """Their losses fall from job to job. Optuna minimizes, so a score is negated, unless the user lets it maximize."""
    own = [0.5, 0.75, 0.625] if metric else [None] * 3
    records = [
        replace(record(number, "FINISHED", 3.0 - number), metric=metric, metric_value=value, highest_is_best=highest)
        for number, value in enumerate(own)
    ]
    records.append(replace(record(3, "KILLED", 0.125), metric=metric, metric_value=9.0 if highest else 0.125))
    assert ranking(records) == (metric or "validation/loss", highest)
    assert [one.number for one in best_first(records)] == order
    equal = [replace(one, metric_value=one.metric_value and 0.0) for one in records]  # their losses decide
    assert [one.number for one in best_first(equal)] == [2, 1, 0, 3]
    best = best_of(records)
    assert best is not None
    assert best.number == order[0]
    assert [_objective(one, {"direction": "minimize"}) for one in records] == [*searched, None]
    assert [_objective(one, {"direction": "maximize"}) for one in records] == [*(own if metric else searched), None]


def test_a_record_of_a_version_that_ranked_by_the_loss(tmp_path: Path) -> None:
    """It says nothing about the direction of its metric; the run does."""
    run = create_run_directory(tmp_path / "outputs", "labels")
    TrainingLogger(run.path).log_validation(1, {"loss": 0.5, "accuracy": 0.25})
    run.update(best_metric="validation/accuracy", best_is_highest=True)
    run.release()
    records = Records(tmp_path / "outputs" / "sweeps" / "sweep")
    records.folder.mkdir(parents=True)
    content = asdict(measured(record(0), run.path))
    assert content.pop("highest_is_best") is True
    (records.folder / "0000.json").write_text(json.dumps(content))
    assert records.read_all() == [measured(record(0), run.path)]
    shutil.rmtree(run.path)
    (kept,) = records.read_all()
    assert (kept.main_metric, kept.validation_loss) == (Metric(), 0.5), "its run is gone: the loss still ranks"


def test_the_best_job_is_the_first_of_the_table() -> None:
    """Also if a job has measured nothing, so that they do not share a metric."""
    records = [
        replace(
            record(number, "FINISHED", loss), metric="validation/accuracy", metric_value=score, highest_is_best=True
        )
        for number, (loss, score) in enumerate(((2.0, 0.75), (1.0, 0.5)))
    ]
    records.append(record(2, "FINISHED"))
    assert ranking(records) == Metric()
    assert best_of(records) == best_first(records)[0] == records[1]
    assert best_of(records[2:]) is None


def test_a_record_comes_back(tmp_path: Path) -> None:
    records = Records(tmp_path)
    written = record(12, "FAILED", None, "seed=1")
    records.write(written)
    assert records.read_all() == [written]
    assert records.read(3) is None


def test_threads_are_divided() -> None:
    joblib = {"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "n_jobs": 2}
    assert jobs_at_once(joblib, 8) == 2
    assert jobs_at_once(joblib, 1) == 1
    assert jobs_at_once(joblib | {"n_jobs": -1}, 1000) == cores()
    assert threads_of_a_job(joblib | {"n_jobs": 1000}, 1000) == 1
    slurm = {"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher", "cpus_per_task": 8}
    assert threads_of_a_job(slurm, 1000) == 8
    assert threads_of_a_job({"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}, 8) is None


# Signals and kills


@pytest.mark.slow
def test_a_killed_job_stops_no_other(root: Path) -> None:
    """kill -9 of a job that would never end."""
    with Started("-m", *small(*HERE, "training.max_steps=1000000,4"), cwd=root) as process:
        directory = running_job(root, 0)
        os.kill(read_run(directory)["owner"]["pid"], signal.SIGKILL)
        out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, errors
    assert statuses(root) == ["KILLED", "FINISHED"]
    assert "SIGKILL killed its process" in errors
    assert str(directory.name) in errors
    close_dead_runs(root / "outputs")
    assert read_run(directory)["status"] == "KILLED"
    assert out.count("FINISHED") >= 2


@pytest.mark.parametrize(
    "launcher", [pytest.param("basic", marks=pytest.mark.slow), pytest.param("parallel", marks=pytest.mark.nightly)]
)
def test_interrupted_and_resumed(root: Path, launcher: str) -> None:
    """After a signal running jobs save and waiting jobs do not start; then sweep.resume continues from the
    checkpoints."""
    if launcher == "parallel":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    at_once = [f"hydra/launcher={launcher}", *(["hydra.launcher.n_jobs=2"] if launcher == "parallel" else [])]
    with Started("-m", *ENDLESS, *at_once, "seed=1,2,3", cwd=root) as process:
        running = [running_job(root, number) for number in range(len(at_once))]
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert statuses(root) == ["KILLED"] * len(running) + ["WAITING"] * (3 - len(running))
    assert "sweep.resume=" in errors
    assert "overrides" in out
    sweep = the_sweep(root)
    assert read_run(sweep)["status"] == "KILLED"
    made = [steps_of(path) for path in running]

    content = json.loads((sweep / "run.json").read_text())  # or it would go on for ever
    content["given"]["overrides"] = [
        re.sub(r"max_steps=\d+", f"max_steps={max(made) + 2}", line) for line in content["given"]["overrides"]
    ]
    (sweep / "run.json").write_text(json.dumps(content))
    for path in running:
        config = path / "config.yaml"
        config.write_text(re.sub(r"max_steps: \d+", f"max_steps: {max(made) + 2}", config.read_text()))
    for file in sorted((sweep / "jobs").iterdir()):
        file.write_text(re.sub(r"max_steps=\d+", f"max_steps={max(made) + 2}", file.read_text()))
    done = command("sweep.resume=last", cwd=root)
    assert done.returncode == 0, done.stderr
    assert statuses(root) == ["FINISHED"] * 3
    assert runs_of_sweep(sweep)[: len(running)] == running
    assert all(read_run(path)["resumes"] for path in running)
    assert read_run(sweep)["status"] == "FINISHED"


@pytest.mark.slow
def test_a_sweep_that_was_killed(root: Path) -> None:
    """After kill -9 of the command its job saves and ends, waiting jobs stay waiting, and the next command closes the
    parent run."""
    with Started("-m", *ENDLESS, "seed=1,2", cwd=root) as process:
        directory = running_job(root, 0)
        process.kill()
        _, errors = process.communicate(timeout=PATIENCE)  # of its job too, which ends later
    assert "Traceback" not in errors
    wait_until(lambda: read_run(directory)["status"] == "KILLED")
    assert len(list((directory / "checkpoints").glob("step-*"))) == 1
    assert read_run(the_sweep(root))["status"] == "RUNNING"
    done = command(*SMALL, "training.max_steps=1", cwd=root)
    assert done.returncode == 0, done.stderr
    assert read_run(the_sweep(root))["status"] == "KILLED"


# Launchers and sweepers that are installed apart


@pytest.mark.nightly
def test_jobs_at_once_on_a_fresh_store(root: Path) -> None:
    """All runs finish, and every metric of each is in MLflow. Eight at once, ten times: .ci/nightly."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    from manual_backprop.training.cost.parallel import one_round

    assert one_round(root, 3) == []


@pytest.mark.nightly
def test_a_search_survives_what_diverges(root: Path) -> None:
    """Optuna: a failed trial does not end the search. The same seed chooses the same values, so that a resume finds
    them."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    rates = "optimizer.learning_rate=1e30,1e-2"
    search = ("hydra/sweeper=search", "hydra.sweeper.n_trials=5", "schedule.warmup_ratio=0")
    done = command("-m", *SMALL, *search, rates, cwd=root)
    records = Records(the_sweep(root)).read_all()
    assert len(records) == 5
    diverged = [one for one in records if one.title == "optimizer.learning_rate=1e+30"]
    assert diverged, "a search that never tries the absurd rate tests nothing"
    assert all((one.status == "FAILED") == (one in diverged) for one in records)
    assert done.returncode == 1, done.stderr
    again = command("sweep.resume=last", cwd=root)
    assert again.returncode == 1, again.stderr
    assert again.stdout.count(" starts: ") == len(diverged)
    assert Records(the_sweep(root)).read_all()[-1].overrides == records[-1].overrides


@pytest.mark.nightly
def test_the_local_executor_of_submitit(root: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = command("-m", *SMALL, "hydra/launcher=cluster_here", "seed=1,2", cwd=root)
    assert done.returncode == 0, done.stderr
    assert statuses(root) == ["FINISHED", "FINISHED"]
    assert [load_training_log(path).config["device"]["threads"] for path in list_runs(root / "outputs")] == [1, 1]
    assert "best: seed=" in done.stdout


@pytest.mark.parametrize(
    ("plugin", "chosen"),
    [
        ("hydra_joblib_launcher", "hydra/launcher=parallel"),
        ("hydra_submitit_launcher", "hydra/launcher=cluster"),
        ("hydra_submitit_launcher", "hydra/launcher=cluster_here"),
        ("hydra_optuna_sweeper", "hydra/sweeper=search"),
    ],
)
def test_what_is_shipped_for_a_plugin_composes(plugin: str, chosen: str) -> None:
    pytest.importorskip(f"hydra_plugins.{plugin}")
    from manual_backprop.config.composition import composer

    with composer() as hydra:
        composed = hydra.compose([chosen]).hydra
        if chosen == "hydra/sweeper=search":
            assert composed.sweeper.max_failure_rate == 1.0
            assert composed.sweeper.sampler.seed == 0
        if chosen == "hydra/launcher=cluster":
            assert composed.launcher._target_.endswith("SlurmLauncher")
            assert composed.launcher.max_num_timeout > 0
