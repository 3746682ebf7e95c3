"""For the tests of command lines: a command as a process, and what the check says about one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from manual_backprop.command_line import check_with
from manual_backprop.composition import Composer
from manual_backprop.errors import ConfigError

ROOT = Path(__file__).parent.parent


def command(
    *arguments: str, cwd: Path, module: str = "manual_backprop.run", flags: tuple[str, ...] = (), seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-m", module, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def refused(hydra: Composer, arguments: list[str], multirun: bool = False) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_with(hydra, arguments, multirun)
    return caught.value.violations
