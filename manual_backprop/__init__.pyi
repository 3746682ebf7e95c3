# What type checkers see of `manual_backprop`, whose names come from where they live when they are asked for.

from .checkpoints.checkpoint import CheckpointManager
from .config.network import CustomTransformerConfig
from .data.datasets.analysis import analyze_dataset
from .data.datasets.pretokenization import pretokenize_dataset
from .data.datasets.tokenizer_training import train_tokenizer, train_tokenizer_from_files
from .data.tokens.token_shards import load_pretokenized
from .models.baseline import BaselineTransformer
from .models.custom import CustomTransformer
from .models.extensions import register_activation, register_objective
from .models.mirror import TorchTransformer
from .models.wrappers.encoder import EncoderWrapper
from .models.wrappers.encoder_decoder import EncoderDecoderWrapper
from .models.wrappers.language_model import CustomTransformerWrapper
from .tasks import register_task
from .tasks.evaluation import Evaluator
from .tracking import TrainingLogger, load_training_log

__version__: str
HOMES: dict[str, str]

__all__ = [
    "BaselineTransformer",
    "CheckpointManager",
    "CustomTransformer",
    "CustomTransformerConfig",
    "CustomTransformerWrapper",
    "EncoderDecoderWrapper",
    "EncoderWrapper",
    "Evaluator",
    "TorchTransformer",
    "TrainingLogger",
    "__version__",
    "analyze_dataset",
    "load_pretokenized",
    "load_training_log",
    "pretokenize_dataset",
    "register_activation",
    "register_objective",
    "register_task",
    "train_tokenizer",
    "train_tokenizer_from_files",
]
