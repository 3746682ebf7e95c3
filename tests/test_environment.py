"""Unusual machines: files next to the command, settings of matplotlib, no home directory, no user name."""

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from command_tools import command, environment
from run_tools import metric, train

from manual_backprop.common import pictures
from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.common.startup import home, shadowing
from manual_backprop.trained_models.chat import Chat
from manual_backprop.trained_models.saved_model import load
from manual_backprop.trained_models.text_stream import Sampling

# Files that hide what a command imports, and others that do not.
HIDING = [
    "random.py",
    "mlflow.py",
    "tokenizers/__init__.py",
    "datasets/__init__.py",
    "yaml.py",
    "google.py",
    "typing.py",
]
HARMLESS = [
    "train.py",
    "datasets/a.txt",
    "mlflow/a.txt",
    "turtle.py",
    "sys.py",
    "os.py",
    "wheel.py",
    "random",
    "my.random.py",
]


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("raise RuntimeError('it was imported')\n")


@pytest.mark.parametrize("module", ["manual_backprop", "manual_backprop.run", "manual_backprop.tools.inspect"])
def test_a_file_that_hides_a_library_is_named(module: str, tmp_path: Path) -> None:
    put(tmp_path, *HARMLESS)
    assert command("--help", cwd=tmp_path, module=module).returncode == 0
    put(tmp_path, "random.py", "csv/__init__.py")
    done = command("--help", cwd=tmp_path, module=module)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"{tmp_path / 'csv'}/ and {tmp_path / 'random.py'} would be imported in place of" in done.stderr


@pytest.mark.parametrize("name", [*HIDING, *HARMLESS])
def test_which_files_hide_a_library(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (
        "random",
        "mlflow",
        "tokenizers",
        "datasets",
        "yaml",
        "google",
        "typing",
    ):  # as before they are imported
        monkeypatch.delitem(sys.modules, module, raising=False)
    put(tmp_path, name)
    shown = name.removesuffix("__init__.py")
    assert shadowing._shadows(str(tmp_path)) == ([shown] if name in HIDING else [])


def test_the_libraries_that_are_looked_for_are_those_of_setup_cfg() -> None:
    from configparser import ConfigParser

    parser = ConfigParser()
    parser.read(Path(__file__).parents[1] / "setup.cfg")
    extras = parser["options.extras_require"]
    lines = [
        parser["options"]["install_requires"],
        *(extras[name] for name in ("joblib", "optuna", "submitit", "dates")),
    ]
    names = {line.split()[0] for part in lines for line in part.splitlines() if line.strip()}
    assert names == set(shadowing.DEPENDENCIES)


DRAWING = """
import logging
from pathlib import Path
from manual_backprop.common.pictures import new_figure, picture, save_figure

@picture
def draw(path):
    figure = new_figure(2, 2)
    figure.subplots().set_title("a title")
    save_figure(figure, path)

logging.basicConfig()
assert draw(Path("a picture.png"))
"""


@pytest.mark.parametrize("settings", [b"\xff\xfe", b"text.usetex: True\nfigure.dpi: many\n"], ids=["bytes", "words"])
def test_pictures_are_drawn_whatever_matplotlib_is_told(settings: bytes, tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_bytes(settings)
    done = subprocess.run(
        [sys.executable, "-c", DRAWING], cwd=tmp_path, env=environment(MPLBACKEND="module://nowhere.backend"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_fails_costs_one_warning(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """It costs no step of the run, although the run draws it twice."""
    monkeypatch.setattr("manual_backprop.training.training_progress.with_grid", lambda axes: 1 / 0)
    monkeypatch.setattr(pictures, "_failed", set())
    from run_tools import same_process

    with same_process():
        run = train(tmp_path, text, "training.max_steps=4", "training.eval_every=2")
    assert capfd.readouterr().err.count("a picture cannot be drawn and is left out (ZeroDivisionError") == 1
    assert len(metric(run, "train/loss")) == 4
    assert not list(run.glob("*.png"))


UNKNOWN_USER = """
import getpass, os, pwd, tempfile  # while whatever user this is may read them
from pathlib import Path
from manual_backprop.common.exit_codes import exit_code_of

def command():
    assert str(Path.home()) == os.path.expanduser("~")
    assert getpass.getuser()
    print(Path.home())

if os.getuid() == 0:
    os.setgroups([]); os.setgid(54321); os.setuid(54321)  # whom no machine knows
raise SystemExit(exit_code_of(command))
"""
NAMES = ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME")


def test_a_user_whom_the_machine_does_not_know_has_a_home() -> None:
    """Without a home directory MLflow could not be imported, and no kernel be cached."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        given = {name: value for name, value in environment(TMPDIR=folder).items() if name not in NAMES}
        words = [sys.executable, "-c", UNKNOWN_USER]
        done = subprocess.run(words, env=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if os.getuid() == 0:
            assert done.stdout == f"{folder}/manual_backprop-54321\n"


@pytest.mark.parametrize("spoil", [lambda place: place.chmod(0o777), lambda place: place.write_text("a file")])
def test_a_folder_that_others_may_write_is_not_run_from(
    spoil: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = tmp_path / f"manual_backprop-{os.getuid()}"
    if "chmod" in spoil.__code__.co_names:
        place.mkdir()
    spoil(place)
    with pytest.raises(OSError, match="manual_backprop-"):
        home.private_folder()


def test_half_a_character_that_is_typed_ends_no_conversation(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"th\xc3\nquit\n"), "utf-8", errors="strict"))
    saved = load(str(finished))
    chat = Chat(saved, saved.tokenizer(), Sampling(1, 0.0, 0, None, None))
    assert exit_code_of(chat.run) == 0  # type: ignore[arg-type]
    assert "th\N{REPLACEMENT CHARACTER}" in capsys.readouterr().out
