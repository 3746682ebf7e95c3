"""A run's config as it is named and written: the run's name where none was given, and config.yaml."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..common.durable_files import write_atomically
from ..common.origin import SOURCES
from .schema import USUAL_NETWORK, RunConfig


def default_run_name(config: RunConfig) -> str:
    """gpt2-4x128-python_docs, and whatever is not as usual behind it: gpt2-4x128-python_docs-bf16-torch."""
    model, usual = config.model, {"fp32", "custom", "adamw"}
    unusual = {config.precision.name, config.implementation.name, config.optimizer.name} - usual
    subject = config.task.name if config.dataset.name == "none" else config.dataset.name
    if config.network_name != USUAL_NETWORK[config.task.name]:
        subject += f"-{config.network_name}"
    name = f"{config.architecture.name}-{model.n_blocks}x{model.d_model}-{subject}"
    return "-".join((name, *sorted(unusual)))


def write_config(config: RunConfig, path: Path, sources: Mapping[str, str] | None = None) -> None:
    """config.yaml, and beside it where each of its values was set, where that is known."""
    from omegaconf import OmegaConf

    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(config.to_dict())).encode())
    if sources:
        write_atomically(path.with_name(SOURCES), (json.dumps(dict(sources), indent=1) + "\n").encode())
