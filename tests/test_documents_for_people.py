"""README.md, CONTRIBUTING.md and docs/ tell the truth: every command and every Python block is run, every link leads
somewhere, and a number has its command beside it.

A training is run with fewer steps and otherwise as it stands. What is not run here is run by `.ci/run`, and that is
checked. The listings in docs/one-step.md are no commands: `explain` writes them, and test_explain.py compares them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from manual_backprop.tracking.run_directory import list_runs, read_run

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))
SET_UP = "python3 -m venv"  # the two commands that .ci/run and a new user type
SHOWS = ("--help", "--version", "plan=true")  # what ends at once
# What a reader puts in, and what is put in here. RUN_DIRECTORY and the like are the newest run.
PLACEHOLDERS = {"FILE": "README.md", "TEXT": "README.md", "experiments=NAME": "experiments=overfit_one_batch"}
PLACEHOLDERS |= {"model=NAME": "model=tiny", "FOLDER": "docs"}
RUNS = ("RUN_DIRECTORY", "RUN_ID", "RUN")
SHORT = {
    "training.max_steps": "2",
    "training.eval_batches": "1",
    "training.sample_length": "2",
    "device.threads": "1",
}


def blocks(language: str, pages: tuple[str, ...] = PAGES) -> list[str]:
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages if page != "docs/one-step.md")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def written() -> list[str]:
    """Every command: the lines of bash blocks, and what stands in backticks."""
    lines = [line.split("  #")[0].split(" # ")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += re.findall(r"`((?:python -m |python tests/|manual-backprop |mlflow )[^`\n]+)`", text)
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def kind(command: str) -> str:
    """Who runs it."""
    if command.startswith(SET_UP):
        return "set-up"
    if command.startswith(
        ("python -m pytest", "ruff ", "python tests/mutate.py", "python -m manual_backprop.tools.levels")
    ):
        return "checked in .ci/run"
    if command.startswith("mlflow ui"):
        return "server"
    if command.startswith(("mlflow models serve", "curl ")):
        return "served model"
    if command.startswith(("source ", "eval ")):
        return "shell"
    if not command.startswith(("python -m manual_backprop", "manual-backprop ")):
        return "nobody"
    words = shlex.split(command)
    return "shown" if set(words) & set(SHOWS) or words == ["python", "-m", "manual_backprop"] else "job"


def of_kind(name: str) -> list[str]:
    return [command for command in written() if kind(command) == name]


def arguments_of(command: str, place: Path) -> list[str]:
    """The command as a list to be run in `place`, with a reader's own words put in."""
    for word, value in PLACEHOLDERS.items():
        command = re.sub(rf"\b{re.escape(word)}\b", value, command)
    for word in RUNS:
        if re.search(rf"\b{word}\b", command):
            command = re.sub(rf"\b{word}\b", str(list_runs(place / "outputs")[-1]), command)
    words = shlex.split(command)
    if words[0] == "manual-backprop":
        return ["-m", "manual_backprop.run", *words[1:]]
    return words[1:]


def shortened(words: list[str]) -> list[str]:
    """A training of a few steps, a bench of one turn; all else as it is."""
    module, given = words[1], words[2:]
    if module == "manual_backprop.bench":
        return [*words, "--model", "tiny", "--rounds", "1", "--batch-size", "2", "--threads", "1"]
    if module == "manual_backprop.tools.inspection_cost":
        return [*words, "model=tiny", "--rounds", "1", "--every", "5", "--looks", "1"]
    if module == "manual_backprop.tools.tracking_cost":
        return [*words, "--model", "tiny", "--rounds", "1", "--steps", "20", "--threads", "1"]
    if module == "manual_backprop.tools.parallel_runs":
        return [*words[:2], "--rounds", "1", "--jobs", "2"]
    if module == "manual_backprop.verify" and given:
        return [*words, *(["model=tiny"] if not any(word.startswith("model=") for word in given) else [])]
    if module != "manual_backprop.run":
        return words
    if any(word.startswith("sweep.resume=") for word in given):
        return words
    if any(word.startswith("resume=") for word in given):
        kept = [word for word in words if not word.startswith("training.max_steps=")]
        return [*kept, f"training.max_steps={4 if len(kept) < len(words) else 6}"]  # of a run that made 2
    named = {word.partition("=")[0] for word in given}
    changed = [word for word in words if word.partition("=")[0] not in SHORT]
    changed += [f"{key}={value}" for key, value in SHORT.items()]
    changed += ["hydra.sweeper.n_trials=2"] if "hydra/sweeper=search" in given else []
    return changed + (["model=tiny"] if not named & {"model", "experiments"} else [])


