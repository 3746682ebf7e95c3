"""The loader module named in MLflow models, also in those of older versions; see `trained_models.served`."""

from .trained_models.served import load_pyfunc as _load_pyfunc

__all__ = ["_load_pyfunc"]
