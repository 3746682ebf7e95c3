"""Which code made a run, in real git checkouts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import manual_backprop
from manual_backprop.tracking.provenance import write_provenance

PACKAGE = Path(manual_backprop.__file__).parent
FILES = (
    *("__init__.py", "tracking/provenance.py", "common/__init__.py", "common/durable_files.py", "common/errors.py"),
    *("common/startup/__init__.py", "common/startup/shadowing.py"),
)
CHANGED = Path("manual_backprop", "common", "durable_files.py")
SCRIPT = """
import sys
from pathlib import Path
from manual_backprop.tracking.provenance import commit_tags, write_provenance
print(commit_tags()["git_dirty"], [path.name for path in write_provenance(Path(sys.argv[1]), int(sys.argv[2]))])
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    for name in FILES:
        (folder / "manual_backprop" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / name, folder / "manual_backprop" / name)
    (folder / "manual_backprop" / "tracking" / "__init__.py").touch()  # the package's own imports more
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "-m", "first")
    return folder


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


def provenance(checkout: Path, run: Path, step: int = 0) -> str:
    """What the checkout's own copy of the package writes and says."""
    run.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(checkout), "A_TOKEN": "s3cret", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(run), str(step)], capture_output=True, text=True, env=environment, cwd=run
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_clean_checkout_has_no_diff(checkout: Path, tmp_path: Path) -> None:
    assert provenance(checkout, tmp_path / "run") == "false ['packages.txt']"


def test_changes_and_unknown_files_are_kept(checkout: Path, tmp_path: Path) -> None:
    with (checkout / CHANGED).open("a") as file:
        file.write("# an experiment\n")
    (checkout / "notes.txt").write_text("not to be read")
    assert provenance(checkout, tmp_path / "run") == "true ['packages.txt', 'source.diff']"
    diff = (tmp_path / "run" / "source.diff").read_text()
    assert diff.startswith("# not in git: notes.txt\n")
    assert "+# an experiment\n" in diff
    assert "not to be read" not in diff
    git(checkout, "stash")
    git(checkout, "apply", str(tmp_path / "run" / "source.diff"))
    assert (checkout / CHANGED).read_text().endswith("# an experiment\n"), "it can be applied"


def test_a_large_diff_is_cut(checkout: Path, tmp_path: Path) -> None:
    with (checkout / CHANGED).open("a") as file:
        file.write("# a line\n" * 300_000)
    provenance(checkout, tmp_path / "run")
    diff = (tmp_path / "run" / "source.diff").read_text()
    assert len(diff) < 1_100_000
    assert "cut off here" in diff[-100:]


def test_no_program_that_a_checkout_names_is_run(checkout: Path, tmp_path: Path) -> None:
    (checkout / "tell.sh").write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    (checkout / "tell.sh").chmod(0o755)
    git(checkout, "config", "diff.external", str(checkout / "tell.sh"))
    with (checkout / CHANGED).open("a") as file:
        file.write("# changed\n")
    assert "source.diff" in provenance(checkout, tmp_path / "run"), "git is asked for it"
    assert not (tmp_path / "was-run").exists()


def test_packages_and_nothing_of_the_environment(checkout: Path, tmp_path: Path) -> None:
    import torch

    provenance(checkout, tmp_path / "run")
    lines = (tmp_path / "run" / "packages.txt").read_text().splitlines()
    assert lines[0].startswith("# Python 3.")
    assert f"torch=={torch.__version__}" in lines
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").iterdir())
    assert b"s3cret" not in written


def test_what_a_resume_finds_changed_stands_beside_the_first(checkout: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    provenance(checkout, run)
    assert provenance(checkout, run, step=4) == "false ['packages.txt']", "nothing changed"
    with (checkout / CHANGED).open("a") as file:
        file.write("# changed\n")
    assert "source-from-step-000005.diff" in provenance(checkout, run, step=4)
    git(checkout, "checkout", ".")
    assert "source-from-step-000009.diff" in provenance(checkout, run, step=8)
    assert (run / "source-from-step-000009.diff").read_text() == "", "clean again"


def test_this_package(tmp_path: Path) -> None:
    names = [path.name for path in write_provenance(tmp_path)]
    assert names[0] == "packages.txt"
