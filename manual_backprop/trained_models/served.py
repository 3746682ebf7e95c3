"""A trained model as MLflow serves it: it maps texts to texts, or what the signature of its task describes.

Not here: the files of MLflow's model (`tracking.mlflow_model`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..tasks.inference import texts_of
from ..tracking.mlflow_model import SAMPLING, SEARCH, reads_sources, state_of


class Served(ABC):
    """A model that maps texts to texts, with the interface that MLflow calls. Equal parameters give equal texts."""

    params: Mapping[str, tuple[str, float]]  # name -> type and default value

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """The model's texts for `model_input`: a text, a list, an array, or a table of one column. Raises
        InputError."""
        unknown = sorted(set(params or {}) - set(self.params))
        if unknown:
            raise InputError(f"there is no parameter {unknown[0]!r}: expected {', '.join(self.params)}")
        chosen = {name: default for name, (_, default) in self.params.items()} | (params or {})
        return self._answers(texts_of(model_input), chosen)

    @abstractmethod  # `chosen` has a value for each of `params`
    def _answers(self, texts: list[str], chosen: dict[str, Any]) -> list[str]: ...


class ServedSequences(Served):
    """An encoder-decoder for sequences of symbols: source and target are numbers separated by spaces."""

    params = SEARCH

    def __init__(self, checkpoint: Path):
        """Verifies every byte of the checkpoint. Raises CheckpointError."""
        from ..models.wrappers.encoder_decoder import EncoderDecoderWrapper

        self.model = EncoderDecoderWrapper.from_checkpoint(checkpoint)

    def _answers(self, texts: list[str], chosen: dict[str, Any]) -> list[str]:
        sources = [self._symbols(text) for text in texts]
        if not sources:
            return []
        found = self.model.generate(
            sources,
            max_new_tokens=int(chosen["max_length"]) or None,
            beams=int(chosen["beams"]),
            length_penalty=float(chosen["length_penalty"]),
        )
        ends = (self.model.eos_token_id, self.model.padding_token_id)
        return [" ".join(str(token) for token in row if token not in ends) for row in found.tolist()]

    @staticmethod
    def _symbols(text: str) -> list[int]:
        words = text.split()
        if not all(word.isdecimal() for word in words):
            raise InputError(f"{text!r} is not a source: expected symbols, numbers separated by spaces, as in '1 2 3'")
        return list(map(int, words))


class ServedModel(Served):
    """A language model: it maps each text to a continuation."""

    params = SAMPLING

    def __init__(self, checkpoint: Path):
        """Verifies every byte of the checkpoint. Raises CheckpointError."""
        from ..data.tokens.tokenizer import load_tokenizer
        from ..models.wrappers.language_model import CustomTransformerWrapper

        self.model = CustomTransformerWrapper.from_checkpoint(checkpoint)
        self.tokenizer = load_tokenizer(checkpoint)

    def _answers(self, texts: list[str], chosen: dict[str, Any]) -> list[str]:
        return [self._continue(text, chosen) for text in texts]

    def _continue(self, text: str, chosen: dict[str, Any]) -> str:
        import torch

        end = self.tokenizer.end_token_id
        tokens = [*self.tokenizer.begin_token_ids, *self.tokenizer.encode(text)] or ([] if end is None else [end])
        if not tokens:
            raise InputError("an empty text cannot be continued: this tokenizer has no begin or end token")
        continued = self.model.generate(
            torch.tensor([tokens]),
            int(chosen["max_length"]),
            temperature=float(chosen["temperature"]),
            top_k=int(chosen["top_k"]),
            eos_token_id=end,
            seed=int(chosen["seed"]),
        )
        return self.tokenizer.decode(continued[0].tolist()).removeprefix(self.tokenizer.decode(tokens))


class ServedTask:
    """A model whose task defines its own `signature`. The model and the task are built from the checkpoint's files."""

    def __init__(self, checkpoint: Path):
        """Verifies every byte of the checkpoint. Raises CheckpointError."""
        from .evaluation import restored_task
        from .saved_model import Found, load_found

        saved = load_found(Found(checkpoint, None), device="auto")
        task = restored_task(saved)
        predicts = task.inference_command[0] == "predict"
        self.server = task.predictor(saved.model) if predicts else task.writer(saved.model)

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """The output for an input, as described by the signature. Raises InputError."""
        return self.server.serve(model_input, params or {})


def load_pyfunc(path: str) -> Served | ServedTask:
    """Load the model of a checkpoint's folder. MLflow calls this function by its name. Raises CheckpointError."""
    checkpoint = Path(path)
    state = state_of(checkpoint)
    if "signature" in state:
        return ServedTask(checkpoint)
    return ServedSequences(checkpoint) if reads_sources(state) else ServedModel(checkpoint)
