"""The base of all models, whatever they read: training steps, checkpoints, a description. None is an `nn.Module`.

Subclasses define inputs and outputs: `language_model.py`, `encoder_decoder.py`, `encoder.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ...common.errors import CheckpointError, ConfigError, InputError
from ...config.network import network_of_state
from ...config.schema import CustomTransformerConfig
from ..network import Network

log = logging.getLogger(__name__)

DEFAULT_SIZES = {"vocab_size": 50257, "d_model": 256, "n_blocks": 4, "n_heads": 4, "d_ffn": 512, "max_seq_len": 256}


class NetworkWrapper:
    """The outer interface of a network. `network` computes; `step` counts training steps, each with its own dropout
    masks.

    Raises ConfigError for a network of another `kind` (see config.network).
    """

    kind: str

    def __init__(self, network: Network):
        if network.config.network != self.kind:
            raise ConfigError(
                [f"network={network.config.network}: {type(self).__name__} is made of network={self.kind}"]
            )
        self.network = network
        self.config = network.config
        self.step = 0

    # Training

    def _check_rates(self, learning_rate: float, max_grad_norm: float | None) -> None:
        if not learning_rate >= 0 or not math.isfinite(learning_rate):
            raise InputError(f"learning_rate={learning_rate}: expected a finite number of at least 0.")
        if max_grad_norm is not None and (not max_grad_norm > 0 or not math.isfinite(max_grad_norm)):
            raise InputError(
                f"max_grad_norm={max_grad_norm}: expected a finite number above 0, or None for no clipping."
            )

    def _update(self, loss: Tensor, learning_rate: float, max_grad_norm: float | None) -> dict[str, float | str]:
        """Clips the gradients and makes a step of gradient descent, unless the loss or their norm is not finite.
        Returns what `train_step` returns. Waits for the device."""
        gradients = self.network.gradient_tensors()
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        whole = torch.linalg.vector_norm(torch.stack(norms))
        if self.network.loss_scale is not None:
            self.network.loss_scale.update(whole.isfinite() & loss.isfinite(), loss)
        norm, loss_value = whole.item(), loss.item()
        if not (math.isfinite(norm) and math.isfinite(loss_value)):
            return {"loss": loss_value, "grad_norm": norm, "status": "skipped"}
        if max_grad_norm is not None and norm > max_grad_norm:
            torch._foreach_mul_(gradients, max_grad_norm / norm)
        self.network.update_parameters(learning_rate)
        return {"loss": loss_value, "grad_norm": norm, "status": "success"}

    # Description
    def count_parameters(self) -> int:
        """The number of parameters. A head that is tied to the embedding counts once."""
        return self.network.count_parameters()

    def get_model_info(self) -> dict[str, Any]:
        """A dict: model_type, implementation, network, architecture, precision, sizes and number of parameters."""
        config = self.config
        return {
            "model_type": "custom_transformer",
            "implementation": type(self.network).__name__,
            "network": config.network,
            "architecture": config.architecture,
            "precision": config.precision,
            **{name: getattr(config, name) for name in DEFAULT_SIZES},
            "parameters": self.count_parameters(),
        }

    # Checkpoints

    def _state(self) -> dict[str, Any]:
        """What a checkpoint contains besides the parameters."""
        return {"network": asdict(self.config)}

    def tensors_and_state(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """The content of a checkpoint: the parameters, not copied, and the state that describes them."""
        return {"parameters": self.network.parameters}, self._state()

    def save_checkpoint(self, directory: str | Path) -> Path:
        """Writes `directory/step-NNNNNN/` (safetensors, JSON, checksums) and returns its path. Keeps other checkpoints.

        Raises StorageError.
        """
        from ...checkpoints.checkpoint import CheckpointManager

        return CheckpointManager(directory, keep=None).save_checkpoint(self)

    def load_checkpoint(self, path: str | Path) -> None:
        """Replaces the parameters by those of a checkpoint, or of the newest one in a directory of checkpoints.

        Another precision is converted, and a line of the log says so. Raises CheckpointError, and changes nothing,
        if it is damaged or belongs to another network.
        """
        self.restore(_load(path))

    def restore(self, checkpoint: Any) -> None:
        """Takes parameters and step from a checkpoint. Another precision is converted, and a line of the log says
        so. Raises CheckpointError if it belongs to another network, and InputError if its parameters do."""
        saved = saved_network(checkpoint)
        _check_same_network(checkpoint.path, saved, self.config)
        self.network.load_parameters(checkpoint.tensors["parameters"])
        self.step = checkpoint.step
        if saved.precision != self.config.precision:
            log.warning(
                "%s was saved with precision=%s and is loaded with precision=%s: parameters and an optimizer's moments "
                "take this model's number formats, so that training does not continue bit for bit",
                checkpoint.path,
                saved.precision,
                self.config.precision,
            )

    @classmethod
    def from_checkpoint(cls, path: str | Path, **changes: Any) -> Self:
        """The model of a checkpoint, or of the newest one in a directory. `changes` replace fields of its config that
        the parameters do not depend on, `device="cpu"` for example; another precision converts it, and a line of the
        log says so. Raises CheckpointError, also for another network, and ConfigError for `changes` that no network
        can have."""
        checkpoint = _load(path)
        saved = saved_network(checkpoint)
        if saved.network != cls.kind:
            raise CheckpointError(
                f"{checkpoint.path} belongs to another network: network is {saved.network} there and {cls.kind} here."
            )
        fields = asdict(saved) | {"device": "auto"} | changes
        model = cls(CustomTransformerConfig.of(fields))  # type: ignore[arg-type]
        model.restore(checkpoint)
        return model


def config_of(
    given: CustomTransformerConfig | Mapping[str, Any] | None, keywords: Mapping[str, Any], kind: str = "decoder"
) -> CustomTransformerConfig:
    """A wrapper's config: the given one, or one built from a mapping or from keywords. Sizes that keywords leave out
    have their default value. A mapping and keywords need not name the `kind` of network. Raises ConfigError."""
    if given is None:
        return CustomTransformerConfig.of(DEFAULT_SIZES | {"network": kind} | dict(keywords))
    if isinstance(given, Mapping):
        given = {"network": kind} | dict(given)
    if keywords:
        raise ConfigError(
            [f"{', '.join(keywords)}: given together with a config; change the config (dataclasses.replace) instead"]
        )
    return CustomTransformerConfig.of(given)


def _check_same_network(path: Path, saved: CustomTransformerConfig, here: CustomTransformerConfig) -> None:
    """Raises CheckpointError unless both agree on what the parameters mean; other settings may differ."""
    there, own = (
        asdict(one)
        | {"activation": one.activation or one.traits.activation, "n_kv_heads": one.kv_heads}
        | {"norm_epsilon": one.epsilon, "rotary_base": one.base}
        for one in (saved, here)
    )
    names = (
        *("network", "architecture", "activation", *DEFAULT_SIZES, "n_kv_heads", "norm_epsilon", "rotary_base"),
        *("positions", "n_encoder_blocks", "source_vocab_size", "max_source_len", "pooling", "n_inputs", "n_outputs"),
    )
    differences = [f"{name} is {there[name]} there and {own[name]} here" for name in names if own[name] != there[name]]
    if differences:
        raise CheckpointError(f"{path} belongs to another network: {'; '.join(differences)}.")


def _load(path: str | Path) -> Any:
    from ...checkpoints.checkpoint import CheckpointManager

    path = Path(path)
    if (path / "manifest.json").is_file() or path.name.startswith("step-"):
        return CheckpointManager(path.parent).load(path)
    return CheckpointManager(path / "checkpoints" if (path / "checkpoints").is_dir() else path).load()


def saved_network(checkpoint: Any) -> CustomTransformerConfig:
    """The config of the network whose parameters a checkpoint holds. Raises CheckpointError."""
    if "parameters" not in checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.path} holds no network: it has no parameters.")
    return network_of_state(checkpoint.state, checkpoint.path)


def check_tensor(name: str, value: object) -> None:
    """Raises InputError for a value that is neither a tensor nor None."""
    if value is not None and not isinstance(value, Tensor):
        raise InputError(
            f"{name} is a {type(value).__name__}; expected a tensor: torch.tensor([...]), (batch, sequence)."
        )
