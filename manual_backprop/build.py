"""From a run's config to the parts of a run: the network's config, the optimizer, the order of its text and how many
steps that makes, the name, the written config."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from .config import CustomTransformerConfig, RunConfig, TrainingConfig
from .data.corpus import Corpus
from .data.order import Order, open_order
from .durable import write_atomically
from .errors import ConfigError
from .models.network import Network
from .optim import Optimizer
from .origin import SOURCES


def network_config(config: RunConfig, corpus: Corpus) -> CustomTransformerConfig:
    """The network that a run's config and its tokenizer ask for. Raises ConfigError where they do not fit."""
    model, tokens = config.model, corpus.tokenizer.vocab_size
    if model.vocab_size is not None and model.vocab_size < tokens:
        raise ConfigError(
            [
                f"model.vocab_size={model.vocab_size}: the tokenizer has {tokens} tokens; give at least {tokens}, or "
                "null for exactly as many"
            ]
        )
    return config.network(tokens)


def build_optimizer(config: RunConfig, network: Network) -> Optimizer:
    settings = config.optimizer
    if settings.name == "sgd":
        return network.sgd(settings.weight_decay, settings.momentum or 0.0)
    assert settings.betas is not None
    assert settings.epsilon is not None
    return network.adamw(settings.weight_decay, settings.betas, settings.epsilon)


def build_order(config: RunConfig, corpus: Corpus, repeat: int | None = None) -> Order:
    """In which order a run of this config meets a text; `repeat`: only the first so many steps, again and again.

    Raises InputError for a text that is too short.
    """
    return open_order(
        corpus,
        config.batching,
        config.dataset,
        sequence_length=config.model.max_seq_len,
        batch_size=config.training.batch_size,
        pieces=config.training.gradient_accumulation_steps,
        seed=config.seed,
        repeat=repeat,
    )


class Paced(Protocol):
    """What knows how long an epoch is: an order, or an estimate of one."""

    def steps(self, epochs: float) -> float: ...


def max_steps(training: TrainingConfig, order: Paced) -> int:
    """Optimizer steps of a whole run: as given, or those of `training.num_epochs` times through the text."""
    if training.max_steps is not None:
        return training.max_steps
    assert training.num_epochs is not None
    return max(1, math.ceil(order.steps(training.num_epochs)))


def default_run_name(config: RunConfig) -> str:
    """gpt2-4x128-python_docs, and whatever is not as usual behind it: gpt2-4x128-python_docs-bf16-torch."""
    model, usual = config.model, {"fp32", "custom", "adamw"}
    unusual = {config.precision.name, config.implementation.name, config.optimizer.name} - usual
    name = f"{config.architecture.name}-{model.n_blocks}x{model.d_model}-{config.dataset.name}"
    return "-".join((name, *sorted(unusual)))


def write_config(config: RunConfig, path: Path, sources: Mapping[str, str] | None = None) -> None:
    """config.yaml, and beside it where each of its values was set, where that is known."""
    from omegaconf import OmegaConf

    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(config.to_dict())).encode())
    if sources:
        write_atomically(path.with_name(SOURCES), (json.dumps(dict(sources), indent=1) + "\n").encode())
