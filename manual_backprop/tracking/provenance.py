"""Which code made a run: the commit, what was changed since, and the packages that were installed.

Nothing of the environment's variables is read: tokens and passwords live there.
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
MOST_UNTRACKED = 200  # names of files


def commit_tags() -> dict[str, str]:
    """git_commit and git_dirty of the checkout that this package runs from; unknown where it is installed or git is
    not there."""
    try:
        here = _checkout()
        commit = _git(here, "rev-parse", "HEAD").strip()
        dirty = bool(_git(here, "status", "--porcelain", "--untracked-files=no").strip())
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": "unknown", "git_dirty": "unknown"}
    return {"git_commit": commit, "git_dirty": str(dirty).lower()}


def write_provenance(directory: Path, first_step: int = 0) -> list[Path]:
    """packages.txt, and source.diff where the checkout is not as it was committed. Returns what lies in `directory`.

    What a resume after `first_step` steps finds changed stands beside the first one, with the step in its name. Raises
    StorageError.
    """
    return [
        path
        for name, content in ((PACKAGES, installed_packages()), (SOURCE_DIFF, source_diff()))
        for path in _write_beside(directory / name, content, first_step)
    ]


@functools.cache  # to read them takes a tenth of a second, and what is imported does not change any more
def installed_packages() -> str:
    """Lines as in a requirements file, below the version of Python."""
    found = [one.metadata for one in importlib.metadata.distributions()]  # read once, not for each of its fields
    packages = {f"{about['Name']}=={about['Version']}" for about in found if about["Name"]}
    lines = [f"# Python {platform.python_version()} on {platform.platform()}", *sorted(packages, key=str.lower)]
    return "\n".join(lines) + "\n"


def source_diff() -> str:
    """`git diff HEAD` of the checkout below the names of the files that git does not know; empty where it is clean."""
    try:
        top = Path(_git(_checkout(), "rev-parse", "--show-toplevel").strip())
        # Neither an external program nor a filter that the checkout names is run for it.
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
    """The folder of this package, if it is a checkout of it and not an installed copy inside another one."""
    here = Path(__file__).resolve()
    _git(here.parent, "ls-files", "--error-unmatch", here.name)
    return here.parents[1]


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=True,
        timeout=10,
    )
    return done.stdout
