"""A run's best checkpoint as a model that MLflow can load and serve, without a pickle and without code in the artifact.

    MLmodel  requirements.txt  python_env.yaml
    step-NNNNNN/    the checkpoint without the optimizer's state: safetensors, tokenizer, JSON, checksums

    model = mlflow.pyfunc.load_model("runs:/RUN_ID/model")
    model.predict(["Once upon"], params={"max_length": 50})      # -> a list of continuations
    model.predict(["1 2 3"], params={"beams": 4})                # an encoder-decoder's: symbols in, symbols out

MLflow imports this module by its name (`loader_module`) and calls `_load_pyfunc`; so the package has to be installed
where the model is loaded. Writing a model needs the standard library only.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import MANIFEST, STATE
from ..common.durable_files import storage_errors
from ..common.errors import CheckpointError, InputError
from ..common.json_files import read_object

MODEL_NAME = "model"  # runs:/RUN_ID/model
LOADER = "manual_backprop.served_model"  # in every MLmodel that was written: it is importable, wherever this file lies
PARAMETERS = "parameters.safetensors"
TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"  # of a tokenizer that has it
IMPORTED = ("mlflow", "torch", "safetensors", "tokenizers", "numpy")  # by what loads and serves it
SAMPLING = {"max_length": ("long", 100), "temperature": ("double", 0.7), "top_k": ("long", 50), "seed": ("long", 0)}
SEARCH = {"max_length": ("long", 0), "beams": ("long", 1), "length_penalty": ("double", 0.6)}  # 0: as long as it can be


class Served(ABC):
    """What MLflow calls: texts in, texts out. The same parameters give the same texts."""

    params: Mapping[str, tuple[str, float]]  # name -> its type, and its value where it is not given

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """`model_input`: a text, a list of them, an array, or a table of one column. Raises InputError."""
        unknown = sorted(set(params or {}) - set(self.params))
        if unknown:
            raise InputError(f"there is no parameter {unknown[0]!r}; there are {', '.join(self.params)}")
        chosen = {name: default for name, (_, default) in self.params.items()} | (params or {})
        return self._answers(_texts(model_input), chosen)

    @abstractmethod
    def _answers(self, texts: list[str], chosen: dict[str, Any]) -> list[str]: ...


class ServedSequences(Served):
    """An encoder-decoder: a source of symbols, numbers with blanks between them, becomes a target of the same kind."""

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
            raise InputError(
                f"{text!r} is no source: expected symbols, numbers with blanks between them, as in '1 2 3'"
            )
        return list(map(int, words))


class ServedModel(Served):
    """A language model: texts in, continuations out."""

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
            raise InputError("an empty text cannot be continued: this tokenizer has no token that a document begins at")
        continued = self.model.generate(
            torch.tensor([tokens]),
            int(chosen["max_length"]),
            temperature=float(chosen["temperature"]),
            top_k=int(chosen["top_k"]),
            eos_token_id=end,
            seed=int(chosen["seed"]),
        )
        return self.tokenizer.decode(continued[0].tolist()).removeprefix(self.tokenizer.decode(tokens))


def _load_pyfunc(path: str) -> Served:
    checkpoint = Path(path)
    return ServedSequences(checkpoint) if _reads_sources(checkpoint) else ServedModel(checkpoint)


def _reads_sources(checkpoint: Path) -> bool:
    """Whether its network is an encoder-decoder."""
    state = read_object(checkpoint / STATE, kind=CheckpointError).get("state")
    network = state.get("network") if isinstance(state, Mapping) else None
    return isinstance(network, Mapping) and network.get("network") == "encoder_decoder"


def _texts(model_input: Any) -> list[str]:
    if isinstance(model_input, str):
        return [model_input]
    if hasattr(model_input, "columns") and len(model_input.columns) != 1:
        raise InputError(f"the table has the columns {list(model_input.columns)}: expected one, of texts")
    values = getattr(model_input, "values", model_input)
    if hasattr(values, "ravel"):
        values = values.ravel().tolist()
    if not isinstance(values, Iterable):
        raise InputError(f"{model_input!r}: expected texts, as in ['Once upon']")
    texts = list(values)
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"{text!r} is no text: expected a list of texts, as in ['Once upon']")
    return texts


def is_servable(checkpoint: Path) -> bool:
    """A run's checkpoints are; those that a program of somebody's own saves may lack a part."""
    if not all((checkpoint / name).is_file() for name in (MANIFEST, PARAMETERS, STATE)):
        return False
    return (checkpoint / TOKENIZER).is_file() or _reads_sources(checkpoint)


def parameters_digest(checkpoint: Path) -> str:
    """SHA-256 of the parameters, as the checkpoint's manifest has it: which model this is."""
    return _manifest(checkpoint)["files"][PARAMETERS]["sha256"]


def write_model(folder: Path, checkpoint: Path, run_id: str, model_id: str) -> None:
    """Make `folder` an MLflow model of a checkpoint; its files are hard links where the file system has them.

    Raises StorageError.
    """
    with storage_errors(f"write the model {folder}"):
        shutil.rmtree(folder, ignore_errors=True)
        inside = folder / checkpoint.name
        inside.mkdir(parents=True)
        manifest = _manifest(checkpoint)
        needed = (PARAMETERS, STATE, TOKENIZER, SETTINGS)
        manifest["files"] = {name: entry for name, entry in manifest["files"].items() if name in needed}
        for name in manifest["files"]:
            _link_or_copy(checkpoint / name, inside / name)
        # Byte for byte what a checkpoint's manifest looks like: loading compares it.
        (inside / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        versions = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in IMPORTED]
        (folder / "requirements.txt").write_text("\n".join(versions) + "\n")
        environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
        (folder / "python_env.yaml").write_text(json.dumps(environment, indent=1) + "\n")  # JSON is YAML
        params = SEARCH if _reads_sources(checkpoint) else SAMPLING
        described = _description(checkpoint.name, run_id, model_id, params)
        (folder / "MLmodel").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _description(data: str, run_id: str, model_id: str, accepted: Mapping[str, tuple[str, float]]) -> dict[str, Any]:
    """The content of MLmodel, as `mlflow.pyfunc.save_model(loader_module=...)` writes it in its seconds."""
    text = json.dumps([{"type": "string", "required": True}])
    params = [
        {"name": name, "default": default, "shape": None, "type": kind} for name, (kind, default) in accepted.items()
    ]
    return {
        "flavors": {
            "python_function": {
                "loader_module": LOADER,
                "data": data,
                "env": {"virtualenv": "python_env.yaml"},
                "python_version": platform.python_version(),
                "streamable": False,
            }
        },
        "mlflow_version": importlib.metadata.version("mlflow"),
        "model_id": model_id,
        "model_uuid": model_id,
        "run_id": run_id,
        "artifact_path": MODEL_NAME,
        "signature": {"inputs": text, "outputs": text, "params": json.dumps(params)},
    }


def _manifest(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
