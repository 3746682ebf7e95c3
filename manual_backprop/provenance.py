"""Which code made a run."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit_tags() -> dict[str, str]:
    """git_commit and git_dirty of the checkout that this package runs from; unknown where it is installed or git is
    not there."""
    here = Path(__file__).resolve()
    try:
        _git(
            here.parent, "ls-files", "--error-unmatch", here.name
        )  # a checkout of this package, not a folder inside one
        commit = _git(here.parent, "rev-parse", "HEAD")
        dirty = bool(_git(here.parent, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": "unknown", "git_dirty": "unknown"}
    return {"git_commit": commit, "git_dirty": str(dirty).lower()}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
