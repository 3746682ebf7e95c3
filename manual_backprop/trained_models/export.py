"""Export of a model for `transformers`, and import of one as a checkpoint. Each folder is complete or absent."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from ..checkpoints.checkpoint import CheckpointManager
from ..common.digests import file_digest
from ..common.durable_files import new_folder
from ..common.errors import StorageError
from ..data.tokens.tokenizer import Tokenizer
from ..models.huggingface.layouts import config_json
from ..models.huggingface.weights import to_theirs
from .huggingface_directory import CONFIG, RECORD, RECORD_VERSION, WEIGHTS, Imported
from .model_card import model_card
from .saved_model import SavedModel
from .tokenizer_files import write_tokenizer


def export_model(saved: SavedModel, tokenizer: Tokenizer | None, target: Path) -> None:
    """Write a model in the layout that `transformers` has for its architecture. Raises InputError, StorageError."""
    config = saved.model.config
    content = config_json(config, None if tokenizer is None else tokenizer.end_token_id)
    if tokenizer is not None and tokenizer.begin_token_ids:
        content["bos_token_id"] = tokenizer.begin_token_ids[0]
    with new_folder(target) as folder:
        _write_json(folder / CONFIG, content)
        generation = {key: content[key] for key in ("bos_token_id", "eos_token_id")} | {"_from_model_config": True}
        _write_json(folder / "generation_config.json", generation)
        try:
            save_file(to_theirs(saved.model.network.parameters, config), folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # its only way to report a full disk
            raise StorageError(f"cannot write {target / WEIGHTS}: {error}") from error
        if tokenizer is not None:
            write_tokenizer(tokenizer, folder, config.max_seq_len)
        record = {
            "version": RECORD_VERSION,
            "weights_sha256": file_digest(folder / WEIGHTS),
            "step": saved.step,
            "metric": saved.metric,
            "state": dict(saved.state),
        }
        _write_json(folder / RECORD, record)
        (folder / "README.md").write_text(model_card(saved, tokenizer, target.name), encoding="utf-8")


def import_model(imported: Imported, tokenizer: Tokenizer | None, origin: str, target: Path) -> None:
    """Write a folder with one checkpoint, of step 0, and the tokenizer. Raises InputError, StorageError."""
    state = {"network": asdict(imported.config), "imported_from": origin}
    with new_folder(target) as folder:
        files = [] if tokenizer is None else tokenizer.save(folder)
        CheckpointManager(folder).save(0, {"parameters": imported.parameters}, state, files=files)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
