"""init_from: start a run from the weights of another model, one of ours or an imported one.

The model determines sizes, architecture and tokenizer: keys that the command line does not name are set here, and those
that it names must be the same. Only the sequence length may differ: a table of learned positions is cut, and positions
of other kinds are computed. Imports no torch before weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manual_backprop.checkpoints.checkpoint import load_checkpoint, read_state
from manual_backprop.common.errors import ConfigError, InputError
from manual_backprop.config.network import network_of_state
from manual_backprop.config.other_programs import known_elsewhere
from manual_backprop.config.rules import shown
from manual_backprop.config.schema import CustomTransformerConfig, option_values
from manual_backprop.config.validation import FIXED_VOCABULARIES
from manual_backprop.trained_models.huggingface_directory import as_checkpoint, is_exported, read_network
from manual_backprop.trained_models.saved_model import find

if TYPE_CHECKING:
    from manual_backprop.models.network import Network

TOKENIZER_FILE = "tokenizer.json"
SIZES = ("d_model", "n_blocks", "n_heads", "d_ffn", "vocab_size", "n_kv_heads", "max_seq_len")
SET_HERE = (
    *(f"model.{name}" for name in SIZES),
    *("architecture.name", "architecture.activation", "architecture.learning_rate_scale"),
    *("architecture.norm_epsilon", "architecture.rotary_base"),
    *("tokenizer.name", "tokenizer.path"),
)
SET_IF_NULL = ("model.vocab_size", "architecture.norm_epsilon", "architecture.rotary_base")  # also if given as null


@dataclass(frozen=True)
class InitialModel:
    path: Path  # a checkpoint, or an exported folder
    network: CustomTransformerConfig
    tokenizer: Path | None  # the folder that holds tokenizer.json

    def values(self) -> dict[str, Any]:
        """The keys and values that it sets in the config of a run."""
        return _values_of(self.network)

    def fits(self, key: str, value: Any) -> bool:
        """Whether a network with this value can use its weights."""
        theirs = self.values()[key]
        if key == "model.max_seq_len":
            return self.network.traits.positions != "learned" or value <= theirs
        if key == "model.n_kv_heads":
            return (value or self.network.n_heads) == self.network.kv_heads
        return bool(value == theirs)


def _values_of(network: CustomTransformerConfig) -> dict[str, Any]:
    values = {f"model.{name}": getattr(network, name) for name in SIZES} | {
        "architecture.name": network.architecture,
        "architecture.activation": network.activation or network.traits.activation,
        "architecture.norm_epsilon": network.epsilon,
    }
    return values | ({"architecture.rotary_base": network.base} if network.traits.positions == "rotary" else {})


def initial_model(which: str, outputs: Path) -> InitialModel:
    """The model that `init_from` names, without its weights. Raises InputError."""
    found = find(which, outputs)
    if is_exported(found.checkpoint):
        network = read_network(found.checkpoint)
    else:
        network = network_of_state(read_state(found.checkpoint)["state"], found.checkpoint)
    # the run directory comes first, since a run may remove its checkpoints
    folders = (found.run or found.checkpoint.parent, found.checkpoint)
    tokenizer = next((folder for folder in folders if (folder / TOKENIZER_FILE).is_file()), None)
    return InitialModel(found.checkpoint, network, tokenizer)


def with_initial_model(mapping: dict[str, Any], overrides: Sequence[str], outputs: Path) -> dict[str, Any]:
    """A run's config with the sizes and the tokenizer of `init_from`, if that is set; `overrides` are KEY=VALUE.

    Raises ConfigError with every value of the command line that does not fit.
    """
    given = mapping.get("init_from")
    if given is None or isinstance(given, bool) or not isinstance(given, str | int):
        return mapping  # null; or invalid, which validation reports
    which = str(given)  # the last six characters of a run id may be a number
    try:
        model = initial_model(which, outputs)
    except InputError as error:
        hint = known_elsewhere("init_from", which) or ""
        raise ConfigError([f"init_from={shown(which)}: {' '.join(str(error).split())}{hint}"]) from error
    named = {override.partition("=")[0].lstrip("+") for override in overrides}
    filled = {name: dict(value) if isinstance(value, Mapping) else value for name, value in mapping.items()}
    problems = []
    for key, theirs in model.values().items():
        group, _, inner = key.partition(".")
        value = filled[group].get(inner)
        kind = int | float if isinstance(theirs, float) else type(theirs)
        if not named & {key, group} or (key in SET_IF_NULL and value is None):
            filled[group][inner] = theirs
        elif isinstance(value, kind) and not model.fits(key, value):
            problems.append(_difference(key, value, model))
    if not named & {"architecture", "architecture.learning_rate_scale"}:
        usual = option_values("architecture", model.network.architecture)["learning_rate_scale"]
        filled["architecture"]["learning_rate_scale"] = float(usual)
    if model.tokenizer is not None and not any(key.partition(".")[0] == "tokenizer" for key in named):
        filled["tokenizer"] = {"name": "file", "path": str(model.tokenizer)}
    problems += _too_many_tokens(filled["tokenizer"], model)
    if problems:
        raise _refusal(which, problems, model)
    return filled | {"init_from": str(model.path)}


def load_initial_weights(network: Network, which: str, digests: Mapping[str, str], outputs: Path) -> None:
    """Load the weights of `init_from` into a network, which will be trained on data with these `digests`
    (`Task.digests`). Raises ConfigError with everything that does not fit.
    """
    model = initial_model(which, outputs)
    wanted, theirs = _values_of(network.config), model.values()  # rotary_base only if both have rotary positions
    both = (key for key in wanted if key in theirs)
    problems = [_difference(key, wanted[key], model) for key in both if not model.fits(key, wanted[key])]
    if model.tokenizer is not None:
        from manual_backprop.data.tokens.tokenizer import load_tokenizer

        if load_tokenizer(model.tokenizer).digest != digests.get("tokenizer_digest"):
            problems.append("its weights were trained with another tokenizer; leave tokenizer=... out")
    if problems:
        raise _refusal(which, problems, model)
    saved = as_checkpoint(model.path) if is_exported(model.path) else load_checkpoint(model.path)
    parameters = dict(saved.tensors["parameters"])
    table = parameters.get("position_embedding.weight")
    if table is not None:
        parameters["position_embedding.weight"] = table[: network.config.max_seq_len]
    network.load_parameters(parameters)


def _difference(key: str, value: Any, model: InitialModel) -> str:
    rule = "must be at most" if key == "model.max_seq_len" else "must be"
    return f"{key.removesuffix('.name')}={shown(value)}: {rule} {shown(model.values()[key])}, as in its weights"


def _too_many_tokens(tokenizer: Any, model: InitialModel) -> list[str]:
    name = tokenizer.get("name") if isinstance(tokenizer, Mapping) else None
    if name not in ("byte", "gpt2", "bpe"):
        return []
    tokens = FIXED_VOCABULARIES.get(name, tokenizer.get("vocab_size"))
    if not isinstance(tokens, int) or tokens <= model.network.vocab_size:
        return []
    return [f"tokenizer={name}: has {tokens} tokens, but its weights are for {model.network.vocab_size}"]


def _refusal(which: str, problems: list[str], model: InitialModel) -> ConfigError:
    """An error with everything that does not fit, which ends with the values that do."""
    values = (f"{key.removesuffix('.name')}={shown(value)}" for key, value in model.values().items())
    tokenizer = [] if model.tokenizer is None else ["tokenizer=file", f"tokenizer.path={model.tokenizer}"]
    fitting = f"; leave out what differs: init_from sets {' '.join([*values, *tokenizer])} by itself"
    lines = [f"init_from={which}: {problem}" for problem in problems]
    return ConfigError([*lines[:-1], lines[-1] + fitting])
