"""Run directories with real processes: unique names, one owner, the truth about the dead."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from manual_backprop.checkpoints.checkpoint import CheckpointManager
from manual_backprop.common.errors import CheckpointError, InputError, RunInUseError, StorageError
from manual_backprop.common.machine import boot_id, is_on_local_file_system
from manual_backprop.tracking import run_directory
from manual_backprop.tracking.run_directory import (
    close_dead_runs,
    create_run_directory,
    end_run,
    find_run,
    list_runs,
    open_run_directory,
    own_run_directory,
    read_run,
)


def start(script: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


OWNER = """
    import sys
    from manual_backprop.tracking.run_directory import create_run_directory
    run = create_run_directory(sys.argv[1], "owned")
    print(run.path, flush=True)
    sys.stdin.read()
"""


def killed_run(root: Path) -> Path:
    owner = start(OWNER, root)
    path = Path(owner.stdout.readline().strip())
    owner.kill()
    owner.communicate()
    return path


def test_a_new_run_says_who_owns_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "model=a b"])
    run = create_run_directory(tmp_path / "outputs", "small/python docs")
    content = read_run(run.path)
    assert run.path.parent == tmp_path / "outputs" / "runs"
    assert run.path.name.split("-", 2)[2].rsplit("-", 1)[0] == "small-python-docs"
    assert content["run_id"] == run.run_id == run.path.name
    assert content["owner"]["pid"] == os.getpid()
    assert (content["status"], content["command"]) == ("RUNNING", "run.py 'model=a b'")
    assert run.samples.is_dir()
    assert run.checkpoints.is_dir()
    end_run(run.path, "FAILED")
    assert run.read()["status"] == "FAILED"
    assert run.read()["ended_at"] > run.read()["started_at"]
    run.release()


@pytest.mark.parametrize("name", ["", "...", "/", "ü" * 300, "x" * 300])
def test_any_run_name_makes_a_directory(tmp_path: Path, name: str) -> None:
    run = create_run_directory(tmp_path, name)
    assert run.path.parent == tmp_path / "runs"
    assert run.read()["run_name"] == name
    run.release()


@pytest.mark.slow
def test_twenty_simultaneous_starts_get_twenty_directories(tmp_path: Path) -> None:
    script = """
        import sys
        from manual_backprop.tracking.run_directory import create_run_directory
        print("ready", flush=True)
        sys.stdin.readline()
        print(create_run_directory(sys.argv[1], "same").path)
    """
    processes = [start(script, tmp_path) for _ in range(20)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    paths = {process.communicate()[0].strip() for process in processes}
    assert len(paths) == 20
    assert {str(path) for path in list_runs(tmp_path)} == paths


def test_a_second_process_learns_the_pid_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = start(OWNER, tmp_path)
    path = Path(owner.stdout.readline().strip())
    with pytest.raises(RunInUseError, match=rf"in use by process {owner.pid} on "):
        open_run_directory(path, step=0)
    with pytest.raises(RunInUseError):
        own_run_directory(path)
    assert close_dead_runs(tmp_path) == [], "its owner lives"
    assert read_run(path)["status"] == "RUNNING"
    owner.communicate()
    monkeypatch.setattr(sys, "argv", ["again"])
    run = open_run_directory(path, step=7)
    content = run.read()
    assert content["owner"]["pid"] == os.getpid()
    assert content["resumes"][0] | {"at": ""} == {
        "at": "",
        "step": 7,
        "command": "again",
        "previous_status": "KILLED",  # it was dead, which the opening finds out
        "changed": {},
    }
    assert content["started_at"] > content["created_at"]
    run.release()


def test_a_run_whose_owner_was_killed_is_marked_once(tmp_path: Path) -> None:
    path = killed_run(tmp_path)
    assert read_run(path)["status"] == "RUNNING"
    own = create_run_directory(tmp_path, "mine")
    assert close_dead_runs(tmp_path) == [path]
    assert close_dead_runs(tmp_path) == []
    assert (read_run(path)["status"], own.read()["status"]) == ("KILLED", "RUNNING")
    own.release()


def test_a_dead_owner_is_known_by_its_lock_whatever_its_machine_was_called(tmp_path: Path, monkeypatch, caplog) -> None:
    """On a file system that other machines may write the lock alone does not tell: there the kernel's boot does."""

    def owned_by(**owner: str | None) -> None:
        content = read_run(path)
        content["owner"] = {**content["owner"], **owner}
        content["status"] = "RUNNING"
        (path / "run.json").write_text(json.dumps(content))

    path = killed_run(tmp_path)
    owned_by(host="elsewhere", boot=None)
    assert close_dead_runs(tmp_path) == [path], "a file system of this kernel alone"
    assert read_run(path)["status"] == "KILLED"

    monkeypatch.setattr(
        run_directory, "is_on_local_file_system", lambda path: False
    )  # as on NFS, which tests cannot mount
    owned_by(host="elsewhere", boot=boot_id())
    assert close_dead_runs(tmp_path) == [path], "the machine was renamed, a container has ended"
    assert caplog.text == ""
    for boot in (None, "another"):
        owned_by(host="elsewhere", boot=boot)
        caplog.clear()
        assert close_dead_runs(tmp_path) == []
        assert "on the machine elsewhere, which cannot be checked from here. If it has ended: python -m" in caplog.text
        assert f"manual_backprop.sync {path}" in caplog.text
    holder = own_run_directory(path)  # what `sync` does
    assert read_run(path)["status"] == "KILLED"
    holder.release()


