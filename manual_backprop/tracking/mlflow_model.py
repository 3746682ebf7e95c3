"""A run's best checkpoint as a model that MLflow can load and serve, without a pickle and without code in the artifact.

    MLmodel  requirements.txt  python_env.yaml
    step-NNNNNN/    the checkpoint without the optimizer state: safetensors, the task's files, JSON, checksums

    model = mlflow.pyfunc.load_model("runs:/RUN_ID/model")
    model.predict(["Once upon"], params={"max_length": 50})      # -> a list of continuations
    model.predict(["1 2 3"], params={"beams": 4})                # for an encoder-decoder: symbols in, symbols out

MLflow imports `manual_backprop.served_model` by its name (`loader_module`), an alias of `trained_models.served`; so the
package must be installed where the model is loaded. Writing a model needs the standard library only.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import MANIFEST, STATE
from ..common.durable_files import storage_errors
from ..common.errors import CheckpointError
from ..common.json_files import read_object

MODEL_NAME = "model"  # runs:/RUN_ID/model
LOADER = "manual_backprop.served_model"  # in every written MLmodel, so this name must stay importable
PARAMETERS = "parameters.safetensors"
OPTIMIZER = "optimizer.safetensors"  # not part of a model
TOKENIZER = "tokenizer.json"
IMPORTED = ("mlflow", "torch", "safetensors", "tokenizers", "numpy")  # packages needed to load and serve it
SAMPLING = {"max_length": ("long", 100), "temperature": ("double", 0.7), "top_k": ("long", 50), "seed": ("long", 0)}
SEARCH = {"max_length": ("long", 0), "beams": ("long", 1), "length_penalty": ("double", 0.6)}  # max_length 0: no limit


def reads_sources(state: Mapping[str, Any]) -> bool:
    """Whether the network of a checkpoint's state is an encoder-decoder."""
    network = state.get("network")
    return isinstance(network, Mapping) and network.get("network") == "encoder_decoder"


def state_of(checkpoint: Path) -> Mapping[str, Any]:
    """The state saved in a checkpoint in addition to the parameters. Raises CheckpointError."""
    state = read_object(checkpoint / STATE, kind=CheckpointError).get("state")
    return state if isinstance(state, Mapping) else {}


def signature_of(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """MLflow's signature of inputs, outputs and parameters: the task's own, or that of a model from text to text."""
    if isinstance(signature := state.get("signature"), Mapping):
        return signature
    text = [{"type": "string", "required": True}]
    accepted = SEARCH if reads_sources(state) else SAMPLING
    params = [
        {"name": name, "default": default, "shape": None, "type": kind} for name, (kind, default) in accepted.items()
    ]
    return {"inputs": text, "outputs": text, "params": params}


def is_servable(checkpoint: Path) -> bool:
    """Whether a checkpoint has all files of a model. A run's checkpoints do; those that a program saves may not."""
    if not all((checkpoint / name).is_file() for name in (MANIFEST, PARAMETERS, STATE)):
        return False
    if (checkpoint / TOKENIZER).is_file():
        return True
    state = state_of(checkpoint)
    return reads_sources(state) or "signature" in state


def parameters_digest(checkpoint: Path) -> str:
    """SHA-256 of the parameters, from the checkpoint's manifest; it identifies the model."""
    return _manifest(checkpoint)["files"][PARAMETERS]["sha256"]


def write_model(folder: Path, checkpoint: Path, run_id: str, model_id: str) -> None:
    """Write an MLflow model of a checkpoint into `folder`, with hard links if the file system has them.

    Raises StorageError.
    """
    with storage_errors(f"write the model {folder}"):
        shutil.rmtree(folder, ignore_errors=True)
        inside = folder / checkpoint.name
        inside.mkdir(parents=True)
        manifest = _manifest(checkpoint)
        manifest["files"] = {name: entry for name, entry in manifest["files"].items() if name != OPTIMIZER}
        for name in manifest["files"]:
            _link_or_copy(checkpoint / name, inside / name)
        # The same bytes as a checkpoint's manifest would have: loading checks this.
        (inside / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        versions = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in IMPORTED]
        (folder / "requirements.txt").write_text("\n".join(versions) + "\n")
        environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
        (folder / "python_env.yaml").write_text(json.dumps(environment, indent=1) + "\n")  # JSON is YAML
        described = _description(checkpoint.name, run_id, model_id, signature_of(state_of(checkpoint)))
        (folder / "MLmodel").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _description(data: str, run_id: str, model_id: str, signature: Mapping[str, Any]) -> dict[str, Any]:
    """The content of MLmodel, as `mlflow.pyfunc.save_model(loader_module=...)` writes it, but without its seconds."""
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
        "signature": {name: json.dumps(signature[name]) for name in ("inputs", "outputs", "params")},
    }


def _manifest(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
