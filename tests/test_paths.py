"""Paths with any characters: a run writes only its own files, and MLflow finds them."""

import ast
import os
import shlex
import shutil
import sqlite3
import subprocess
import unicodedata
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from command_tools import command
from run_tools import newest, resume, small, write_text

from manual_backprop.common import uris
from manual_backprop.common.errors import InputError
from manual_backprop.compare import main as compare
from manual_backprop.config.plugins import load_plugins
from manual_backprop.evaluate import main as evaluate
from manual_backprop.rerun import main as rerun
from manual_backprop.run import main as run
from manual_backprop.sync import main as sync
from manual_backprop.tracking import create_run_directory
from manual_backprop.tracking.late_delivery import deliver_run
from manual_backprop.tracking.mlflow_delivery import MlflowDelivery, tracking_uri
from manual_backprop.tracking.run_directory import FINISHED, end_run, find_run, read_run
from manual_backprop.tracking.tracker import LocalTracker

PACKAGE = Path(uris.__file__).parents[1]
MARKS = "e#x?p%20 y%&+;,=@!'\"[1](2){3}~$a`\\é."  # é as one character; the trailing dot belongs to it
LONG = "e\u0301 " + "n" * 196 + "."  # é as two; 200 bytes
NAMES = [MARKS, LONG, *(f"a{mark}b" for mark in "#?%&+;,=@!'\" ()[]{}"), "a%23b", "a%2Fb", "a:b", "-a", "..."]


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def decoys(folder: Path, name: str) -> dict[str, bytes | None]:
    """Creates next to `name` a project for each way to misread that name. Returns their content."""
    cut = {name.partition(mark)[0] for mark in name if not mark.isalnum()}
    read = {
        unquote(name),
        quote(os.fsencode(name), safe=""),
        name.replace("+", " "),
        name.strip(". "),
        name.replace("\\", ""),
    }
    forms = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
    for other in (cut | read | forms) - {name, "", ".", ".."}:
        if "/" not in other and len(os.fsencode(other)) <= 255:
            (folder / other / "outputs" / "runs").mkdir(parents=True)
            (folder / other / "mlflow.db").write_text("another project's")
    return tree(folder)


def quoted(path: Path) -> str:
    """A path, quoted for Hydra's grammar."""
    return "'" + str(path).replace("'", "\\'") + "'"


@pytest.fixture(autouse=True)
def no_store_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_path_and_its_uris(name: str, tmp_path: Path) -> None:
    """As MLflow, SQLAlchemy (before and since 2.1) and sqlite read them."""
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import append_to_uri_path, extract_db_type_from_uri

    path = tmp_path / name / "mlflow.db"
    uri = uris.file_uri(path)
    assert uris.path_of(uri) == Path(local_file_uri_to_path(uri)) == path
    assert uris.path_of(append_to_uri_path(uri, "id", "artifacts")) == path / "id" / "artifacts"
    assert uris.sqlite_database(uris.sqlite_uri(path)) == (True, path)
    assert extract_db_type_from_uri(uris.sqlite_uri(path)) == "sqlite"


