"""MLflow with a real sqlite store, a dead server, one that never answers, and a real one that is frozen and killed."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from command_tools import environment, wait_until

from manual_backprop.checkpoints.checkpoint import CheckpointManager, load_checkpoint
from manual_backprop.sync import main as sync
from manual_backprop.tracking import create_run_directory, open_run_directory, open_tracker
from manual_backprop.tracking.mlflow_delivery import MlflowDelivery
from manual_backprop.tracking.mlflow_messages import without_credentials
from manual_backprop.tracking.run_directory import close_dead_runs, end_run
from manual_backprop.tracking.tracker import Dataset, LocalTracker


@pytest.fixture
def root(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An outputs directory with a store beside it."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path / "outputs"


def client_of(root: Path):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{root.parent / 'mlflow.db'}")


def run_of(root: Path, directory: Path):
    from manual_backprop.tracking.run_directory import read_run

    return client_of(root).get_run(read_run(directory)["mlflow"]["run_id"])


def history(root: Path, directory: Path, name: str) -> list[tuple[int, float]]:
    run = run_of(root, directory)
    points = client_of(root).get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.value) for point in points)


def test_everything_of_a_run_arrives(root: Path, caplog: pytest.LogCaptureFixture, capfd) -> None:
    run = create_run_directory(root, "first")
    start = time.monotonic()
    tracker = open_tracker("mlflow", run, root=root, experiment_name="lab", run_name="the first")
    tracker.log_parameters({"model.d_model": 128, "model.vocab_size": None, "long": "x" * 7000})
    tracker.log_parameters({f"many.{number}": number for number in range(250)})
    tracker.set_tags({"device": "cpu", "git_dirty": False})
    sample = run.samples / "step-000002.txt"
    sample.write_text("once upon a time")
    tracker.log_artifact(sample, "samples")
    assert time.monotonic() - start < 2, "training starts at once"
    for step in range(1, 301):
        tracker.log(step, {"train/loss": 1 / step, "tokens_seen": step * 1000, "gradient_norm": 2.0, "flops": 1e12})
    tracker.log(300, {"validation/loss": math.nan, "validation/perplexity": math.inf})
    CheckpointManager(run.checkpoints).save(300, {}, {"metrics_length": tracker.sync()}, 1.0)
    tracker.finish("FINISHED")
    run.release()

    logged = run_of(root, run.path)
    assert logged.info.status == "FINISHED"
    assert logged.info.run_name == "the first"
    assert client_of(root).get_experiment(logged.info.experiment_id).name == "lab"
    assert logged.data.params["model.d_model"] == "128"
    assert len(logged.data.params) == 253
    assert len(logged.data.params["long"]) == 6000
    assert logged.data.tags["device"] == "cpu"
    assert logged.data.tags["run_directory"] == str(run.path)
    assert history(root, run.path, "train/loss") == [(step, 1 / step) for step in range(1, 301)]
    assert math.isnan(logged.data.metrics["validation/loss"])
    artifacts = root / "artifacts" / logged.info.run_id / "artifacts"
    assert (artifacts / "samples" / sample.name).read_text() == "once upon a time"
    linked = artifacts / "checkpoints" / "step-000300" / "state.json"
    assert linked.samefile(run.checkpoints / "step-000300" / "state.json")
    assert not (root.parent / "mlruns").exists()
    assert caplog.text == ""
    assert capfd.readouterr().err == "", "MLflow's own messages stay away from the terminal"
    assert run.read()["mlflow"]["delivered"] is True


def test_links_follow_the_checkpoints(root: Path) -> None:
    run = create_run_directory(root, "links")
    checkpoints = CheckpointManager(run.checkpoints, keep=1)
    tracker = LocalTracker(run.path, "lab", "links")
    delivery = MlflowDelivery(run.path, root)
    for step in (1, 2, 3):
        checkpoints.save(step, {}, {"step": step}, metric=step)
        delivery.deliver()
    tracker.finish()
    delivery.deliver(final=True)
    artifacts = root / "artifacts" / run.read()["mlflow"]["run_id"] / "artifacts" / "checkpoints"
    assert sorted(path.name for path in artifacts.iterdir()) == ["step-000001", "step-000003"]
    run.release()


def test_delivering_again_changes_nothing(root: Path, capsys: pytest.CaptureFixture) -> None:
    run = create_run_directory(root, "again")
    tracker = LocalTracker(run.path, "lab", "again")
    tracker.log_parameters({"a": 1})
    for step in range(1, 2001):  # more than one batch
        tracker.log(step, {"x": step, "y": math.inf, "z": math.nan})
    MlflowDelivery(run.path, root).deliver()
    MlflowDelivery(run.path, root).deliver()  # a second one, which does not know what the first one sent
    tracker.log(2001, {"x": 2001})
    tracker.finish("FAILED")
    run.release()
    assert sync([str(run.path)]) == 0
    assert sync([run.run_id]) == 0, "found below outputs/ too"
    assert "is delivered to sqlite" in capsys.readouterr().out
    assert history(root, run.path, "x") == [(step, float(step)) for step in range(1, 2002)]
    assert len(history(root, run.path, "y")) == len(history(root, run.path, "z")) == 2000
    assert run_of(root, run.path).info.status == "FAILED"
    assert len(client_of(root).search_runs([run_of(root, run.path).info.experiment_id])) == 1


def test_a_resumed_run_continues_and_repeats_no_point(root: Path) -> None:
    """Steps 3 and 4 are delivered, lost by a kill, and run again: each stays one point, what a clock measured too."""
    run = create_run_directory(root, "resumed")
    tracker = LocalTracker(run.path, "lab", "resumed")
    tracker.log_parameters({"optimizer.learning_rate": 0.1, "seed": 1})
    remembered = 0
    for step in range(1, 5):
        tracker.log(step, {"train/loss": 1 / step, "tokens_per_second": 100 + step})
        if step == 2:
            remembered = tracker.sync()
    MlflowDelivery(run.path, root).deliver()
    run.release()  # as a kill would

    run = open_run_directory(run.path, step=2)
    time.sleep(0.01)  # the clock moves on: the repeated entries carry other timestamps
    tracker = open_tracker("mlflow", run, root, "lab", "resumed", metrics_length=remembered)
    tracker.log_parameters({"optimizer.learning_rate": 0.05, "seed": 1})
    for step in range(3, 7):
        tracker.log(step, {"train/loss": 1 / step, "tokens_per_second": 200 + step})
    tracker.finish("FINISHED")
    run.release()
    assert history(root, run.path, "train/loss") == [(step, 1 / step) for step in range(1, 7)]
    speeds = history(root, run.path, "tokens_per_second")
    assert speeds == [(1, 101), (2, 102), (3, 103), (4, 104), (5, 205), (6, 206)]
    logged = run_of(root, run.path)
    assert logged.data.params["optimizer.learning_rate"] == "0.1"
    assert logged.data.tags["changed.optimizer.learning_rate"] == "0.05 (from step 3)"
    assert "changed.seed" not in logged.data.tags
    assert logged.info.status == "FINISHED"
    assert len(client_of(root).search_runs([logged.info.experiment_id])) == 1


def test_every_change_of_a_parameter_is_reported_with_its_step(root: Path) -> None:
    """Resumed with another rate, resumed again with the same, resumed with a third; and from before a change."""

    def session(step: int | None, rate: float, deliver: bool = True) -> None:
        run = create_run_directory(root, "changes") if step is None else open_run_directory(path, step)
        path_of.append(run.path)
        tracker = LocalTracker(run.path, "lab", "changes")
        tracker.log_parameters({"optimizer.learning_rate": rate, "seed": 1, "long": "x" * 7000 + str(rate)})
        tracker.log(1 if step is None else step + 1, {"x": rate})
        if deliver:
            MlflowDelivery(run.path, root).deliver()
        run.release()

    path_of: list[Path] = []
    session(None, 0.1)
    path = path_of[0]

    def told() -> str | None:
        return run_of(root, path).data.tags.get("changed.optimizer.learning_rate")

    assert told() is None
    session(3, 0.05)
    assert told() == "0.05 (from step 4)"
    session(6, 0.05)
    assert told() == "0.05 (from step 4)", "nothing changed at step 7"
    session(9, 0.2, deliver=False)  # MLflow is down
    session(11, 0.1)
    assert told() == "0.05 (from step 4), 0.2 (from step 10), 0.1 (from step 12)"
    session(9, 0.05)
    assert told() == "0.05 (from step 4)", "what came after step 9 never happened"
    session(0, 0.1)
    assert told() is None
    assert run_of(root, path).data.params["optimizer.learning_rate"] == "0.1"
    assert "changed.seed" not in run_of(root, path).data.tags


def test_a_dataset_is_one_input_however_often_it_is_sent(root: Path) -> None:
    dataset = Dataset("books", "ab" * 32, "local", {"uri": "/books"}, {"train_bytes": 5}, {"tokenizer": "byte"})
    for name in ("one", "two"):
        run = create_run_directory(root, name)
        tracker = LocalTracker(run.path, "lab", name)
        tracker.log_dataset(dataset)
        MlflowDelivery(run.path, root).deliver()
        run.release()
        run = open_run_directory(run.path, step=0)
        tracker = LocalTracker(run.path, "lab", name)
        tracker.log_dataset(dataset)
        tracker.finish()
        run.release()
        assert sync([str(run.path)]) == 0
        (given,) = run_of(root, run.path).inputs.dataset_inputs
        assert (given.dataset.name, given.dataset.digest) == ("books", ("ab" * 32)[:36])
        assert {tag.key: tag.value for tag in given.tags} == {"mlflow.data.context": "training", "tokenizer": "byte"}
        assert json.loads(given.dataset.profile) == {"train_bytes": 5}
        assert json.loads(given.dataset.source) == {"uri": "/books"}


def test_a_kill_before_the_run_id_was_remembered_makes_no_second_run(root: Path) -> None:
    run = create_run_directory(root, "forgotten")
    LocalTracker(run.path, "lab", "forgotten").log(1, {"x": 1})
    MlflowDelivery(run.path, root).deliver()
    first = run.read()["mlflow"]["run_id"]
    run.update(mlflow=None)
    MlflowDelivery(run.path, root).deliver()
    assert run.read()["mlflow"]["run_id"] == first
    run.release()


def test_foreign_variables_do_not_hijack_a_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = create_run_directory(root, "other")
    LocalTracker(other.path, "lab", "other").log(1, {"x": 1})
    MlflowDelivery(other.path, root).deliver()
    monkeypatch.setenv("MLFLOW_RUN_ID", other.read()["mlflow"]["run_id"])
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    run = create_run_directory(root, "mine")
    tracker = open_tracker("mlflow", run, root, "lab", "mine")
    tracker.log(1, {"x": 2})
    tracker.finish()
    assert history(root, run.path, "x") == [(1, 2.0)]
    assert history(root, other.path, "x") == [(1, 1.0)]
    for one in (run, other):
        one.release()


def test_the_next_run_tells_mlflow_about_the_dead(root: Path) -> None:
    dead = create_run_directory(root, "dead")
    LocalTracker(dead.path, "lab", "dead").log(1, {"x": 1})
    MlflowDelivery(dead.path, root).deliver()
    assert run_of(root, dead.path).info.status == "RUNNING"
    dead.release()  # as a kill would
    assert close_dead_runs(root) == [dead.path]
    run = create_run_directory(root, "next")
    LocalTracker(run.path, "lab", "next")
    MlflowDelivery(run.path, root).terminate_dead_runs()
    assert run_of(root, dead.path).info.status == "KILLED"
    run.release()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def hung_server() -> Iterator[int]:
    """Accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield server.getsockname()[1]


