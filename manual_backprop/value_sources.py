"""Where each value of a composed configuration comes from, for a reader of `plan=true`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from manual_backprop.command_line import Job
from manual_backprop.composition import EXPERIMENTS, ExperimentsSearchPath, is_choice
from manual_backprop.config import shipped_folder
from manual_backprop.rules import shown


def sources_page(job: Job) -> str:
    """Every key of a job with its value and where that was set."""
    sources = value_sources(job)
    lines = [f"Would run with: {' '.join(job.overrides) or 'the defaults'}", ""]
    for key, value in flattened(job.config.to_dict()):
        lines.append(f"  {key:<37} {shown(value):<22} {sources[key]}")
    return "\n".join(lines)


def value_sources(job: Job) -> dict[str, str]:
    """Where each value was set last: the command line, an experiment, the option of a group, or conf/config.yaml."""
    commanded = [line.partition("=")[0] for line in job.overrides if not is_choice(line.partition("=")[0])]
    experiment = job.choices[EXPERIMENTS]
    experimental = {key for key, _ in flattened(_experiment_file(experiment))}
    sources = {}
    for key, _ in flattened(job.config.to_dict()):
        group = key.partition(".")[0]
        if any(key == given or key.startswith(given + ".") for given in commanded):
            sources[key] = "command line"
        elif key in experimental:
            sources[key] = f"{EXPERIMENTS}={experiment}"
        elif group in job.choices:
            sources[key] = f"{group}={job.choices[group]}"
        else:
            sources[key] = "conf/config.yaml"
    return sources


def _experiment_file(name: str) -> dict[str, Any]:
    folders = [shipped_folder(EXPERIMENTS)]
    if ExperimentsSearchPath.own_folder is not None:
        folders.insert(0, Path(ExperimentsSearchPath.own_folder) / EXPERIMENTS)
    path = next((path for folder in folders if (path := folder / f"{name}.yaml").is_file()), None)
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path else None
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def flattened(mapping: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
