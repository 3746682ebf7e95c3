"""Networks behind one seam: `custom.py` (gradients by hand), `mirror.py` (the same lines, gradients by autograd)."""

from __future__ import annotations

from ..config import CustomTransformerConfig
from .custom import CustomTransformer
from .mirror import TorchTransformer
from .network import Network

IMPLEMENTATIONS: dict[str, type[Network]] = {"custom": CustomTransformer, "torch": TorchTransformer}


def build_network(implementation: str, config: CustomTransformerConfig) -> Network:
    """The network of `implementation=NAME`. Raises ConfigError for a config that none can be built from."""
    return IMPLEMENTATIONS[implementation](config)