def test_file_systems_of_this_kernel() -> None:
    assert is_on_local_file_system(Path("/dev/shm"))
    assert not is_on_local_file_system(Path("/proc/self"))


def with_checkpoints(root: Path, name: str, *metrics: float) -> Path:
    run = create_run_directory(root, name)
    for step, metric in enumerate(metrics, start=1):
        CheckpointManager(run.checkpoints).save(step, {}, {}, metric)
    run.release()
    return run.path


def test_runs_are_found_by_word_id_and_path(tmp_path: Path) -> None:
    first = with_checkpoints(tmp_path, "first", 3.0)
    second = with_checkpoints(tmp_path, "second", 1.0, 2.0)
    third = with_checkpoints(tmp_path, "third")
    assert list_runs(tmp_path) == [first, second, third]
    assert find_run(tmp_path, "last").path == second, "the newest start that has a checkpoint"
    assert find_run(tmp_path, "last").checkpoint == second / "checkpoints" / "step-000002"
    assert find_run(tmp_path, "best").checkpoint == second / "checkpoints" / "step-000001"
    for which in (first.name, first.name[-6:], str(first), str(first / "checkpoints" / "step-000001")):
        found = find_run(tmp_path, which)
        assert (found.path, found.checkpoint) == (first, first / "checkpoints" / "step-000001")
    assert find_run(tmp_path, third.name).checkpoint is None
    with pytest.raises(InputError, match=rf"no run 'nonsense'.*the newest runs.*{third.name}, {second.name}"):
        find_run(tmp_path, "nonsense")

    again = open_run_directory(first, step=1)
    again.update(mlflow={"run_id": "abc123", "tracking_uri": "http://tracker"})
    again.release()
    assert find_run(tmp_path, "last").path == first, "a resume is a start"
    assert find_run(tmp_path, "abc123").path == first, "by MLflow's id, without MLflow"

    state = first / "checkpoints" / "step-000001" / "state.json"
    state.write_text(state.read_text() + " ")
    assert find_run(tmp_path, "last").path == second, "a damaged checkpoint does not count"
    with pytest.raises(CheckpointError, match=r"no run in .* has a sound checkpoint"):
        find_run(tmp_path / "empty", "last")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a run directory"):
        open_run_directory(tmp_path, step=0)
    for content in (
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        '{"version": 1, "status": "SLEEPING", "owner": {}, "started_at": ""}',
    ):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(InputError, match=r"run.json is"):
            read_run(tmp_path)
    broken = tmp_path / "outputs" / "runs" / "broken"
    broken.mkdir(parents=True)
    (broken / "run.json").write_text("{")
    assert list_runs(tmp_path / "outputs") == []
    assert close_dead_runs(tmp_path / "outputs") == []


def test_an_unwritable_place_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot create a run directory in .*: Not a directory"):
        create_run_directory(tmp_path / "file", "x")
    for place in ("/proc", "/sys"):
        if Path(place).is_dir():
            with pytest.raises(StorageError, match="cannot create a run directory"):
                create_run_directory(place, "x")


def test_kill_9_while_run_json_is_replaced_leaves_a_whole_one(tmp_path: Path) -> None:
    script = """
        import sys
        from manual_backprop.tracking.run_directory import create_run_directory
        run = create_run_directory(sys.argv[1], "busy")
        print(run.path, flush=True)
        count = 0
        while True:
            count += 1
            run.update(count=count, padding="x" * 10000)
    """
    for _ in range(3):
        process = start(script, tmp_path)
        path = Path(process.stdout.readline().strip())
        for _ in range(50):
            read_run(path)  # a reader never sees a part
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert read_run(path)["status"] == "RUNNING"
