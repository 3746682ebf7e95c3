"""What the last bits of a run depend on beside its config and its data: threads, torch, processor, compiler, code."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.machine import processor
from ..common.processes import processes

if TYPE_CHECKING:
    from ..models.network import Network

CODE = ("version", "commit", "code")  # of an environment: which code it was


def environment_of(network: Network) -> dict[str, Any]:
    """Of a network in this process, as it is now: `made_with` in every checkpoint and every run.json."""
    import torch

    device = network.device
    return {
        "threads": torch.get_num_threads(),
        "processes": processes().size,
        "torch": torch.__version__,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "compiled": network.compiles,
        **code_version(),
    }


@functools.cache  # what is imported does not change any more, and every checkpoint has it
def code_version() -> dict[str, str]:
    """Which code this process runs: the package's version, its commit, and the digest of its files."""
    from .. import __version__
    from .provenance import commit_tags

    tags = commit_tags()
    commit = tags["git_commit"] + " and changes" * (tags["git_dirty"] == "true")
    return {"version": __version__, "commit": commit, "code": code_digest()}


def differing(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two environments: "threads: 2 then, 1 now". The code is `other_version`'s."""
    then = {"processes": 1} | then  # of runs from before there were several
    return [
        f"{name}: {then.get(name)} then, {value} now"
        for name, value in now.items()
        if then.get(name) != value and name not in CODE
    ]


def other_version(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The line that says that the code is another one, with which the same bits are not promised; None where the files
    of the package are the same. `then` is the environment of a run or a checkpoint; what it lacks is unknown."""
    if then.get("code") == now["code"]:
        return None
    return f"code: {version_in_words(then)} then, {version_in_words(now)} now; the package's files differ"


def version_in_words(environment: Mapping[str, Any]) -> str:
    """`0.1.0, commit 557d51a8a562`, as far as it is known."""
    commit, separator, changes = str(environment.get("commit", "unknown")).partition(" ")
    return f"{environment.get('version', 'unknown version')}, commit {commit[:12]}{separator}{changes}"


def code_digest() -> str:
    """SHA-256 of the sources of this package: what a commit does not tell of a changed checkout, or of a wheel."""
    folder = Path(__file__).resolve().parents[1]
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
