"""The loader that models in MLflow name, which older versions wrote too: `manual_backprop.trained_models.served`."""

from .trained_models.served import load_pyfunc as _load_pyfunc

__all__ = ["_load_pyfunc"]