@pytest.mark.parametrize("name", ["a?b%20", "a%b"])
def test_a_uri_for_a_database_library_that_decodes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLAlchemy before 2.1 takes the text before the question mark, and sqlite decodes it on request."""
    monkeypatch.setattr("importlib.metadata.version", lambda library: "2.0.51")
    (tmp_path / name).mkdir()
    before, _, query = uris.sqlite_uri(tmp_path / name / "x.db").removeprefix("sqlite+pysqlite:///").partition("?")
    assert query == "uri=true"
    sqlite3.connect(before, uri=True).execute("create table x (y)")
    assert [path.name for path in (tmp_path / name).iterdir()] == ["x.db"]


def test_what_may_be_given_as_a_tracking_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path to a database means that database; anything else is passed to MLflow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "store").write_bytes(b"")
    for given, file in {
        "a b.db": "a b.db", f"{tmp_path}/x#1.sqlite": "x#1.sqlite", "store": "store", "~/m.db": "m.db",
        f"file://{tmp_path}/x%20y.db": "x y.db", f"sqlite:///{tmp_path}/x%20y.db": "x y.db",
        f"sqlite:///{tmp_path}/m.db?timeout=9": "m.db",
    }.items():  # fmt: skip
        assert uris.sqlite_database(uris.store_uri(given)) == (True, tmp_path / file), given
    for given in ("http://127.0.0.1:5000", "mlruns", "databricks", "sqlite:///m.db", "postgresql://u:p@h/d"):
        assert uris.store_uri(given) == given
    assert uris.sqlite_database("sqlite+pysqlite:///m.db") == (True, Path("m.db"))
    assert uris.sqlite_database("sqlite:///file:/data/m.db?mode=ro&uri=true") == (True, None)
    assert uris.sqlite_database("sqlite://") == (True, None)
    assert uris.sqlite_database("sqlite-runs") == uris.sqlite_database("http://127.0.0.1:5000") == (False, None)


def test_the_home_of_a_user_that_there_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert uris.expanded("~/m.db") == tmp_path / "m.db"
    for given in ("~nobody-of-that-name/m.db", "./~/m.db", "m~.db"):
        assert uris.expanded(given) == Path(given)
    for arguments in (["~nobody-of-that-name"], ["~nobody-of-that-name@last"]):
        with pytest.raises(InputError, match="there is no run '~nobody-of-that-name"):
            evaluate(arguments)
    with pytest.raises(InputError, match=r"--plugin ~nobody-of-that-name/a\.py: there is no such file"):
        load_plugins(["~nobody-of-that-name/a.py"])


def test_one_place_reads_typed_paths_and_makes_uris_of_them() -> None:
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            text = text or (node.attr if isinstance(node, ast.Attribute) else "")
            if (text.startswith(("file:/", "sqlite:")) and "\n" not in text) or text in ("as_uri", "url2pathname"):
                found.append(file.name)
            if text == "expanduser" and file.name != "home.py":  # asks whether there is a home at all
                found.append(file.name)
    assert set(found) == {"uris.py"}


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_run_stays_in_its_folder_whatever_that_is_called(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Its store is created there too. The name of the folder contains both forms of é and every special character, and
    has 200 bytes."""
    from mlflow import MlflowClient

    beside = decoys(tmp_path, MARKS)
    (tmp_path / MARKS).mkdir()
    below = decoys(tmp_path / MARKS, LONG)
    folder = tmp_path / MARKS / LONG
    folder.mkdir()
    os.chdir(folder)
    text = write_text(folder / "text.txt")
    options = [
        *small(f"dataset.path={quoted(text)}", "training.max_steps=2", "tracking=mlflow"),
        "kernels.compile=never",
    ]
    run(options)
    done = newest(folder)
    resume(folder, f"resume={quoted(done)}", "training.max_steps=4")
    assert sync([str(done)]) == 0
    assert not evaluate([str(done)])
    assert compare([str(done), "--picture", str(folder / "c.png")]) == 0
    assert rerun([str(done), "tracking=none"]) == 0
    client, known = MlflowClient(tracking_uri(folder / "outputs")), read_run(done)["mlflow"]
    there = client.get_run(known["run_id"])
    assert there.info.status == FINISHED
    assert [point.step for point in client.get_metric_history(known["run_id"], "train/loss")] == [1, 2, 3, 4]
    assert {"checkpoints", "config.yaml", "training_progress.png"} <= {
        one.path for one in client.list_artifacts(known["run_id"])
    }
    assert uris.path_of(there.info.artifact_uri) == folder / "outputs/artifacts" / known["run_id"] / "artifacts"
    assert {path.name for path in folder.iterdir()} == {"c.png", "mlflow.db", "mlflow.db.lock", "outputs", "text.txt"}
    kept = {name: content for name, content in tree(tmp_path / MARKS).items() if not name.startswith(LONG)}
    assert kept == below
    assert {name: content for name, content in tree(tmp_path).items() if not name.startswith(MARKS)} == beside
    assert "fails" not in capfd.readouterr().err


