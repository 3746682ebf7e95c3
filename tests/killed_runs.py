"""Runs that are killed with -9 again and again, and resumed until they end. A program, started by test_kill.py.

    python killed_runs.py FOLDER KILLS SEED MAX_STEPS KEY=VALUE ...

FOLDER/whole has the uninterrupted run, FOLDER/killed the killed one. torch is imported once; each attempt is a process
of its own, forked before torch has started a thread. A third of the attempts are killed at a random moment, a third
after a random number of steps, and a third kill themselves before a random fsync or rename: of run.json, when
metrics.jsonl is truncated, or inside a save. Prints how many of each kind there were.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manual_backprop.training.command_line import check
from manual_backprop.training.runner import run_job

LONGEST = 300  # [s] of an attempt


def start(root: Path, overrides: list[str], prepare: Callable[[], None] = lambda: None) -> int:
    """Forks a process that makes the run. Returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        root.mkdir(exist_ok=True)
        os.chdir(root)
        terminal = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(terminal, 1)
        os.dup2(terminal, 2)
        prepare()
        run_job(check(overrides).jobs[0].config, root)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def dies_at(point: int) -> None:
    """Makes this process kill itself instead of its fsync or rename number `point`."""
    left = [point]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    os.fsync, os.rename, os.replace = counted(os.fsync), counted(os.rename), counted(os.replace)


def ended(child: int) -> int | None:
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def lines(root: Path) -> int:
    return max((file.read_bytes().count(b"\n") for file in root.glob("outputs/runs/*/metrics.jsonl")), default=0)


def attempt(root: Path, overrides: list[str], kind: str, rng: random.Random, most_steps: int) -> int:
    """Runs one process until it is killed or ends (kind `none` always ends). Returns its exit code."""
    point = rng.randrange(1, 120)
    moment = time.monotonic() + (rng.uniform(0, 2) if kind == "moment" else LONGEST)
    enough = rng.randrange(1, most_steps) if kind != "none" else sys.maxsize
    child = start(root, overrides, (lambda: dies_at(point)) if kind == "point" else lambda: None)
    code, before, seen = None, None, 0
    while code is None and time.monotonic() < moment:
        now = lines(root)
        before = now if before is None or now < before else before  # a resume cuts the file back first
        seen = now - before
        if seen >= enough:
            time.sleep(rng.uniform(0, 0.01))
            break
        time.sleep(0.001)
        code = ended(child)
    if code is None:
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code


def main(folder: Path, kills: int, seed: int, max_steps: int, overrides: list[str]) -> None:
    rng, counts = random.Random(seed), Counter[str]()
    whole = start(folder / "whole", overrides)
    assert os.waitstatus_to_exitcode(os.waitpid(whole, 0)[1]) == 0, (folder / "whole/output.txt").read_text()
    root = folder / "killed"
    while True:
        kind = ("moment", "steps", "point")[sum(counts.values()) % 3] if sum(counts.values()) < kills else "none"
        saved = any(root.glob("outputs/runs/*/checkpoints/step-*"))
        code = attempt(root, ["resume=last"] if saved else overrides, kind, rng, max(2, max_steps // (kills + 2)))
        if code == 0:
            break
        assert code == -signal.SIGKILL, (code, (root / "output.txt").read_text()[-3000:])
        counts[kind] += 1
    assert counts["none"] == 0, "the last attempt is left alone"
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