def run(words: list[str], cwd: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader stands: a checkout's README, and one run behind them."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copy2(ROOT / "README.md", folder)
    (folder / "docs").mkdir()
    shutil.copy2(ROOT / "docs" / "one-step.md", folder / "docs")
    first = ["-m", "manual_backprop.run", "model=tiny", "training.save_every=2"]
    done = run(shortened(first), folder, 300)
    assert done.returncode == 0, done.stderr
    return folder


def mlflow_id(place: Path) -> str:
    """Of the first run in `place`."""
    return read_run(list_runs(place / "outputs")[0])["mlflow"]["run_id"]


def test_every_command_is_run_by_somebody() -> None:
    assert of_kind("nobody") == []
    assert of_kind("job")
    assert of_kind("shown")


@pytest.mark.parametrize("block", [block for block in blocks("python") if "RUN_ID" not in block])
def test_python_blocks_run(block: str, tmp_path: Path) -> None:
    done = run(["-c", block], tmp_path, 120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example shows something"


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in blocks("python") if "RUN_ID" in block])
def test_python_blocks_about_a_run(block: str, place: Path) -> None:
    done = run(["-c", block.replace("RUN_ID", mlflow_id(place))], place, 120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example shows something"


@pytest.mark.parametrize("command", of_kind("shown"))
def test_what_ends_at_once_is_run_as_it_is(command: str, tmp_path: Path) -> None:
    done = run(arguments_of(command, tmp_path), tmp_path, 120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", of_kind("job"))
def test_jobs_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's whole command line passes its check, not shortened: fast, and before the slow test below."""
    from manual_backprop.command_line import check

    monkeypatch.chdir(ROOT)
    words = arguments_of(command.replace("RUN", "last"), ROOT)
    goes_on = ("resume=", "sweep.resume=", "init_from=")  # from what earlier commands left: the slow test has that
    if words[1] == "manual_backprop.run" and not any(word.startswith(goes_on) for word in words):
        assert check([word for word in words[2:] if word != "-m"], multirun="-m" in words[2:]).jobs


@pytest.mark.slow
@pytest.mark.parametrize("command", of_kind("job"))
def test_jobs_run(command: str, place: Path) -> None:
    done = run(shortened(arguments_of(command, place)), place, 600)
    # a bar that is missed is exit 1, and this short it says nothing
    good = (0, 1) if command.endswith("_cost") and "noise" in done.stdout else (0,)
    assert done.returncode in good, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.strip() or done.stderr.strip()


@pytest.mark.slow
@pytest.mark.parametrize("command", of_kind("server"))
def test_the_page_to_compare_runs_is_served(command: str, place: Path) -> None:
    port = free_port()
    with serving([*shlex.split(command), "--port", str(port)], place, f"http://127.0.0.1:{port}/") as page:
        assert "MLflow" in page


@pytest.mark.slow
def test_the_model_is_served(place: Path) -> None:
    """What `mlflow models serve` and the `curl` behind it say, at a port that is free."""
    serve, ask = of_kind("served model")
    port = str(free_port())
    words = [port if word == "5001" else word.replace("RUN_ID", mlflow_id(place)) for word in shlex.split(serve)]
    with serving(words, place, f"http://127.0.0.1:{port}/ping"):
        _, address, header, content_type, data, body = shlex.split(ask)
        assert (header, data) == ("-H", "-d")
        name, _, value = content_type.partition(": ")
        request = Request(address.replace("5001", port), body.encode(), {name: value})
        with urlopen(request, timeout=60) as answer:
            (text,) = json.load(answer)["predictions"]
    assert isinstance(text, str)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(words: list[str], place: Path, address: str) -> Iterator[str]:
    """`mlflow ...` as a process, once it answers at `address`: with what."""
    server = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=place,
        env={
            **os.environ,
            "MLFLOW_TRACKING_URI": f"sqlite:///{place / 'mlflow.db'}",
            "PATH": os.pathsep.join(
                (str(Path(sys.executable).parent), os.environ["PATH"])
            ),  # activated, as README says
        },
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None
            try:
                with urlopen(address, timeout=5) as answer:
                    page = answer.read().decode()
                break
            except (URLError, ConnectionError, TimeoutError):
                assert time.monotonic() < deadline, "nobody answers"
                time.sleep(0.3)
        yield page
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_the_rest_is_run_by_ci() -> None:
    """The set-up as it stands; formatting, lint, types and both halves of the tests."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert lines[0].startswith(SET_UP)
    assert lines[0].endswith("-m manual_backprop.run model=small")
    assert kind(lines[0].partition(" && ")[2].rpartition("bin/")[2]) == "job", "and its last part is run above"
    assert lines[1].startswith(SET_UP)
    assert lines[1].endswith("-m pytest")
    (pattern,) = re.findall(r"sed -n 's/(.+)/\\1/p' README.md", ci)
    assert re.search(pattern.replace("\\(", "(").replace("\\)", ")"), lines[1]), (
        ".ci/run reads that line from README.md"
    )
    others = [path for path in Path(__file__).parent.glob("test_*.py") if path.name != Path(__file__).name]
    tests = "".join(path.read_text(encoding="utf-8") for path in others)
    here = {
        "python -m pytest": lines[1].endswith("-m pytest"),
        "python -m pytest -m slow": "pytest -m slow" in ci,
        "python -m pytest -m gradients": "pytestmark = pytest.mark.gradients" in tests,  # a part of the first
        "python tests/mutate.py": "mutate(seconds=" in tests,  # one of the slow ones
        "python -m manual_backprop.tools.levels": '"manual_backprop.tools.levels"' in tests,  # another
        "ruff format . && ruff check . && mypy": all(word in ci for word in ("ruff format", "ruff check", "mypy")),
    }
    for command in of_kind("checked in .ci/run"):
        assert here[command], command


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
            if not target.startswith(("http:", "https:")):
                assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_each_number_of_the_readme_has_its_command_beside_it() -> None:
    """In the table of numbers, in its row."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .+ \|$", page.partition("## The numbers")[2], flags=re.MULTILINE)[1:]
    assert rows
    for row in rows:
        measured, _, beside = row.strip("| ").rpartition("|")
        assert re.search(r"\d", measured), row
        assert re.search(r"`(python|manual-backprop) ", beside), row
