"""The loader that models in MLflow name, which older versions wrote too: `manual_backprop.tracking.mlflow_model`."""

from .tracking.mlflow_model import _load_pyfunc

__all__ = ["_load_pyfunc"]
