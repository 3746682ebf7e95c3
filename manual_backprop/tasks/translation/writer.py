"""Inference with a trained translator, for `generate --source` and MLflow's model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...common.errors import InputError
from ..inference import TEXT, Writer, texts_of

SERVED = {"max_length": ("long", 0), "beams": ("long", 1), "length_penalty": ("double", 0.6)}  # max_length 0: no limit
SIGNATURE = {
    "inputs": TEXT,
    "outputs": TEXT,
    "params": [
        {"name": name, "default": default, "shape": None, "type": kind} for name, (kind, default) in SERVED.items()
    ],
}


class Translator(Writer):
    """Translates sources to targets. `answer` generates the target of each source, with the options of `generate`."""

    def __init__(self, answer: Callable[..., list[str]]):
        self.answer = answer

    def write(self, source: str, **drawing: Any) -> str:
        return self.answer([source], **drawing)[0]

    def serve(self, model_input: Any, params: Mapping[str, Any]) -> list[str]:
        if unknown := sorted(set(params) - set(SERVED)):
            raise InputError(f"there is no parameter {unknown[0]!r}: expected {', '.join(SERVED)}")
        chosen = {name: default for name, (_, default) in SERVED.items()} | dict(params)
        return self.answer(
            texts_of(model_input),
            max_new_tokens=int(chosen["max_length"]) or None,
            beams=int(chosen["beams"]),
            length_penalty=float(chosen["length_penalty"]),
        )
