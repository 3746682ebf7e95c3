"""A transformer whose backward pass is written by hand, with everything to train, check and understand it.

Importing the package is fast: each public name below is imported when it is first used.
"""

from importlib import import_module

from manual_backprop.common.startup.shadowing import refuse_shadows

refuse_shadows()  # before the imports of a command, so nothing else may be imported above

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Where each public name lives. Type checkers read the same in __init__.pyi.
HOMES = {
    "BaselineTransformer": "models.baseline",
    "CheckpointManager": "checkpoints.checkpoint",
    "CustomTransformer": "models.custom",
    "CustomTransformerConfig": "config.network",
    "CustomTransformerWrapper": "models.wrappers.language_model",
    "EncoderDecoderWrapper": "models.wrappers.encoder_decoder",
    "EncoderWrapper": "models.wrappers.encoder",
    "Evaluator": "tasks.evaluation",
    "TorchTransformer": "models.mirror",
    "TrainingLogger": "tracking",
    "analyze_dataset": "data.datasets.analysis",
    "load_pretokenized": "data.tokens.token_shards",
    "load_training_log": "tracking",
    "register_activation": "models.extensions",
    "register_objective": "models.extensions",
    "register_task": "tasks",
    "pretokenize_dataset": "data.datasets.pretokenization",
    "train_tokenizer": "data.datasets.tokenizer_training",
    "train_tokenizer_from_files": "data.datasets.tokenizer_training",
}

__all__ = ["__version__", *HOMES]


def __getattr__(name: str) -> "Any":
    if name == "__version__":
        value: Any = _version()
    elif name in HOMES:
        value = getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The version in setup.cfg if the package runs from a checkout, otherwise that of the installed package."""
    from pathlib import Path

    setup = Path(__file__).resolve().parent.parent / "setup.cfg"
    if setup.is_file():
        from configparser import ConfigParser

        parser = ConfigParser()
        parser.read(setup, encoding="utf-8")
        if parser.get("metadata", "name", fallback=None) == "manual-backprop":
            return parser.get("metadata", "version")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("manual-backprop")
    except PackageNotFoundError:
        return "unknown (neither installed nor in a checkout)"
