"""The environment of a run, which determines its exact bits together with config and data: threads, torch, processor,
compiler, code."""

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

CODE = ("version", "commit", "code")  # keys of an environment that identify the code


def environment_of(network: Network) -> dict[str, Any]:
    """The environment of a network in this process; checkpoints and run.json store it under `made_with`."""
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


@functools.cache  # imported code does not change any more, and every checkpoint stores it
def code_version() -> dict[str, str]:
    """The code that this process runs: the package's version, its commit, and the digest of its files."""
    from .. import __version__
    from .provenance import commit_tags

    tags = commit_tags()
    commit = tags["git_commit"] + " and changes" * (tags["git_dirty"] == "true")
    return {"version": __version__, "commit": commit, "code": code_digest()}


def differing(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences between two environments, as in "threads: 2 then, 1 now"; without the code (`other_version`)."""
    then = {"processes": 1} | then  # older runs had one process and did not record it
    return [
        f"{name}: {then.get(name)} then, {value} now"
        for name, value in now.items()
        if then.get(name) != value and name not in CODE
    ]


def other_version(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """A line about a change of the code, after which the same bits are not guaranteed; None if the package's files are
    the same. `then` is the environment of a run or a checkpoint; missing entries are unknown."""
    if then.get("code") == now["code"]:
        return None
    return f"code: {version_in_words(then)} then, {version_in_words(now)} now; the package's files differ"


def version_in_words(environment: Mapping[str, Any]) -> str:
    """The version as text, such as `0.1.0, commit 557d51a8a562`; missing parts are called unknown."""
    commit, separator, changes = str(environment.get("commit", "unknown")).partition(" ")
    return f"{environment.get('version', 'unknown version')}, commit {commit[:12]}{separator}{changes}"


def code_digest() -> str:
    """SHA-256 of the sources of this package; unlike a commit it also identifies a changed checkout or a wheel."""
    folder = Path(__file__).resolve().parents[1]
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