SECONDS = 20  # TIMEOUT, and what is computed meanwhile on a busy machine; a minute passes where nobody gives up

RUN = """
    import logging, sys, time
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from manual_backprop.tracking import create_run_directory, open_tracker
    run = create_run_directory(sys.argv[1], "alone")
    if sys.argv[3] != "later":
        import mlflow
    if sys.argv[3] == "starved":  # from here on, a seventh of a core
        import os, subprocess
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        busy = "import os\\nparent = os.getppid()\\nwhile os.getppid() == parent: pass"  # until this process has ended
        other = subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.nice(8)
    start = time.monotonic()
    tracker = open_tracker("mlflow", run, sys.argv[1], "lab", "alone")
    for step in range(1, 51):
        tracker.log(step, {"x": step})
        time.sleep(float(sys.argv[2]) / 50)
    trained = time.monotonic()
    tracker.finish("FINISHED")
    run.release()
    if sys.argv[3] == "starved":
        other.kill()
    print(trained - start, time.monotonic() - trained, run.path, time.time())
"""


def start_alone(root: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    """A run in a process of its own: `arguments` are its seconds of training, and what is imported before."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RUN), str(root), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**variables),
    )


def run_alone(
    root: Path, uri: str | None, seconds: float, mlflow: str = "imported"
) -> tuple[float, float, Path, list[str]]:
    """A run in a process of its own: seconds of training and of waiting, its directory, what it said.

    MLflow is imported before, so that the measured wait is for the tracker and not for the import.
    """
    variables = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "60"} | ({"MLFLOW_TRACKING_URI": uri} if uri else {})
    with start_alone(root, str(seconds), mlflow, **variables) as process:
        try:
            printed, complained = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, complained
    assert "Traceback" not in complained, complained
    ended = time.time()
    trained, waited, path, finished = printed.split()
    # A thread that hangs would hold it for the minute of the timeout above. To leave takes a second's work, and
    # who gets a seventh of a core while others are busy there too has needed ten for it.
    assert ended - float(finished) < 40, "leaving must not wait for a thread that hangs"
    return float(trained), float(waited), Path(path), complained.splitlines()


def assert_delivered_later(root: Path, path: Path) -> None:
    assert sync([str(path)]) == 0
    assert history(root, path, "x") == [(step, float(step)) for step in range(1, 51)]
    assert run_of(root, path).info.status == "FINISHED"


def test_a_dead_server_costs_two_lines_and_nothing_is_lost(root: Path) -> None:
    trained, waited, path, said = run_alone(root, f"http://user:secret@127.0.0.1:{closed_port()}", 4)
    assert trained < 10
    assert waited < SECONDS
    assert "The run continues" in said[0]
    assert said[-1].endswith(f"python -m manual_backprop.sync {path}")
    assert len(said) == 2, said
    assert "secret" not in "".join(said) + (path / "run.json").read_text()
    assert_delivered_later(root, path)


@pytest.mark.slow
def test_a_server_that_never_answers_costs_seconds(root: Path, hung_server: int) -> None:
    trained, waited, path, said = run_alone(root, f"http://127.0.0.1:{hung_server}", 1)
    assert trained < SECONDS
    assert waited < SECONDS
    assert said[-1].endswith(f"python -m manual_backprop.sync {path}")
    assert_delivered_later(root, path)


@pytest.mark.slow
def test_a_locked_store_costs_seconds(root: Path) -> None:
    import sqlite3

    with sqlite3.connect(root.parent / "mlflow.db") as connection:
        connection.execute("BEGIN EXCLUSIVE")
        trained, waited, path, said = run_alone(root, f"sqlite:///{root.parent / 'mlflow.db'}?timeout=60", 1)
        connection.rollback()
    assert trained < SECONDS
    assert waited < SECONDS
    assert said[-1].endswith(f"python -m manual_backprop.sync {path}")
    assert_delivered_later(root, path)


@pytest.mark.slow
def test_a_store_whose_disk_is_full_costs_seconds(root: Path, tmp_path: Path) -> None:
    """A small file system of its own holds the store and nothing more; later there is room again."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    (tmp_path / "run.py").write_text(textwrap.dedent(RUN))
    small, python = tmp_path / "small", sys.executable
    small.mkdir()
    script = f"""
        mount -t tmpfs -o size=8m none {small} && cp {tmp_path}/mlflow.db {small}/ || exit 9
        head -c 16M /dev/zero > {small}/filler 2>/dev/null
        {python} run.py {root} 4 imported > printed 2> said || exit 8
        {python} -m manual_backprop.sync last > full 2>&1 && exit 7
        rm {small}/filler
        {python} -m manual_backprop.sync last || exit 6
        cp {small}/mlflow.db {tmp_path}/mlflow.db
    """
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        cwd=tmp_path,
        env=environment(MLFLOW_TRACKING_URI=f"sqlite:///{small}/mlflow.db"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    if done.returncode == 9:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    _, waited, path, _ = (tmp_path / "printed").read_text().split()
    assert float(waited) < SECONDS
    said = (tmp_path / "said").read_text().splitlines()
    assert "full" in said[0]
    assert said[-1].endswith(f"python -m manual_backprop.sync {path}")
    assert len(said) == 2, said
    assert "did not accept everything" in (tmp_path / "full").read_text()
    assert (tmp_path / "full").read_text().count("\n") == 1
    assert history(root, Path(path), "x") == [(step, float(step)) for step in range(1, 51)]


@pytest.mark.nightly
def test_a_short_run_waits_for_a_store_that_is_being_created(tmp_path: Path) -> None:
    _, _, path, said = run_alone(tmp_path / "outputs", None, 0.1, mlflow="later")
    assert said == []
    assert history(tmp_path / "outputs", path, "x") == [(step, float(step)) for step in range(1, 51)]


def creating(root: Path, *arguments: str) -> subprocess.Popen:
    """A run that has begun to create the store, and has not finished it."""
    process = start_alone(root, *arguments)
    while sum(file.stat().st_size for file in root.parent.rglob("mlflow.db") if file.is_file()) < 200_000:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    assert not (root.parent / "mlflow.db").exists()
    return process


@pytest.mark.parametrize("place", ["ü (1) @ =", "100% sure"])
def test_a_store_is_created_where_it_is_named(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nowhere else, whatever the folder is called; an empty file counts as none."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / place / "outputs"
    root.mkdir(parents=True)
    (root.parent / "mlflow.db").touch()
    run = create_run_directory(root, "first")
    tracker = LocalTracker(run.path, "lab", "first")
    tracker.log(1, {"x": 1})
    MlflowDelivery(run.path, root).deliver()
    run.release()
    assert history(root, run.path, "x") == [(1, 1.0)]
    assert {path.name for path in tmp_path.iterdir()} == {place}
    assert {path.name for path in root.parent.iterdir()} == {"mlflow.db", "mlflow.db.lock", "outputs"}


@pytest.mark.nightly
def test_a_kill_while_the_store_is_created_harms_no_later_run(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    killed = creating(root, "30", "imported")
    killed.kill()
    killed.communicate()
    _, _, path, said = run_alone(root, None, 0.1)
    assert said == []
    assert history(root, path, "x") == [(step, float(step)) for step in range(1, 51)]
    assert {file.name for file in tmp_path.glob("mlflow.db*")} == {"mlflow.db", "mlflow.db.lock"}


@pytest.mark.nightly
def test_a_short_run_waits_for_a_store_that_another_run_creates(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    other = creating(root, "0.1", "imported")
    with ThreadPoolExecutor() as threads:
        short = threads.submit(run_alone, root, None, 0.1)
        wait_until(lambda: len(list(root.glob("runs/*/metrics.jsonl"))) == 2)
        time.sleep(8)
        other.send_signal(signal.SIGCONT)
        _, waited, path, said = short.result()
    assert waited > 5
    assert said == []
    assert len(history(root, path, "x")) == 50
    printed, complained = other.communicate(timeout=100)
    assert (other.returncode, complained) == (0, "")
    assert len(history(root, Path(printed.split()[2]), "x")) == 50


@pytest.mark.nightly
def test_a_busy_machine_is_no_tracker_that_does_not_answer(root: Path) -> None:
    """MLflow computes for a second before the store is asked first, and here it gets a seventh of a core."""
    _, _, path, said = run_alone(root, None, 0.1, mlflow="starved")
    assert said == []
    assert len(history(root, path, "x")) == 50


@pytest.mark.slow
def test_four_simultaneous_starts_on_a_fresh_store(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    processes = [start_alone(root, "20", "later") for _ in range(4)]
    for process in processes:
        printed, said = process.communicate(timeout=200)
        assert (process.returncode, said) == (0, "")
        assert len(history(root, Path(printed.split()[2]), "x")) == 50


@pytest.mark.slow
def test_a_real_server_that_is_frozen_and_killed(root: Path, tmp_path: Path) -> None:
    """Artifacts go through the server; then it stops in the middle of a run and comes back."""
    import signal

    import torch
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    port = closed_port()
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(tmp_path / "remote")]

    def serve() -> subprocess.Popen:
        server = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=tmp_path
        )
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return server
            time.sleep(0.1)
        raise AssertionError("the server does not start")

    os.environ |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
    server = serve()
    try:
        run = create_run_directory(root, "remote")
        tracker = open_tracker("mlflow", run, root, "lab", "remote")
        tracker.log(1, {"x": 1})
        (tmp_path / "tokenizer.json").write_text("{}")
        parameters = {"parameters": {"weight": torch.zeros(2)}, "optimizer": {"step": torch.zeros(2)}}
        CheckpointManager(run.checkpoints).save(1, parameters, {}, 1.0, files=[tmp_path / "tokenizer.json"])
        deadline = time.monotonic() + 60
        while not run.read()["mlflow"] and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(3)
        os.killpg(server.pid, signal.SIGSTOP)
        tracker.log(2, {"x": 2})
        time.sleep(3)
        start = time.monotonic()
        tracker.finish("FINISHED")
        assert time.monotonic() - start < SECONDS
        run.release()
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        assert sync([str(run.path)]) == 1
        server = serve()
        assert sync([str(run.path)]) == 0
        client = MlflowClient(uri)
        logged = client.get_run(run.read()["mlflow"]["run_id"])
        assert logged.info.status == "FINISHED"
        points = client.get_metric_history(logged.info.run_id, "x")
        assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 2.0)]
        listed = {artifact.path for artifact in client.list_artifacts(logged.info.run_id, "checkpoints/step-000001")}
        parts = {"manifest.json", "state.json", "parameters.safetensors", "tokenizer.json"}
        assert {Path(path).name for path in listed} == parts | {"optimizer.safetensors"}
        (output,) = logged.outputs.model_outputs
        assert client.get_logged_model(output.model_id).status == "READY"
        sent = Path(download_artifacts(f"models:/{output.model_id}", dst_path=str(tmp_path / "sent"), tracking_uri=uri))
        assert {path.name for path in sent.iterdir()} >= {"MLmodel", "requirements.txt", "python_env.yaml"}
        assert {path.name for path in (sent / "step-000001").iterdir()} == parts
        load_checkpoint(sent / "step-000001")
        assert not (run.path / ".model").exists()
    finally:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
            os.environ.pop(name, None)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_trackers_without_mlflow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = create_run_directory(tmp_path, "none")
    tracker = open_tracker("none", run, tmp_path, "lab", "none")
    tracker.log(1, {"x": 1})
    assert tracker.sync() == (run.path / "metrics.jsonl").stat().st_size
    tracker.finish("KILLED")
    assert run.read()["status"] == "KILLED"
    run.release()
    with pytest.raises(ValueError, match="tracking='wandb': expected mlflow or none"):
        open_tracker("wandb", run, tmp_path, "lab", "none")
    end_run(run.path, "FINISHED")
    assert caplog.records == []


def test_sync_says_in_a_line_what_is_wrong(root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    assert sync(["last"]) == 2
    assert "last: there is no run in" in capsys.readouterr().err
    dead = create_run_directory(root, "dead")
    LocalTracker(dead.path, "lab", "dead").log(1, {"x": 1})
    MlflowDelivery(dead.path, root).deliver()
    dead.release()  # as a kill would
    time.sleep(0.01)
    run = create_run_directory(root, "newest")  # no checkpoint: last means the newest start here
    LocalTracker(run.path, "lab", "newest").finish()
    run.release()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{closed_port()}")
    assert sync(["last"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 200
    assert "Connection refused" in said
    assert "secret" not in said
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert sync(["last", "nonsense"]) == 2
    printed = capsys.readouterr()
    assert f"{run.path} is delivered to sqlite" in printed.out
    assert "there is no run 'nonsense'" in printed.err
    assert dead.read()["status"] == run_of(root, dead.path).info.status == "KILLED", "every command tells of the dead"


def test_a_running_run_is_not_synced_by_another_process(root: Path) -> None:
    run = create_run_directory(root, "busy")
    LocalTracker(run.path, "lab", "busy")
    done = subprocess.run(
        [sys.executable, "-m", "manual_backprop.sync", str(run.path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert f"in use by process {os.getpid()}" in done.stderr
    assert done.stderr.count("\n") == 1
    run.release()


def test_credentials_are_not_shown() -> None:
    assert without_credentials("https://user:secret@host:5000/path") == "https://host:5000/path"
    assert without_credentials("sqlite:////data/a@b/mlflow.db") == "sqlite:////data/a@b/mlflow.db"
