"""Runs `python -m MODULE ...` or `-c CODE` in a process that is forked from one that has imported torch and MLflow.

Importing them is most of the time of a short command. Nothing of this project is imported before the fork, so a command
imports and registers its modules as usual; it also has its own arguments, folder, output, environment and exit code.
Tests that depend on a new interpreter (signals at start-up, order of imports) need a real one.

This file has both sides: `WarmPython` for the tests, and the program that forks, which it starts.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType

LIBRARIES = ("torch", "hydra", "matplotlib.pyplot", "mlflow", "mlflow.store.tracking.sqlalchemy_store")


class WarmPython:
    """Runs commands one after the other. It is a context, which stops the forking process at its end."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = dict(environment) | {"MLFLOW_DISABLE_TELEMETRY": "true"}  # which would start a thread
        self.server: subprocess.Popen[str] | None = None

    def __enter__(self) -> WarmPython:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._kill()

    def run(self, words: Sequence[str], cwd: Path, seconds: float) -> subprocess.CompletedProcess[str]:
        """Runs `python *words`, where `words` begin with -m or -c. Raises subprocess.TimeoutExpired after `seconds`."""
        if words[0] not in ("-m", "-c"):
            raise ValueError(f"{words[0]}: expected -m and a module, or -c and code")
        server = self._started()
        assert server.stdin is not None
        assert server.stdout is not None
        with tempfile.TemporaryDirectory() as output:
            order = {"flag": words[0], "what": words[1], "arguments": list(words[2:])}
            order |= {"cwd": str(cwd), "output": output}
            server.stdin.write(json.dumps(order) + "\n")
            server.stdin.flush()
            if not select.select([server.stdout], [], [], seconds)[0]:
                self._kill()
                raise subprocess.TimeoutExpired(list(words), seconds)
            code = int(server.stdout.readline())
            out, errors = ((Path(output) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(list(words), code, out, errors)

    def _started(self) -> subprocess.Popen[str]:
        if self.server is None:
            pipe = subprocess.PIPE
            self.server = subprocess.Popen(
                [sys.executable, __file__],
                env=self.environment, stdin=pipe, stdout=pipe, text=True, start_new_session=True,
            )  # fmt: skip
        return self.server

    def _kill(self) -> None:
        if self.server is not None:
            os.killpg(self.server.pid, signal.SIGKILL)  # a command that is still running too
            self.server.communicate()
        self.server = None


def serve() -> None:
    """Forks a command for each request on stdin, and writes its exit code to stdout. Returns at the end of stdin."""
    for name in LIBRARIES:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a process with threads must not be forked"
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")  # the command has 0 and 1 for itself
    for line in iter(orders.readline, ""):
        child = os.fork()
        if child == 0:
            orders.close()
            answers.close()
            become(**json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def become(flag: str, what: str, arguments: list[str], cwd: str, output: str) -> None:
    """Turns this process into `python flag what *arguments`, including its exit code."""
    os.chdir(cwd)
    for number, file in enumerate((os.devnull, f"{output}/stdout", f"{output}/stderr")):
        opened = os.open(file, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    sys.path[0] = cwd
    sys.argv[1:] = arguments
    if flag == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = "-c"
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(main))


if __name__ == "__main__":
    serve()
