"""Tools for tests of command lines: runs commands as processes, and waits for them.

Each command gets a new interpreter. warm_python.py forks from one that has imported torch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from manual_backprop.common.errors import ConfigError
from manual_backprop.config.composition import Composer
from manual_backprop.training.command_line import check_with

ROOT = Path(__file__).parent.parent
PATIENCE = 120.0  # [s]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command: this package, one thread, unbuffered output, and no settings of MLflow."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    given = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return given | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | changes


def words_of(module: str, arguments: tuple[str, ...], flags: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *flags, "-m", module, *arguments]


def command(
    *arguments: str,
    cwd: Path,
    module: str = "manual_backprop.run",
    flags: tuple[str, ...] = (),
    seconds: float = PATIENCE,
    **changes: str,
) -> subprocess.CompletedProcess[str]:
    """Runs `python *flags -m module *arguments` to its end; `changes` are variables of its environment."""
    return subprocess.run(
        words_of(module, arguments, flags),
        cwd=cwd,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


TO_KNOW_IMPORTS = ("-X", "importtime")  # Python's flags for `imported`


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The modules that a command with these flags has imported."""
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}


class Started:
    """A command that runs in the background; it is killed at the end of the test in any case."""

    def __init__(self, *arguments: str, cwd: Path, module: str = "manual_backprop.run", **changes: str):
        self.words, self.cwd, self.changes = words_of(module, arguments), cwd, changes

    def __enter__(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            self.words, cwd=self.cwd, env=environment(**self.changes), stdout=pipe, stderr=pipe, text=True
        )
        return self.process

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()


def wait_until(condition: Callable[[], Any], interval: float = 0.02) -> Any:
    """Calls `condition` every `interval` seconds until it returns a true value, at most for PATIENCE. Returns the
    value."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(interval)
    raise AssertionError("it has not come to pass")


def steps_of(run: Path) -> int:
    """The number of steps in the metrics of a run: its lines without the header."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def free_port() -> int:
    """A port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(*arguments: str, module: str, cwd: Path, address: str, **changes: str) -> Iterator[str]:
    """A context with a running server, `python -m module *arguments`. It waits for the first answer at `address` and
    yields it. At the end the server and all processes that it started are stopped."""
    with tempfile.TemporaryFile("w+") as said:
        server = subprocess.Popen(
            words_of(module, arguments),
            cwd=cwd, env=environment(**changes), stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip

        def answer() -> str | None:
            if server.poll() is not None:
                said.seek(0)
                raise AssertionError(f"the server has ended with {server.returncode}:\n{said.read()}")
            with suppress(OSError), urlopen(address, timeout=5) as response:
                return response.read().decode()
            return None

        try:
            yield wait_until(answer, interval=0.2)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(PATIENCE)


def refused(hydra: Composer, arguments: list[str], multirun: bool = False) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_with(hydra, arguments, multirun)
    return caught.value.violations


def run_compiling(script: str, compiler: str, folder: Path | None, *arguments: str) -> tuple[str, list[str]]:
    """Runs a script that compiles, with its cache in `folder` or the user's cache; a C++ compiler is `there` or
    `missing`.

    Returns its output, and the lines that report that compiling does not work.
    """
    given = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    if folder is not None:
        given["XDG_CACHE_HOME"] = str(folder)
    if compiler == "missing":
        given["CXX"] = "/nowhere/c++"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=given, capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "does not work here" in line]
