"""README.md and CONTRIBUTING.md tell the truth: their Python runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md")
SET_UP = "python3 -m venv"  # these two are what .ci/run and a new user type
SERVES = ("mlflow ui", "ruff", "python tests/mutate.py", "python -m pytest")  # .ci/run runs them, or they never end


def blocks(language: str) -> list[str]:
    pages = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    return re.findall(rf"^```{language}\n(.*?)^```", pages, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith((SET_UP, *SERVES))]


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks_run(number: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[number]],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example shows something"


@pytest.mark.parametrize("command", commands())
def test_commands_are_accepted(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's command line passes its check; another command's options are ones that its parser knows."""
    program, *arguments = shlex.split(command, comments=True)[2:] if command.startswith("python -m") else [command]
    if program == "manual_backprop.run" and "--help" not in arguments:
        from manual_backprop.command_line import check

        monkeypatch.chdir(ROOT)
        multirun = "-m" in arguments
        checked = check([argument for argument in arguments if argument != "-m"], multirun=multirun)
        assert len(checked.jobs) == (4 if multirun else 1)
        return
    assert program.startswith("manual_backprop"), f"{command!r} is run by nothing"
    done = subprocess.run(
        [sys.executable, "-m", program, *arguments, *(["--help"] if program != "manual_backprop" else [])],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page} links to {target}"


def test_setup_commands_are_one_line_each() -> None:
    """The first two commands of the README; .ci/run reads the second from there."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert lines[0].startswith(SET_UP)
    assert lines[0].endswith("-m manual_backprop.run model=small")
    assert lines[1].startswith(SET_UP)
    assert lines[1].endswith("-m pytest")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