@pytest.mark.nightly
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", [*NAMES, "${now:%Y}", "a\nb", "a\tb"])
def test_every_name_by_itself(name: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    beside, folder = decoys(tmp_path, name), tmp_path / name
    folder.mkdir()
    os.chdir(folder)
    text = write_text(folder / "text.txt")
    run([*small(f"dataset.path={text.name}", "training.max_steps=2", "tracking=mlflow"), "kernels.compile=never"])
    assert read_run(newest(folder))["mlflow"]["delivered"]
    assert {path.name for path in folder.iterdir()} == {"mlflow.db", "mlflow.db.lock", "outputs", "text.txt"}
    assert {one: content for one, content in tree(tmp_path).items() if not one.startswith(name)} == beside
    assert "MLflow" not in capfd.readouterr().err


@pytest.mark.nightly
def test_a_sweep_stays_in_its_folder(tmp_path: Path) -> None:
    name = "${now:%Y} " + MARKS
    beside, folder = decoys(tmp_path, name), tmp_path / name
    folder.mkdir()
    write_text(folder / "text.txt")
    options = small("dataset.path=text.txt", "training.max_steps=2", "tracking=mlflow", "seed=1,2")
    done = command("-m", *options, "kernels.compile=never", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert len(list(folder.glob("outputs/runs/*/training_progress.png"))) == 2
    assert len(list(folder.glob("outputs/sweeps/*/table.csv"))) == 1
    assert {one: content for one, content in tree(tmp_path).items() if not one.startswith(name)} == beside


@pytest.fixture
def project(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a run in MLflow, as the working directory."""
    folder = tmp_path / "my project"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    monkeypatch.chdir(folder)
    finished_run(folder)
    return folder


def finished_run(project: Path, experiment: str = "lab") -> Path:
    directory = create_run_directory(project / "outputs", "one")
    tracker = LocalTracker(directory.path, experiment, "one")
    tracker.log(1, {"x": 1})
    tracker.set_tags({"run_directory": directory.path})
    (directory.path / "note.txt").write_text("of this run")
    tracker.log_artifact(directory.path / "note.txt")
    end_run(directory.path, FINISHED)
    MlflowDelivery(directory.path, project / "outputs").deliver(final=True)
    directory.release()
    return directory.path


def artifacts(run: Path, project: Path) -> list[str]:
    from mlflow import MlflowClient

    client, known = MlflowClient(tracking_uri(project / "outputs")), read_run(run)["mlflow"]
    assert client.get_run(known["run_id"]).data.tags["run_directory"] == str(run)
    assert [point.value for point in client.get_metric_history(known["run_id"], "x")] == [1]
    return [one.path for one in client.list_artifacts(known["run_id"])]


def test_a_project_that_was_moved_tells_what_brings_its_artifacts(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow keeps an experiment's location: nothing is written to the old place until the user says so."""
    moved = project.rename(project.with_name("moved #1"))
    monkeypatch.chdir(moved)
    old, new = newest(moved), finished_run(moved)
    deliver_run(str(old), Path("outputs"))
    assert not project.exists()
    assert artifacts(old, moved) == artifacts(new, moved) == []
    first, again = (record.getMessage() for record in caplog.records)
    assert str(new) in first
    assert "\n" not in first + again
    command, _, then = again.partition("moved from there: ")[2].rpartition(" && ")
    subprocess.run(command, shell=True, check=True)
    assert shlex.split(then) == ["python", "-m", "manual_backprop.sync", str(old)]
    assert sync([str(old), str(new)]) == 0
    assert artifacts(old, moved) == artifacts(new, moved) == ["note.txt"]


def test_a_project_that_was_copied_leaves_the_other_alone(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(project, project.with_name("copy")))
    before = tree(project)
    monkeypatch.chdir(copy)
    old, new = newest(copy), finished_run(copy)
    deliver_run(str(old), Path("outputs"))
    assert artifacts(new, copy) == []
    assert {record.getMessage().rpartition("; ")[2] for record in caplog.records} == {
        f"runs with experiment_name=lab-2 get a location in {copy / 'outputs'}"
    }
    assert artifacts(finished_run(copy, "lab-2"), copy) == ["note.txt"]
    assert tree(project) == before


def test_a_run_is_the_same_by_the_way_of_a_symbolic_link(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`outputs` is on another disk: the run's store and address are still those of the project."""
    disk = project.parent / "disk"
    disk.mkdir()
    shutil.move(project / "outputs", disk / "outputs")
    (project / "outputs").symlink_to(disk / "outputs")
    named, real = newest(project), newest(disk)
    before = read_run(named)
    for place in (project, disk, project.parent):
        monkeypatch.chdir(place)
        assert sync([str(real)]) == sync([str(named)]) == 0
        assert read_run(named) == before
    assert {path.name for path in disk.iterdir()} == {"outputs"}
    assert artifacts(named, project) == ["note.txt"]
    assert find_run(project / "outputs", str(real)).path == named
