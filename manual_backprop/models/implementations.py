"""The networks of `implementation=NAME`: three levels of the same thing, behind one seam."""

from __future__ import annotations

from ..config.schema import CustomTransformerConfig
from .baseline import BaselineTransformer
from .custom import CustomTransformer
from .mirror import TorchTransformer
from .network import Network

IMPLEMENTATIONS: dict[str, type[Network]] = {
    "custom": CustomTransformer,
    "torch": TorchTransformer,
    "baseline": BaselineTransformer,
}


def build_network(implementation: str, config: CustomTransformerConfig) -> Network:
    """The network of `implementation=NAME`. Raises ConfigError for a config that none can be built from."""
    return IMPLEMENTATIONS[implementation](config)
