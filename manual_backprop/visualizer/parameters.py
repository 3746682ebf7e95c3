"""How many parameters a network has, from its config alone: no network is built, and no missing size is assumed."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from typing import Any

from ..common.errors import ConfigError, InputError
from ..config.network import CustomTransformerConfig
from ..config.validation import FIXED_VOCABULARIES, validate, with_defaults
from ..tracking import TrainingLog

SIZES = ("vocab_size", "d_model", "n_blocks", "n_heads", "d_ffn", "max_seq_len")


def estimate_model_params(config: Any) -> int:
    """The number of parameters, as the network's `count_parameters()` counts them.

    `config` is a CustomTransformerConfig or a mapping of its fields, the `model` of a log (or the log itself), or the
    config of a run whose vocabulary it tells. Raises InputError if a size is missing: no vocabulary is assumed.
    """
    if isinstance(config, TrainingLog):
        config = config.model or config.config
    if is_dataclass(config) and not isinstance(config, type):
        to_dict = getattr(config, "to_dict", None)
        config = to_dict() if to_dict is not None else asdict(config)
    if not isinstance(config, Mapping):
        raise InputError(f"config={config!r}: expected a CustomTransformerConfig, a mapping or a training log")
    if isinstance(config.get("parameters"), int):
        return int(config["parameters"])  # counted by a run
    network = _network_of_run(config) if isinstance(config.get("model"), Mapping) else dict(config)
    needed = [name for name in SIZES if name != "vocab_size" or network.get("n_inputs") is None]  # n_inputs: no tokens
    if missing := [name for name in needed if network.get(name) is None]:
        raise InputError(
            f"the config has no {', '.join(missing)}: give the network's own config (model.config), or the "
            "`model` of a log that a run has written"
        )
    known = {name: value for name, value in network.items() if name in CustomTransformerConfig.__dataclass_fields__}
    built = CustomTransformerConfig(**known)
    if violations := built.violations():
        raise InputError("; ".join(violations))

    from ..study.estimates.memory import parameter_count  # torch

    return parameter_count(built)


def _network_of_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """The network's config from the config of a run. Only a run knows what its examples add, such as their labels."""
    from ..tasks import task_named  # torch

    with suppress(ConfigError):
        run = validate(with_defaults(config))
        known = task_named(run.task.name).network_before_examples(run)
        return asdict(run.network_config(1)) | {"vocab_size": None} if known is None else asdict(known)
    groups = {name: value if isinstance(value, Mapping) else {} for name, value in config.items()}
    network = dict(groups["model"])
    if network.get("vocab_size") is None:
        network["vocab_size"] = FIXED_VOCABULARIES.get(str(groups.get("tokenizer", {}).get("name")))
    architecture = groups.get("architecture", {})
    named = {"architecture": "name", "activation": "activation"}
    return network | {name: architecture[key] for name, key in named.items() if key in architecture}
