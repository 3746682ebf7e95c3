"""The networks of `implementation=NAME`: three implementations of the same network with one interface."""

from __future__ import annotations

from ..config.schema import CustomTransformerConfig
from .baseline import BaselineTransformer
from .custom import CustomTransformer
from .custom_encoders import CustomEncoder, CustomEncoderDecoder
from .mirror import TorchTransformer
from .mirror_encoders import TorchEncoder, TorchEncoderDecoder
from .network import Network

IMPLEMENTATIONS: dict[str, type[Network]] = {  # of a decoder; the baseline's class serves every kind of network
    "custom": CustomTransformer,
    "torch": TorchTransformer,
    "baseline": BaselineTransformer,
}
OTHERS: dict[tuple[str, str], type[Network]] = {
    ("custom", "encoder_decoder"): CustomEncoderDecoder,
    ("custom", "encoder"): CustomEncoder,
    ("torch", "encoder_decoder"): TorchEncoderDecoder,
    ("torch", "encoder"): TorchEncoder,
}


def build_network(implementation: str, config: CustomTransformerConfig) -> Network:
    """The network of `implementation=NAME` and network=KIND. Raises ConfigError if none can be built from the
    config."""
    return OTHERS.get((implementation, config.network), IMPLEMENTATIONS[implementation])(config)
