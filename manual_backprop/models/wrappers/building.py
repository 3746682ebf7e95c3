"""The model that a config asks for."""

from __future__ import annotations

from ...config.schema import CustomTransformerConfig
from .encoder import EncoderWrapper
from .encoder_decoder import EncoderDecoderWrapper
from .language_model import build_model
from .wrapper import NetworkWrapper


def build_wrapper(implementation: str, config: CustomTransformerConfig) -> NetworkWrapper:
    """The network of `implementation=NAME` in the wrapper of its kind. Raises ConfigError if it cannot be built."""
    if config.network == "encoder_decoder":
        return EncoderDecoderWrapper(config, implementation=implementation)
    if config.network == "encoder":
        return EncoderWrapper(config, implementation=implementation)
    return build_model(implementation, config)
