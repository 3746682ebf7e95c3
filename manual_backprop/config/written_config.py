"""The default name of a run, and the file config.yaml."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..common.durable_files import write_atomically
from ..common.origin import SOURCES
from .schema import DEFAULT_NETWORK, RunConfig


def default_run_name(config: RunConfig) -> str:
    """The default name, such as gpt2-4x128-python_docs; settings that are not the usual ones follow: -bf16-torch."""
    model, usual = config.model, {"fp32", "custom", "adamw"}
    unusual = {config.precision.name, config.implementation.name, config.optimizer.name} - usual
    subject = config.task.name if config.dataset.name == "none" else config.dataset.name
    if config.network_name != DEFAULT_NETWORK[config.task.name]:
        subject += f"-{config.network_name}"
    name = f"{config.architecture.name}-{model.n_blocks}x{model.d_model}-{subject}"
    return "-".join((name, *sorted(unusual)))


def write_config(config: RunConfig, path: Path, sources: Mapping[str, str] | None = None) -> None:
    """Write config.yaml, and beside it the source of each value (`sources`), if known."""
    from omegaconf import OmegaConf

    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(config.to_dict())).encode())
    if sources:
        write_atomically(path.with_name(SOURCES), (json.dumps(dict(sources), indent=1) + "\n").encode())
