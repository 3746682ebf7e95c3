"""The code of a run: the commit, uncommitted changes, and installed packages.

Environment variables are not recorded, since they may hold tokens and passwords.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

from ..common.durable_files import write_atomically

PACKAGES = "packages.txt"
SOURCE_DIFF = "source.diff"
LARGEST_DIFF = 1_000_000  # [bytes]
MOST_UNTRACKED = 200  # file names


def commit_tags() -> dict[str, str]:
    """git_commit and git_dirty of the checkout that this package runs from; "unknown" for an installed package or
    without git."""
    try:
        here = _checkout()
        commit = _git(here, "rev-parse", "HEAD").strip()
        dirty = bool(_git(here, "status", "--porcelain", "--untracked-files=no").strip())
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": "unknown", "git_dirty": "unknown"}
    return {"git_commit": commit, "git_dirty": str(dirty).lower()}


def write_provenance(directory: Path, first_step: int = 0) -> list[Path]:
    """Write packages.txt, and source.diff if the checkout has uncommitted changes. Returns these files in `directory`.

    If they differ after a resume from step `first_step`, further files have the step in their names. Raises
    StorageError.
    """
    return [
        path
        for name, content in ((PACKAGES, installed_packages()), (SOURCE_DIFF, source_diff()))
        for path in _write_beside(directory / name, content, first_step)
    ]


@functools.cache  # reading them takes a tenth of a second, and imported packages do not change any more
def installed_packages() -> str:
    """The version of Python, and the packages as in a requirements file."""
    found = [one.metadata for one in importlib.metadata.distributions()]  # read once instead of once for each field
    packages = {f"{about['Name']}=={about['Version']}" for about in found if about["Name"]}
    lines = [f"# Python {platform.python_version()} on {platform.platform()}", *sorted(packages, key=str.lower)]
    return "\n".join(lines) + "\n"


def source_diff() -> str:
    """The names of untracked files and `git diff HEAD` of the checkout; empty if it is clean or there is none."""
    try:
        top = Path(_git(_checkout(), "rev-parse", "--show-toplevel").strip())
        # These options run no external program and no filter that the checkout configures.
        diff = _git(top, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD")
        untracked = _git(top, "ls-files", "--others", "--exclude-standard").splitlines()
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = [f"# not in git: {name}" for name in untracked[:MOST_UNTRACKED]]
    if len(untracked) > MOST_UNTRACKED:
        lines.append(f"# and {len(untracked) - MOST_UNTRACKED} more files that are not in git")
    if len(diff) > LARGEST_DIFF:
        diff = diff[:LARGEST_DIFF] + f"\n# cut off here: the whole diff has {len(diff)} characters\n"
    return "\n".join([*lines, diff]) if lines else diff


def _write_beside(path: Path, content: str, first_step: int) -> list[Path]:
    written = sorted(path.parent.glob(f"{path.stem}*{path.suffix}"), key=lambda one: one.stat().st_mtime_ns)
    latest = written[-1].read_text(encoding="utf-8") if written else ""
    if content != latest:
        if first_step:
            path = path.with_stem(f"{path.stem}-from-step-{first_step + 1:06d}")
        write_atomically(path, content.encode())
        written.append(path)
    return written


def _checkout() -> Path:
    """The folder of this package's checkout. Raises CalledProcessError for an installed copy, also one inside another
    checkout."""
    here = Path(__file__).resolve()
    _git(here.parent, "ls-files", "--error-unmatch", here.name)
    return here.parents[1]


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.check_output(command, stderr=subprocess.DEVNULL, encoding="utf-8", errors="replace", timeout=10)
